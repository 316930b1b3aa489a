"""Tiny decoders of every family, two sliding and two full layers where it has both, windows shorter than the texts;
and what several files of tests make of them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from modeling_gemma_encoder import GemmaEncoderConfig

FAMILIES = ("gemma", "gemma2", "gemma3_text", "gemma4_text")
OTHERS = ("llama", "qwen2", "qwen3")  # decoders that are no Gemmas
ATTENTIONS = ("bidirectional", "causal")
UNPADDED, FUSED = "gemma_encoder_unpadded", "gemma_encoder_fused"
WINDOW = 3
ROOT = Path(__file__).parent.parent
NANO = ROOT / "examples" / "nano"  # a small Gemma 2 that has read English

TEMPLATE = ROOT / "model_cards" / "template.md"

# A judged collection.
QUERIES = {"1": "rain in spain", "2": "the sun"}
PASSAGES = {"a": "It rains in Spain.", "b": "The sun is a star.", "c": "Nothing at all.", "d": "Sun and rain."}
QRELS = "1 0 a 2\n1 0 c 0\n2 0 b 1\n2 0 d 0\n"

_SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_OF_FAMILY = {
    "gemma": {},
    "gemma2": {**_ALTERNATE, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_ALTERNATE, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **_ALTERNATE,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
    },
    "llama": {},
    "qwen2": {**_ALTERNATE, "use_sliding_window": True},
    "qwen3": {},
}


def decoder_config(family: str, **fields):
    """A tiny decoder's config, upstream's own class."""
    return AutoConfig.for_model(family, **{**_SHAPE, **_OF_FAMILY[family], **fields})


def encoder_config(family: str = "gemma2", decoder: dict | None = None, **fields) -> GemmaEncoderConfig:
    return GemmaEncoderConfig(text_config=decoder_config(family, **(decoder or {})), **fields)


def build(model_class, config, seed: int = 0):
    """A model in eval mode whose weights are large enough that attention is far from uniform and scores differ."""
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.2 if name.startswith("model.") else 0.5, generator=generator)
        if "norm" in name and config.text_config.model_type in OTHERS:
            parameter.data += 1  # Gemma's norms add it themselves
    return model


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 99, (length,), generator=generator) for length in lengths]


def pad(sequences: list[torch.Tensor], side: str = "right", extra: int = 0, pad_id: int = 0):
    """A padded batch: input_ids and attention_mask (batch, longest + extra)."""
    length = max(len(ids) for ids in sequences) + extra
    input_ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, ids in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        input_ids[row, place], mask[row, place] = ids, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def backends(family: str) -> tuple[str, ...]:
    """What runs on a CPU. Upstream's sdpa refuses Gemma 2's soft-capping."""
    return (
        (UNPADDED, FUSED, "eager", "flex_attention")
        if family == "gemma2"
        else (UNPADDED, FUSED, "eager", "sdpa", "flex_attention")
    )


FAMILY_BACKENDS = [(family, backend) for family in FAMILIES for backend in backends(family)]


def set_backend(model, backend: str):
    if backend == "flex_attention":
        torch._dynamo.reset()  # torch 2.13 fails to compile flex attention for CPU when shapes vary too much
    model.set_attn_implementation(backend)


def jsonl(path: Path, rows: list[dict]):
    """Write rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_collection(folder: Path) -> Path:
    """Write the judged collection as TREC-style files, and return their folder."""
    jsonl(folder / "queries.jsonl", [{"qid": qid, "text": text} for qid, text in QUERIES.items()])
    jsonl(folder / "passages.jsonl", [{"pid": pid, "text": text} for pid, text in PASSAGES.items()])
    (folder / "qrels.txt").write_text(QRELS)
    return folder


def run_here(command: list, **_) -> subprocess.CompletedProcess:
    """Does what `subprocess.run` does with a Python script, without importing everything again."""
    run_script(*command[1:])
    return subprocess.CompletedProcess(command, 0)


def run_script(script: str | Path, *words) -> None:
    """Runs an example as a command line from the root would, in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [*map(str, [script, *words])])
        runpy.run_path(str(script), run_name="__main__")
