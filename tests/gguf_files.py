"""GGUF files written with llama.cpp's own package, as its converter writes them.

https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from pathlib import Path

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def write_gguf(decoder, path: Path, tokenizer=None, kind=F32, leave_out: str | None = None, **metadata) -> Path:
    """
    Write upstream's causal language model to a GGUF file.

    Args:
        kind: How matrices are stored; vectors are in fp32 always.
        leave_out: Begin of the name of tensors that are not written.
        metadata: More keys below the architecture's name, numbers or text, with __ for a dot.
    """
    config = decoder.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_config(writer, config, metadata)
    _write_tokens(writer, config, tokenizer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in decoder.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if leave_out is None or not new.startswith(leave_out):
            values = _as_converted(config, name, tensor.float()).numpy()
            stored = kind if values.ndim > 1 else F32
            writer.add_tensor(new, gguf.quantize(values, stored) if stored != F32 else values, raw_dtype=stored)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_config(writer, config, metadata: dict) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key.replace("__", ".").replace("arch.", f"{writer.arch}."), value)


def _write_tokens(writer, config, tokenizer) -> None:
    """The vocabulary, as of a SentencePiece model: a token's score is minus its place among the merges."""
    if tokenizer is None:
        words, scores = [f"w{number}" for number in range(config.vocab_size)], [0.0] * config.vocab_size
        kinds = [gguf.TokenType.NORMAL] * config.vocab_size
    else:
        import json

        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        place = {"".join(merge): -float(number) for number, merge in reversed(list(enumerate(model["merges"])))}
        words = sorted(model["vocab"], key=model["vocab"].get)
        special, is_byte = set(tokenizer.all_special_tokens), [word.startswith("<0x") for word in words]
        scores = [place.get(word, -1000.0 if word in special else 0.0) for word in words]
        kinds = [
            gguf.TokenType.CONTROL if word in special else gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL
            for word, byte in zip(words, is_byte, strict=True)
        ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for add, number in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
        (writer.add_unk_token_id, None if tokenizer is None else tokenizer.unk_token_id),
    ):
        if number is not None:
            add(number)


def _as_converted(config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Gemma's norms are stored with the 1 that the model adds, Llama's queries and keys with halves interleaved."""
    if config.model_type in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


def _llama3_factors(config) -> np.ndarray:
    """How much longer a wave is than upstream's own without scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / scaled).numpy()
