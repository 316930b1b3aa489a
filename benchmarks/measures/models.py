"""The models that are timed: ours and stock's with the same weights, and encoders of other kinds."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from measures.texts import BATCH, make_batch
from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.pooling_gemma_encoder import POOLERS
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

NANO = Path(__file__).parents[2] / "examples" / "nano"  # its tokenizer
# The layers of Gemma 3 270M and 1B, and of Gemma 2 2B and 9B. Each is used in both families.
SHAPES = {
    "270m": (640, 2048, 18, 4, 1),
    "1b": (1152, 6912, 26, 4, 1),
    "2b": (2304, 9216, 26, 8, 4),
    "9b": (3584, 14336, 42, 16, 8),
}
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
COMMON = {
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
}
# Encoders that people would use instead, by the shapes of their base models.
PEERS = {
    "ModernBERT-base": ("modernbert", {}),
    "BERT-base": ("bert", {}),
}


@dataclass(frozen=True)
class Case:
    """Hold what is measured: a family of models in a dtype, and the options of the command line."""

    family: str
    dtype: torch.dtype
    options: argparse.Namespace

    def facts(self) -> dict[str, str]:
        """Return the columns of a table that name this case."""
        return {"family": self.family, "dtype": str(self.dtype).removeprefix("torch.")}

    def tokenizer(self):
        """Return the checkpoint's tokenizer, or nano's, with the template of pairs for ranking."""
        tokenizer = AutoTokenizer.from_pretrained(self.options.model or NANO, trust_remote_code=False)
        tokenizer = set_template(tokenizer, pair=RANKING_TEMPLATE)
        tokenizer.padding_side = "right"
        tokenizer.model_max_length = 512
        return tokenizer


def make_config(case: Case, vocab_size: int, dropout: float = 0.0):
    """Return a config of the family with the shape and the number of layers of the options."""
    layers = case.options.layers
    local, full = "sliding_attention", "full_attention"
    if case.family == "gemma2":
        window, kinds = 4096, [local, full]
    else:
        window, kinds = 512, [local] * 5 + [full]
    shape = {**COMMON, **dict(zip(NAMES, SHAPES[case.options.shape], strict=True))}
    shape |= {"sliding_window": window, "num_hidden_layers": layers}
    return AutoConfig.for_model(
        case.family,
        **shape,
        layer_types=(kinds * layers)[:layers],
        vocab_size=vocab_size,
        attention_dropout=dropout,
        num_labels=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def make_stock(case: Case, vocab_size: int, dropout: float):
    """Return stock's classifier in fp32: with the checkpoint's weights, or with random ones."""
    torch.manual_seed(0)
    if case.options.model is None:
        config = make_config(case, vocab_size, dropout)
        config.is_causal = False
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    config = AutoConfig.from_pretrained(case.options.model, trust_remote_code=False)
    config.num_labels, config.attention_dropout, config.is_causal = 1, dropout, False
    return AutoModelForSequenceClassification.from_pretrained(
        case.options.model, config=config, dtype=torch.float32, trust_remote_code=False
    )


def make_models(case: Case, vocab_size: int, folder: Path, dropout: float = 0.0):
    """Save the stock classifier in `folder`; return it, and ours with its weights, head and last
    token."""
    options = case.options
    stock = make_stock(case, vocab_size, dropout)
    stock.to(case.dtype).eval().save_pretrained(folder)
    ours = GemmaEncoderForSequenceClassification.from_pretrained(
        folder,
        pooling="last_k",
        dtype=case.dtype,
        attention_dropout=dropout,
        feedforward_dropout=dropout,
        attn_implementation=options.attn_implementation,
    ).eval()
    ours.classifier = StockHead(stock.score)
    if options.compile_layers:
        for layer in ours.model.layers:
            layer.compile(dynamic=True)
    return stock.to(options.device), ours.to(options.device)


def pool_all(model: GemmaEncoderForSequenceClassification) -> GemmaEncoderForSequenceClassification:
    """Return the model with the default pooling, the mean over all tokens."""
    model.pooler = POOLERS["mean"](model.config)
    return model


def make_peer(name: str, lengths: list[int], case: Case) -> Callable[[], None]:
    """Return a function that runs a peer's shape, with random weights, over texts of these
    lengths."""
    kind, fields = PEERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_labels=1, **fields)
    model = AutoModelForSequenceClassification.from_config(config, dtype=case.dtype).eval().to(case.options.device)
    longest_first = np.sort(np.minimum(lengths, 512))[::-1]
    batches = [make_batch(longest_first[i : i + BATCH], case.options.device) for i in range(0, len(lengths), BATCH)]

    @torch.no_grad()
    def run():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    return run


class StockHead(nn.Module):
    """Apply the linear head of stock, so that scores can be compared; ours begins with a norm."""

    def __init__(self, score: nn.Linear):
        super().__init__()
        self.score = score

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits in fp32, (batch, 1)."""
        return self.score(states.to(self.score.weight.dtype)).float()
