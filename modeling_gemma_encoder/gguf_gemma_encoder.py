"""Reading GGUF files (llama.cpp): which file a name means, the decoder's config, and its
dequantized weights.

`from_pretrained("folder/x.gguf")` and `from_pretrained("folder", gguf_file="x.gguf")` mean the
same; a repository can take the folder's place. Upstream reads the tensors and marks the model as
quantized; here a copy without that mark is returned. Upstream's config lacks what some files say
about rotary scaling, head sizes and the scale of attention, so the config is read here. Keys of a
file's metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import copy
import math
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_accelerate_available, is_gguf_available

# The architectures that upstream reads right, by `general.architecture`, and their `model_type`.
ARCHITECTURES = {"gemma2": "gemma2", "gemma3": "gemma3_text", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Keys of a file's metadata, without the architecture's name, and the fields of the decoder's
# config.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# Gemma's 27B models divide attention scores by the root of hidden_size / num_attention_heads. No
# key says so; llama.cpp recognizes these models by their number of layers:
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (f_attention_scale).
DEPTH_OF_27B = {"gemma2": 46, "gemma3": 62}
# Files of Llama 3.1 and 3.2 hold a tensor that scales rotary frequencies; it is computed from these
# factors.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS = (8.0, 32.0)
# Arguments of `from_pretrained` that say where a file is.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those of `options` that say where a file is."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def split_gguf(name: str | Path, gguf_file: str | None = None) -> tuple[str | Path, str | None]:
    """Return the folder or repository, and the GGUF file, or None, that `name` and `gguf_file`
    mean."""
    if gguf_file is not None or not isinstance(name, str | Path) or Path(name).suffix != ".gguf":
        return name, gguf_file
    path, parts = Path(name).expanduser(), str(name).split("/")
    if path.is_dir():
        return name, None
    if path.is_absolute() or path.exists() or parts[0] in (".", "..") or len(parts) < 3:
        return str(path.parent), path.name
    return "/".join(parts[:2]), "/".join(parts[2:])  # owner/repo/file


def find_gguf(folder: str | Path, gguf_file: str, where: dict[str, Any]) -> str:
    """
    Return the path of a GGUF file, downloaded if need be.

    Raises:
        ImportError: the packages that read GGUF files are not installed.
        OSError: there is no such file.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        raise ImportError(f"Reading {gguf_file} needs two packages. Install them: pip install gguf accelerate")
    place = Path(folder) / (where.get("subfolder") or "")
    if Path(folder).is_dir() and not (place / gguf_file).is_file():
        there = ", ".join(sorted(path.name for path in place.glob("*.gguf"))) or "none"
        raise OSError(f"{place} has no file {gguf_file}; its GGUF files: {there}. Name one of them.")
    try:
        return cached_file(str(folder), gguf_file, **where)
    except OSError as error:
        raise OSError(
            f"There is no file {folder}/{gguf_file} here, and it could not be read from the Hub: {error}"
        ) from error


def gguf_config(folder: str | Path, gguf_file: str, where: dict[str, Any]) -> dict[str, Any]:
    """
    Return the config of the decoder in a GGUF file as a dict.

    Raises:
        ValueError: the file is not a GGUF file, or has an architecture that cannot be read.
    """
    path = Path(find_gguf(folder, gguf_file, where))
    try:
        return copy.deepcopy(_config_of(str(path), path.stat().st_mtime_ns))
    except (KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short, or its metadata lack {error}. Download or make it again.") from error


@lru_cache(maxsize=8)
def _config_of(path: str, changed: int) -> dict[str, Any]:
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, tensors = read_gguf_metadata(path)
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} is of architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be read. Use the original "
            "checkpoint in safetensors."
        )
    if metadata.get(f"{architecture}.expert_count", 0) > 0:
        raise ValueError(f"{path} is a mixture of experts, which cannot run as an encoder here. Use a dense decoder.")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts. Join them with llama-gguf-split --merge.")
    config = {"model_type": ARCHITECTURES[architecture], "tie_word_embeddings": "output.weight" not in tensors}
    for key, field in FIELDS.items():
        if (value := metadata.get(f"{architecture}.{key}")) is not None:
            config[field] = float(f"{value:.7g}") if isinstance(value, float) else value  # 1e-06 as it was meant
    config |= {ours: metadata.get(f"tokenizer.ggml.{key}") for key, ours in TOKENS.items()}
    config["vocab_size"] = metadata.get(f"{architecture}.vocab_size") or metadata["tokenizer.ggml.tokens"]
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture in DEPTH_OF_27B:
        is_27b = config["num_hidden_layers"] == DEPTH_OF_27B[architecture]
        per_head = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _llama3_scaling(path, config)
    elif (scaling := metadata.get(f"{architecture}.rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = _scaling(path, scaling, metadata, architecture)
    elif factor := metadata.get(f"{architecture}.rope.scale_linear"):  # files of 2023
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config


def _scaling(path: str, kind: str, metadata: dict, architecture: str) -> dict[str, Any]:
    """Return the scaling of rotary positions in a file's metadata."""
    if kind not in ("linear", "yarn"):
        raise ValueError(f"The rotary scaling of {path} must be one of 'linear' and 'yarn'; got {kind!r}.")
    scaling = {"rope_type": kind, "factor": metadata[f"{architecture}.rope.scaling.factor"]}
    if kind == "yarn":
        original = metadata[f"{architecture}.rope.scaling.original_context_length"]
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the factors of Llama 3's scaling that a file's tensor was computed from.

    Raises:
        ValueError: the tensor is not Llama 3.1's or 3.2's.
    """
    from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict

    given = load_gguf_state_dict(GgufHeader.from_file(path))["rope_freqs.weight"][...].float()
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for factor in LLAMA3_FACTORS:
        if torch.allclose(given, llama3_divisors(config.get("rope_theta", 1e4), size, factor), rtol=1e-3):
            return {**LLAMA3_SCALING, "factor": factor}
    raise ValueError(
        f"{path} scales its rotary frequencies (rope_freqs.weight) in a way that is not Llama 3.1's or 3.2's. Use the "
        "original checkpoint in safetensors."
    )


def llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """Compute the divisors of Llama 3's rotary frequencies, (head_dim / 2,), as llama.cpp writes
    them to a file."""
    low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
    turns = LLAMA3_SCALING["original_max_position_embeddings"] / (2 * math.pi)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    smooth = ((turns * frequencies - low) / (high - low)).clamp(0, 1)  # 1: high frequencies stay as they are
    return 1 / ((1 - smooth) / factor + smooth)


def read_decoder(
    folder: str | Path, gguf_file: str, config: PreTrainedConfig, dtype: torch.dtype | str | None, where: dict[str, Any]
) -> PreTrainedModel:
    """
    Return upstream's causal language model with the dequantized weights of a GGUF file.

    It is for saving, or for its `state_dict`. It cannot run, since its buffers have no values.

    Args:
        config: The decoder's config, as `gguf_config` reads it.
        dtype: Dtype of the weights. None and "auto" mean fp32, since a file of quantized weights
            has no such dtype.

    Raises:
        ValueError: the file lacks weights that its metadata promise, or has a format that cannot be
            read.
    """
    path, config = Path(find_gguf(folder, gguf_file, where)), copy.deepcopy(config)  # upstream may write into it
    dtype = torch.float32 if dtype in (None, "auto") else dtype
    read, missing = _read_weights(path, config, dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(missing - tied):
        raise ValueError(
            f"{path} lacks {len(missing)} weights, {missing[0]} and others. It is cut short, or one of several parts."
        )
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    decoder.load_state_dict(read.state_dict(), assign=True)
    decoder.tie_weights()
    return decoder.eval()


def _read_weights(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, set[str]]:
    """Return upstream's model of a GGUF file, which it marks as quantized, and the names of missing
    parameters."""
    from transformers.utils.quantization_config import GgufConfig

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=str(path.absolute()),  # a bare name would be looked for in the working directory first
            config=config,
            dtype=dtype,
            device_map="cpu",
            quantization_config=GgufConfig(dequantize=True),  # and no kernels are fetched for packed weights
            trust_remote_code=False,
            output_loading_info=True,
        )
    except NotImplementedError as error:
        raise ValueError(f"{path} has weights in a format that cannot be read: {error}") from error
    return model, set(info["missing_keys"])
