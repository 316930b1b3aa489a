r"""Measure how fast an encoder scores and trains, beside stock transformers with the same weights.

    python benchmarks/speed.py --model gemma-3-270m         # after `make gemma`; tables, JSON, plot
    python benchmarks/speed.py                              # random weights of the same shape
    python benchmarks/speed.py --quick                      # four layers, fewer pairs, no peers
    python benchmarks/speed.py --only scoring --families gemma2 --layers 6 --dtypes bfloat16
    python benchmarks/speed.py --device cuda --shape 2b --families gemma2 --dtypes bfloat16 \
        --pairs 1000 --attn_implementation gemma_encoder_fused --compile_layers

scoring: `score_pairs` with mean pooling against `Gemma*ForSequenceClassification` with
`is_causal=False` in batches of 32. Stock runs twice: through `CrossEncoder.predict` of
sentence-transformers, which sorts the pairs by length, and in the order of the input. Beside them
encoders of the shapes of ModernBERT-base and BERT-base with random weights, on texts of the same
lengths, in padded batches of 32 sorted by length.

others: the same on a quarter of the pairs, in the last dtype, against stock under `torch.compile`
and against a causal decoder that scores by the logit of one word. The decoder computes the logits
of the whole vocabulary, as FlagEmbedding's LLM rerankers do.

training: a step of AdamW as the Trainer makes it, on the same texts for both.

short: such a step on 16 texts of 12 tokens, beside the matrix products and a pass of AdamW over
the weights that are trained.

growth: the time of scoring more and more passages.

The yardstick ("products") is the time of the matrix products of the layers' weights over the real
tokens, and of nothing else. Scores are compared before anything is timed, with last-token pooling,
which is stock's. All variants run in turn in each round, except in "short", where the yardstick
runs after the steps, because both would hold gradients. Ratios are medians over the rounds. Let
nothing else run at the same time.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers
from matplotlib.figure import Figure
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, quantize_int8
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.callbacks import keep_freed_memory
from modeling_gemma_encoder.pooling_gemma_encoder import POOLERS
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16
from modeling_gemma_encoder.pretraining.corpus import docstrings
from modeling_gemma_encoder.ranking.scoring import score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

NANO = Path(__file__).parent.parent / "examples" / "nano"  # its tokenizer
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
# Deciles of token counts with Gemma 3's tokenizer: TREC DL 2020's judged pairs, and QNLI's.
PASSAGES = (22, 56, 64, 70, 75, 80, 87, 96, 113, 136, 445)
SENTENCES = (19, 35, 40, 45, 48, 52, 57, 62, 69, 81, 242)
SHORT = (12,) * 11  # as SST-2's and CoLA's are in the mean
BATCH = 32
SHORT_BATCH = 16
# Encoders that people would use instead, by the shapes of their base models.
PEERS = {
    "ModernBERT-base": ("modernbert", {}),
    "BERT-base": ("bert", {}),
}
DECODER_BATCH = 8  # the logits of the whole vocabulary take much memory

Pairs = list[tuple[str, str]]
Ways = dict[str, Callable[[], object]]  # what is timed, by its name in the results


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


# 1. Texts and models


def draw_lengths(deciles: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """Return `count` token counts, drawn from the distribution with these deciles."""
    shares = np.random.default_rng(seed).random(count)
    return np.interp(shares, np.linspace(0, 1, len(deciles)), deciles).astype(int)


@cache
def read_text() -> str:
    """Return the documentation strings of huggingface_hub as one text."""
    return " ".join(found.text for found in docstrings("huggingface_hub"))


def make_pairs(tokenizer, count: int, seed: int = 0) -> Pairs:
    """Return one query with `count` passages as long as TREC DL's, cut from `read_text`."""
    query = "how does the garbage collector find cycles"
    taken = len(tokenizer(query, "")["input_ids"])
    sizes, rng = draw_lengths(PASSAGES, count, seed), np.random.default_rng(seed)
    ids = tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = rng.integers(0, len(ids) - 500, size=count)
    spans = [ids[i : i + max(1, n - taken)] for i, n in zip(starts, sizes, strict=True)]
    return [(query, tokenizer.decode(span)) for span in spans]


def count_tokens(tokenizer, pairs: Pairs) -> list[int]:
    """Return the number of tokens of each pair, without padding."""
    return list(map(len, tokenizer(*zip(*pairs, strict=True))["input_ids"]))


def count_padded(lengths: list[int]) -> int:
    """Return the number of tokens of padded batches, sorted by length, with their padding."""
    longest_first = sorted(lengths, reverse=True)
    batches = [longest_first[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    return sum(len(batch) * batch[0] for batch in batches)


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


# 2. The yardstick, and how everything is timed


def layer_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of all linear layers within the transformer layers."""
    linear = (part for part in model.model.layers.modules() if isinstance(part, nn.Linear))
    return [part.weight.detach() for part in linear]


def make_products(weights: list[torch.Tensor], tokens: int, at_once: int, backward: bool = False) -> Callable[[], None]:
    """Return a function that computes the matrix products of the weights over so many tokens.

    Args:
        at_once: The tokens of one product.
        backward: Compute also the two products of the backward pass.
    """
    sizes = [min(at_once, tokens - start) for start in range(0, tokens, at_once)]
    states = {w.shape[1]: torch.randn(at_once, w.shape[1]).to(w) for w in weights}
    gradients = {w.shape[0]: torch.randn(at_once, w.shape[0]).to(w) for w in weights}

    @torch.no_grad()
    def multiply():
        for size in sizes:
            for weight in weights:
                x = states[weight.shape[1]][:size]
                nn.functional.linear(x, weight)
                if backward:
                    g = gradients[weight.shape[0]][:size]
                    g @ weight
                    g.T @ x

    return multiply


def take_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after one round that does not count."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return how many times as long `slow` takes as `fast`, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


# 3. Scoring


@torch.no_grad()
def score_in_order(model, tokenizer, pairs: Pairs, size: int, word: int | None = None):
    """Return the scores of pairs, (num_pairs,), from padded batches in the order of the pairs.

    Args:
        size: The pairs of a batch.
        word: Score by a decoder's logit of this token after the last one, not by a classifier.
    """
    scores = []
    for start in range(0, len(pairs), size):
        texts = zip(*pairs[start : start + size], strict=True)
        batch = tokenizer(*texts, padding=True, return_tensors="pt").to(model.device)
        logits = model(**batch).logits  # (batch, 1), or (batch, seq_len, vocabulary)
        if word is not None:
            ends = batch["attention_mask"].sum(1) - 1
            logits = logits[torch.arange(len(ends)), ends][:, [word]]  # (batch, 1)
        scores.append(logits[:, 0].float())
    return torch.cat(scores).cpu().numpy()


def compare(ways: Ways, names: list[str]) -> tuple[np.ndarray, float]:
    """Return our scores, and the largest difference between them and those of the named ways."""
    ours = np.asarray(ways["ours"](), dtype=np.float32)
    scores = [np.asarray(ways[name](), dtype=np.float32) for name in names]
    return ours, max(float(np.abs(ours - other).max()) for other in scores)


def scoring_ways(case: Case, tokenizer, pairs: Pairs) -> tuple[Ways, float, float]:
    """Return the ways of scoring that are timed, the largest difference of scores, and the largest
    score."""
    options, lengths = case.options, count_tokens(tokenizer, pairs)
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(case, len(tokenizer), Path(folder))
        tokenizer.save_pretrained(folder)
        peer = CrossEncoder(
            folder,
            model_kwargs={"dtype": case.dtype},
            activation_fn=nn.Identity(),
            device=options.device,
        )
    rounded = quantize_int8(copy.deepcopy(ours))
    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock sorted": lambda: peer.predict(pairs, batch_size=BATCH, show_progress_bar=False),
        "stock unsorted": lambda: score_in_order(stock, tokenizer, pairs, BATCH),
        "ours, int8": lambda: score_pairs(rounded, tokenizer, pairs),
        "products": make_products(layer_weights(ours), sum(lengths), min(sum(lengths), 4096)),
    }
    scores, difference = compare(ways, ["stock sorted", "stock unsorted"])
    for model in (ours, rounded):
        pool_all(model)
    if options.layers == SHAPES[options.shape][2]:  # fewer layers of ours would not compare with all of theirs
        ways |= {name: make_peer(name, lengths, case) for name in PEERS}
    return ways, difference, float(np.abs(scores).max())


def measure_scoring(case: Case) -> dict:
    """Return the row of a case in the table of scoring."""
    options, tokenizer = case.options, case.tokenizer()
    pairs = make_pairs(tokenizer, options.pairs, options.seed)
    ways, difference, largest = scoring_ways(case, tokenizer, pairs)
    correlation = float(np.corrcoef(ways["ours"](), ways["ours, int8"]())[0, 1])
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "pairs": len(pairs),
        "tokens": sum(count_tokens(tokenizer, pairs)),
        "padded tokens, sorted": count_padded(count_tokens(tokenizer, pairs)),
        "largest difference of scores": difference,
        "largest score": largest,
        "pairs/s": len(pairs) / statistics.median(seconds["ours"]),
        "x stock sorted": ratio(seconds, "stock sorted", "ours"),
        "x stock unsorted": ratio(seconds, "stock unsorted", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        **{f"{name} / ours": ratio(seconds, name, "ours") if name in ways else None for name in PEERS},
        "int8 x ours": ratio(seconds, "ours", "ours, int8"),
        "correlation of int8": correlation,
        "seconds": seconds,
    }


def other_ways(case: Case, tokenizer, pairs: Pairs) -> Ways:
    """Return the ways of scoring by stock, stock compiled and the head of a language model."""
    options = case.options
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(case, options.vocab_size, Path(folder))
    torch.manual_seed(0)
    if options.model:
        decoder = AutoModelForCausalLM.from_pretrained(options.model, dtype=case.dtype, trust_remote_code=False)
    else:
        decoder = AutoModelForCausalLM.from_config(make_config(case, options.vocab_size), dtype=case.dtype)
    decoder.eval().to(options.device)
    word = tokenizer.convert_tokens_to_ids("▁yes")
    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock": lambda: score_in_order(stock, tokenizer, pairs, BATCH),
        "LM head": lambda: score_in_order(decoder, tokenizer, pairs, DECODER_BATCH, word),
    }
    if shutil.which("g++") or shutil.which("clang++"):  # inductor needs a compiler
        compiled = torch.compile(stock, dynamic=True)
        ways["stock compiled"] = lambda: score_in_order(compiled, tokenizer, pairs, BATCH)
    return ways


def measure_others(case: Case) -> dict:
    """Return the row of a case in the table of other ways, with the pairs sorted by length."""
    options, tokenizer = case.options, case.tokenizer()
    pairs = make_pairs(tokenizer, max(8, options.pairs // 4), options.seed)
    pairs.sort(key=lambda pair: -len(tokenizer(*pair)["input_ids"]))
    ways = other_ways(case, tokenizer, pairs)
    compiled = "stock compiled" in ways
    # The scores of the language model's head are not comparable.
    _, difference = compare(ways, [name for name in ways if name not in ("ours", "LM head")])
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "pairs": len(pairs),
        "largest difference of scores": difference,
        "x stock": ratio(seconds, "stock", "ours"),
        "x stock compiled": ratio(seconds, "stock compiled", "ours") if compiled else None,
        "x LM head": ratio(seconds, "LM head", "ours"),
        "seconds": seconds,
    }


# 4. Training


def make_batch(sizes: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    """Return a padded batch of random tokens and labels, with texts of these token counts."""
    shape = (len(sizes), int(sizes.max()))  # (batch, seq_len)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, size in enumerate(sizes):
        values = np.random.default_rng(row).integers(5, 8000, size=size)
        ids[row, :size], mask[row, :size] = torch.tensor(values), 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randn(len(sizes))}
    return {name: values.to(device) for name, values in batch.items()}


def make_step(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> Callable[[], None]:
    """Return a function that takes a training step as the Trainer does, in bf16 by autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step():
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(case: Case) -> dict:
    """Return the row of a case in the table of training. Weights are in fp32 in both dtypes."""
    options = case.options
    sizes = np.minimum(draw_lengths(SENTENCES, BATCH, options.seed), 256)
    stock, ours, batch, products = prepare_training(case, sizes)
    bf16 = case.dtype == torch.bfloat16
    ways = {"ours": make_step(ours, batch, bf16), "stock": make_step(stock, batch, bf16), "products": products}
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "texts": BATCH,
        "tokens": int(sizes.sum()),
        "padded tokens": int(BATCH * sizes.max()),
        "steps/s": 1 / statistics.median(seconds["ours"]),
        "x stock": ratio(seconds, "stock", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        "seconds": seconds,
    }


def measure_short(case: Case) -> dict:
    """Return the row of a case in the table of short texts, where the optimizer costs as much as
    the layers."""
    sizes = draw_lengths(SHORT, SHORT_BATCH, case.options.seed)
    _, ours, batch, products = prepare_training(case, sizes)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-5, fused=True)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in ours.parameters():
        parameter.grad = None  # those of the step that is measured are its own

    def least():
        for parameter in ours.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        products()
        optimizer.step()

    seconds = take_turns({"ours": make_step(ours, batch, case.dtype == torch.bfloat16)}, case.options.rounds)
    seconds |= take_turns({"least": least}, case.options.rounds)
    return {
        **case.facts(),
        "texts": SHORT_BATCH,
        "tokens": int(sizes.sum()),
        "steps/s": 1 / statistics.median(seconds["ours"]),
        "ours / least": ratio(seconds, "ours", "least"),
        "seconds": seconds,
    }


def prepare_training(case: Case, sizes: np.ndarray):
    """Return stock's model and ours, with dropout, a batch of texts of these token counts, and the
    yardstick."""
    options, tokens = case.options, int(sizes.sum())
    if options.keep_memory:
        keep_freed_memory()  # for all ways, as the `KeepMemory` callback does
    with tempfile.TemporaryDirectory() as folder:
        in_fp32 = replace(case, dtype=torch.float32)
        stock, ours = make_models(in_fp32, options.vocab_size, Path(folder), dropout=0.1)
    weights = [weight.to(case.dtype) for weight in layer_weights(ours)]
    products = make_products(weights, tokens, tokens, backward=True)
    return stock, pool_all(ours), make_batch(sizes, options.device), products


# 5. Growth


def measure_growth(options: argparse.Namespace) -> dict[str, list]:
    """Return the pairs, the tokens and the seconds of scoring more and more passages in fp32."""
    case = Case(options.families[-1], torch.float32, options)
    tokenizer = case.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        _, ours = make_models(case, len(tokenizer), Path(folder))
    pool_all(ours)
    counts = [options.pairs // 4, options.pairs // 2, options.pairs]
    if not options.quick:
        counts += [2 * options.pairs, 4 * options.pairs]
    pairs = make_pairs(tokenizer, counts[-1], options.seed)
    ways = {n: (lambda n=n: score_pairs(ours, tokenizer, pairs[:n])) for n in counts}
    seconds = take_turns(ways, max(2, options.rounds // 2))
    return {
        "pairs": counts,
        "tokens": [sum(count_tokens(tokenizer, pairs[:count])) for count in counts],
        "seconds": [statistics.median(seconds[count]) for count in counts],
    }


def plot_growth(growth: dict[str, list], path: Path) -> None:
    """Save a plot of seconds over tokens, beside a line for time that grows in proportion."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tokens, seconds = growth["tokens"], growth["seconds"]
    axes.plot(tokens, seconds, "o-", label="scoring, measured")
    axes.plot([0, tokens[-1]], [0, seconds[-1]], color="silver", label="linear")
    axes.set(xlabel="real tokens", ylabel="seconds", title="Time grows with the tokens")
    axes.legend()
    figure.savefig(path, dpi=120)


# 6. The command line and the report

TABLES = {
    "scoring": measure_scoring,
    "others": measure_others,
    "training": measure_training,
    "short": measure_short,
}
COLUMNS = {
    "scoring": [
        "pairs/s",
        "x stock sorted",
        "x stock unsorted",
        "products / ours",
        *(f"{name} / ours" for name in PEERS),
        "int8 x ours",
    ],
    "others": ["x stock", "x stock compiled", "x LM head"],
    "training": ["steps/s", "x stock", "products / ours"],
    "short": ["steps/s", "ours / least"],
}
FAMILIES = ("gemma2", "gemma3_text")
# Defaults without and with --quick.
DEFAULTS = {"rounds": (3, 1), "pairs": (40, 12), "vocab_size": (262144, 8192), "families": (["gemma3_text"],) * 2}
QUICK_LAYERS = 4


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, parts = parser.add_argument, [*TABLES, "growth"]
    add("--only", nargs="+", choices=parts, default=parts)
    add("--model", help="A checkpoint of Gemma 2 or 3. Default: random weights of --shape.")
    add("--families", nargs="+", choices=FAMILIES, help="Of random weights. Default: gemma3_text.")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="Default: those the device computes in.")
    add("--shape", choices=SHAPES, default="270m")
    add("--layers", type=int, help="Of random weights. Default: all of the shape's; 4 with --quick.")
    add("--device", default="cpu")
    add("--attn_implementation", help="Attention of our model. Default: the model's own choice.")
    add("--pairs", type=int, help="Default: 40; 12 with --quick.")
    add("--rounds", type=int, help="Default: 3; 1 with --quick.")
    add("--vocab_size", type=int, help="Of random weights in others and training. Default: 262144; 8192 with --quick.")
    add("--compile_layers", action="store_true", help="Compile the layers of our model.")
    add("--keep_memory", action="store_true", help="Keep freed memory in training: with all layers, more than 24 GiB.")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="Measure fewer layers, pairs and rounds.")
    add("--output_dir", type=Path, default=Path("runs/speed"))
    return parser


def fill_defaults(options: argparse.Namespace) -> None:
    """Set the options that are not given and depend on the device or on `--quick`."""
    if options.dtypes is None:
        options.dtypes = ["float32"]
        if computes_in_bf16(options.device):
            options.dtypes.append("bfloat16")
        else:
            print(
                "bf16 is left out: this device has no instructions for it, so that it would be many times slower than "
                "fp32. To measure it all the same, give --dtypes float32 bfloat16."
            )
    if options.model:
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=False)
        options.families, options.layers = [config.model_type], config.num_hidden_layers
    options.layers = options.layers or (QUICK_LAYERS if options.quick else SHAPES[options.shape][2])
    for name, (whole, short) in DEFAULTS.items():
        if not getattr(options, name):
            setattr(options, name, short if options.quick else whole)


def describe_machine(options: argparse.Namespace) -> dict:
    """Return the device, its load, and the versions of the libraries that are measured."""
    return {
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{part.__name__: part.__version__ for part in (torch, transformers, sentence_transformers)},
    }


def measure_table(name: str, options: argparse.Namespace) -> list[dict]:
    """Return the rows of a table, and print each as soon as it is measured."""
    dtypes = options.dtypes[-1:] if name == "others" else options.dtypes
    rows = []
    for family in options.families:
        for dtype in dtypes:
            row = TABLES[name](Case(family, getattr(torch, dtype), options))
            rows.append(row)
            printed = {key: value for key, value in row.items() if key != "seconds"}
            print(json.dumps(printed), flush=True)
    return rows


def markdown(rows: list[dict], columns: list[str]) -> str:
    """Return a table in Markdown. Its first two columns are text, and the others are numbers."""

    def as_text(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for row in rows:
        lines.append(f"| {' | '.join(as_text(row[column]) for column in columns)} |")
    return "\n".join(lines)


def main():
    options = make_parser().parse_args()
    fill_defaults(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    layers, rounds, machine = options.layers, options.rounds, describe_machine(options)
    results = {"command": " ".join(["python", *sys.argv]), "machine": machine}
    results |= {"model": options.model, "layers": layers, "rounds": rounds}
    what = options.model or f"random weights in the shape of {options.shape}"
    title = f"{what}, {layers} layers, {machine}, medians of {rounds} rounds"
    print(title, flush=True)
    report = [title]
    for name in TABLES:
        if name in options.only:
            results[name] = measure_table(name, options)
            write(options.output_dir / "results.json", json.dumps(results, indent=2))
            table = markdown(results[name], ["family", "dtype", *COLUMNS[name]])
            report.append(f"{name}\n\n{table}")
    if "growth" in options.only:
        growth = results["growth"] = measure_growth(options)
        plot_growth(growth, options.output_dir / "growth.png")
        points = zip(*growth.values(), strict=True)
        report.append("\n".join(f"{p} pairs, {t:,} tokens: {s:.2f} s" for p, t, s in points))
    write(options.output_dir / "results.json", json.dumps(results, indent=2))
    write(options.output_dir / "results.md", "\n\n".join(report))
    print("\n" + "\n\n".join(report))


if __name__ == "__main__":
    main()
