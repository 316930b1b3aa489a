"""Reading checkpoints in other ways than as an encoder: tokenizers, upstream's own models, and GGUF
files."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_gemma_encoder import GemmaEncoderConfig
from .gguf_gemma_encoder import find_gguf, hub_options, read_decoder, split_gguf

# Settings of a tokenizer that say how and where it was loaded, and are not to be saved with it.
LOADING = (
    *("gguf_file", "is_local", "local_files_only", "cache_dir", "force_download", "proxies", "token"),
    *("use_auth_token", "name_or_path", "revision", "subfolder", "trust_remote_code", "_commit_hash", "_from_auto"),
)


def load_tokenizer(checkpoint: str | Path, **options) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, a repository or a GGUF file; `options` are those of
    `AutoTokenizer`."""
    source, gguf_file = split_gguf(checkpoint)
    if gguf_file is None:
        return _without_loading(AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **options))
    path = find_gguf(source, gguf_file, hub_options(options))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False, **options)
    tokenizer = _without_loading(tokenizer)
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if _adds_bos(path) and not begins:  # upstream 5.20 leaves it out
        tokenizer.add_bos_token = True
    return tokenizer


def _without_loading(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Remove from a tokenizer how and where it was loaded, and return it."""
    for name in LOADING:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _adds_bos(path: str) -> bool:
    """Return whether texts begin with <bos> by a GGUF file's metadata; by default they do for
    SentencePiece models."""
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(path)
    return metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")


def load_upstream(auto_class: type, checkpoint: str | Path, dtype: torch.dtype, **options) -> PreTrainedModel:
    """Return a model of upstream's own class for `auto_class`, such as `AutoModelForCausalLM`, GGUF
    files included."""
    source, gguf_file = split_gguf(checkpoint)
    options = {name: value for name, value in options.items() if value is not None}
    if gguf_file is None:
        return auto_class.from_pretrained(checkpoint, trust_remote_code=False, dtype=dtype, **options)
    config = GemmaEncoderConfig.from_pretrained(checkpoint).text_config
    weights = read_decoder(source, gguf_file, config, dtype, {}).state_dict()
    config._attn_implementation = options.pop("attn_implementation", None)
    for name, value in options.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config))
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def convert_gguf(checkpoint: str | Path, folder: str | Path, dtype: torch.dtype) -> None:
    """
    Write a GGUF file's decoder and tokenizer into a new folder, as a checkpoint in safetensors.

    Raises:
        ValueError: `checkpoint` is not a GGUF file, or `folder` is not empty.
    """
    folder, (source, gguf_file) = Path(folder), split_gguf(checkpoint)
    if gguf_file is None:
        raise ValueError(f"{checkpoint} is not a GGUF file, whose name ends in .gguf. Name one.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: delete it, or name another.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    config = GemmaEncoderConfig.from_pretrained(checkpoint).text_config
    read_decoder(source, gguf_file, config, dtype, {}).save_pretrained(part)
    load_tokenizer(checkpoint).save_pretrained(part)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def decoder_of(checkpoint: str) -> PreTrainedModel:
    """Build the decoder of a checkpoint by its config, without weights."""
    with torch.device("meta"):
        return AutoModel.from_config(GemmaEncoderConfig.from_pretrained(checkpoint).text_config)


def parameters_of(checkpoint: str) -> int:
    """Return the number of parameters of the decoder, by its config."""
    return decoder_of(checkpoint).num_parameters()
