"""How fast an encoder scores and trains, beside stock transformers with the same weights and inputs, in one run.

    python benchmarks/speed.py                              # 270M-shaped layers on this machine: table, JSON, plots
    python benchmarks/speed.py --quick                      # Gemma 2 alone, fewer layers, pairs and rounds
    python benchmarks/speed.py --only scoring --families gemma2 --dtypes bfloat16
    python benchmarks/speed.py --device cuda --shape 2b --families gemma2 --dtypes bfloat16 --pairs 1000 \
        --attn_implementation gemma_encoder_fused --compile_layers

Peers: `Gemma*ForSequenceClassification` with `is_causal=False` through sentence-transformers' `CrossEncoder.predict`,
which sorts by length, in batches of 32, and in batches as they come; its training step as the Trainer makes it. Others,
on a quarter of the pairs in the last dtype: the same model under `torch.compile`, and a causal decoder that is asked
for its logit of a word, over the whole vocabulary, as FlagEmbedding's LLM rerankers do. The yardstick is the time of
the layers' matrix products over the real tokens, nothing else. Scores are compared before anything is timed. All take
turns, round after round; ratios are medians over the rounds. Run it alone.
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
from functools import cache
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers
from matplotlib.figure import Figure
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, quantize_int8
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.callbacks import keep_freed_memory
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16
from modeling_gemma_encoder.pretraining.corpus import docstrings
from modeling_gemma_encoder.ranking.scoring import score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

NANO = Path(__file__).parent.parent / "examples" / "nano"  # its tokenizer
# The layers of Gemma 3 270M and 1B, and of Gemma 2 2B and 9B, each in both families: hidden and intermediate size,
# layers, heads, and heads of keys.
SHAPES = {
    **{"270m": (640, 2048, 18, 4, 1), "1b": (1152, 6912, 26, 4, 1)},
    **{"2b": (2304, 9216, 26, 8, 4), "9b": (3584, 14336, 42, 16, 8)},
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COMMON = {"head_dim": 256, "sliding_window": 512, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256}
# Deciles of token counts with nano's tokenizer: TREC DL 2020's judged pairs, and QNLI's.
PASSAGES = (26, 77, 87, 95, 102, 109, 117, 132, 156, 184, 393)
SENTENCES = (23, 48, 56, 61, 67, 72, 78, 86, 96, 113, 461)
BATCH = 32
SCORING = ["family", "dtype", "pairs/s", "x stock sorted", "x stock unsorted"]


# 1. What is measured


def lengths(deciles: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    shares = np.random.default_rng(seed).random(count)
    return np.interp(shares, np.linspace(0, 1, len(deciles)), deciles).astype(int)


@cache
def read_text() -> str:
    return " ".join(found.text for found in docstrings("huggingface_hub"))


def make_pairs(tokenizer, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """One query and `count` passages as long as TREC DL's, cut from documentation strings."""
    query = "how does the garbage collector find cycles"
    taken = len(tokenizer(query, "")["input_ids"])
    sizes, rng = lengths(PASSAGES, count, seed), np.random.default_rng(seed)
    ids = tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = rng.integers(0, len(ids) - 500, size=count)
    texts = [tokenizer.decode(ids[i : i + max(1, n - taken)]) for i, n in zip(starts, sizes, strict=True)]
    return [(query, text) for text in texts]


def make_config(family: str, options, vocab_size: int, dropout: float = 0.0):
    layers, window = options.layers, 4096 if family == "gemma2" else 512
    local, full = "sliding_attention", "full_attention"
    kinds = [local, full] if family == "gemma2" else [local] * 5 + [full]
    shape = {**COMMON, **dict(zip(NAMES, SHAPES[options.shape], strict=True)), "sliding_window": window}
    shape |= {"num_hidden_layers": layers, "vocab_size": vocab_size, "attention_dropout": dropout}
    return AutoConfig.for_model(
        family, **shape, layer_types=(kinds * layers)[:layers], num_labels=1, pad_token_id=0, tie_word_embeddings=True
    )


def make_models(family: str, options, dtype: torch.dtype, vocab_size: int, folder: Path, dropout: float = 0.0):
    """The stock classifier, saved in `folder`, and ours with its weights, its pooling and its head."""
    torch.manual_seed(0)
    config = make_config(family, options, vocab_size, dropout)
    config.is_causal = False
    stock = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    stock.to(dtype).eval().save_pretrained(folder)
    ours = GemmaEncoderForSequenceClassification.from_pretrained(
        folder,
        pooling="last_k",
        dtype=dtype,
        attention_dropout=dropout,
        feedforward_dropout=dropout,
        attn_implementation=options.attn_implementation,
    ).eval()
    ours.classifier = StockHead(stock.score)
    if options.compile_layers:
        for layer in ours.model.layers:
            layer.compile(dynamic=True)
    return stock.to(options.device), ours.to(options.device)


class StockHead(nn.Module):
    """One linear layer, so that scores can be compared; ours begins with a norm."""

    def __init__(self, score: nn.Linear):
        super().__init__()
        self.score = score

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.score(states.to(self.score.weight.dtype)).float()


def products(model: nn.Module, tokens: int, at_once: int, backward: bool = False) -> Callable[[], None]:
    """The layers' matrix products over this many tokens, as a batch has them, and of the backward pass too."""
    linear = [module.weight.detach() for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    sizes = [at_once] * (tokens // at_once) + [tokens % at_once] * (tokens % at_once > 0)
    states = {w.shape[1]: torch.randn(at_once, w.shape[1]).to(w) for w in linear}
    gradients = {w.shape[0]: torch.randn(at_once, w.shape[0]).to(w) for w in linear}

    @torch.no_grad()
    def run():
        for size in sizes:
            for weight in linear:
                x = states[weight.shape[1]][:size]
                nn.functional.linear(x, weight)
                if backward:
                    g = gradients[weight.shape[0]][:size]
                    g @ weight
                    g.T @ x

    return run


# 2. How it is timed


def take_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that does not count."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


# 3. The tables


def make_tokenizer():
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO, trust_remote_code=False), pair=RANKING_TEMPLATE)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 512
    return tokenizer


def scoring(family: str, dtype: torch.dtype, options) -> dict:
    tokenizer = make_tokenizer()
    pairs = make_pairs(tokenizer, options.pairs, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(family, options, dtype, len(tokenizer), Path(folder))
        tokenizer.save_pretrained(folder)
        peer = CrossEncoder(folder, model_kwargs={"dtype": dtype}, activation_fn=nn.Identity(), device=options.device)
    size = BATCH

    @torch.no_grad()
    def unsorted() -> np.ndarray:
        found = []
        for start in range(0, len(pairs), size):
            batch = tokenizer(*zip(*pairs[start : start + size], strict=True), padding=True, return_tensors="pt")
            found.append(stock(**batch.to(options.device)).logits[:, 0].float())
        return torch.cat(found).cpu().numpy()

    rounded = quantize_int8(copy.deepcopy(ours))
    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock sorted": lambda: peer.predict(pairs, batch_size=size, show_progress_bar=False),
        "stock unsorted": unsorted,
    }
    scores = {name: np.asarray(run(), dtype=np.float32) for name, run in ways.items()}
    ways["ours, int8"] = lambda: score_pairs(rounded, tokenizer, pairs)
    tokens = sum(len(ids) for ids in tokenizer(*zip(*pairs, strict=True))["input_ids"])
    ways["products"] = products(ours, tokens, min(tokens, 4096))
    seconds = take_turns(ways, options.rounds)
    return {
        **{"family": family, "dtype": str(dtype).removeprefix("torch."), "pairs": len(pairs), "tokens": tokens},
        "largest difference of scores": max(float(np.abs(scores["ours"] - other).max()) for other in scores.values()),
        "largest score": float(np.abs(scores["ours"]).max()),
        "pairs/s": len(pairs) / statistics.median(seconds["ours"]),
        "x stock sorted": ratio(seconds, "stock sorted", "ours"),
        "x stock unsorted": ratio(seconds, "stock unsorted", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        "int8 x ours": ratio(seconds, "ours", "ours, int8"),
        "correlation of int8": float(np.corrcoef(scores["ours"], ways["ours, int8"]())[0, 1]),
        "seconds": seconds,
    }


def others(family: str, dtype: torch.dtype, options) -> dict:
    """Stock as it is and compiled, and the language model's head; batches of 8 and 32, sorted by length."""
    tokenizer = make_tokenizer()
    pairs = make_pairs(tokenizer, max(8, options.pairs // 4), options.seed)
    pairs.sort(key=lambda pair: -len(tokenizer(*pair)["input_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(family, options, dtype, options.vocab_size, Path(folder))
    torch.manual_seed(0)
    config = make_config(family, options, options.vocab_size)
    decoder = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(options.device)
    word = tokenizer.convert_tokens_to_ids("▁yes")

    @torch.no_grad()
    def score(model: Callable, size: int, last: bool = False) -> np.ndarray:
        found = []
        for start in range(0, len(pairs), size):
            batch = tokenizer(*zip(*pairs[start : start + size], strict=True), padding=True, return_tensors="pt")
            logits = model(**batch.to(options.device)).logits
            if last:
                ends = batch["attention_mask"].sum(1) - 1
                logits = logits[torch.arange(len(ends)), ends][:, [word]]
            found.append(logits[:, 0].float())
        return torch.cat(found).cpu().numpy()

    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock": lambda: score(stock, BATCH),
        "LM head": lambda: score(decoder, 8, last=True),
    }
    if shutil.which("g++") or shutil.which("clang++"):
        compiled = torch.compile(stock, dynamic=True)
        ways["stock compiled"] = lambda: score(compiled, BATCH)
    scores = {name: run() for name, run in ways.items() if name != "LM head"}
    seconds = take_turns(ways, options.rounds)
    return {
        **{"family": family, "dtype": str(dtype).removeprefix("torch."), "pairs": len(pairs)},
        "largest difference of scores": max(float(np.abs(scores["ours"] - other).max()) for other in scores.values()),
        "x stock": ratio(seconds, "stock", "ours"),
        "x stock compiled": ratio(seconds, "stock compiled", "ours") if "stock compiled" in ways else None,
        "x LM head": ratio(seconds, "LM head", "ours"),
        "seconds": seconds,
    }


def training(family: str, dtype: torch.dtype, options) -> dict:
    """fp32 weights; with bfloat16, autocast, as `--bf16` does; freed memory kept for all, as `KeepMemory` does."""
    if not options.give_memory_back:
        keep_freed_memory()
    sizes = np.minimum(lengths(SENTENCES, BATCH, options.seed), 256)
    ids = [np.random.default_rng(n).integers(5, 8000, size=size) for n, size in enumerate(sizes)]
    batch = {name: torch.zeros(BATCH, int(sizes.max()), dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for row, values in enumerate(ids):
        batch["input_ids"][row, : len(values)], batch["attention_mask"][row, : len(values)] = torch.tensor(values), 1
    batch = {name: values.to(options.device) for name, values in batch.items()}
    labels, kind = torch.randn(BATCH, device=options.device), torch.device(options.device).type
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(family, options, torch.float32, options.vocab_size, Path(folder), dropout=0.1)

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        model.train()

        def run():
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    tokens = int(sizes.sum())
    in_dtype = [module.weight.to(dtype) for module in ours.model.layers.modules() if isinstance(module, nn.Linear)]
    bare = nn.Module()
    bare.model = nn.Module()
    bare.model.layers = nn.ModuleList(Weight(weight) for weight in in_dtype)
    ways = {"ours": step(ours), "stock": step(stock), "products": products(bare, tokens, tokens, backward=True)}
    seconds = take_turns(ways, options.rounds)
    return {
        **{"family": family, "dtype": str(dtype).removeprefix("torch."), "texts": BATCH, "tokens": tokens},
        "padded tokens": int(BATCH * sizes.max()),
        "steps/s": 1 / statistics.median(seconds["ours"]),
        "x stock": ratio(seconds, "stock", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        "seconds": seconds,
    }


class Weight(nn.Linear):
    """A linear layer of this weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(1, 1, bias=False)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)


def growth(options) -> dict:
    """Seconds of scoring more and more passages; linear is as it should be."""
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        _, ours = make_models("gemma3_text", options, torch.float32, len(tokenizer), Path(folder))
    counts = [options.pairs // 4, options.pairs // 2, options.pairs]
    counts += [] if options.quick else [2 * options.pairs, 4 * options.pairs]
    pairs = make_pairs(tokenizer, counts[-1], options.seed)
    tokens = [sum(map(len, tokenizer(*zip(*pairs[:count], strict=True))["input_ids"])) for count in counts]
    ways = {str(count): (lambda count=count: score_pairs(ours, tokenizer, pairs[:count])) for count in counts}
    seconds = take_turns(ways, max(2, options.rounds // 2))
    return {"pairs": counts, "tokens": tokens, "seconds": [statistics.median(seconds[str(count)]) for count in counts]}


def table(rows: list[dict], columns: list[str]) -> str:
    def shown(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    return "\n".join([*lines, *(f"| {' | '.join(shown(row[column]) for column in columns)} |" for row in rows)])


def plot(found: dict, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tokens, seconds = found["tokens"], found["seconds"]
    axes.plot(tokens, seconds, "o-", label="scoring, measured")
    axes.plot([0, tokens[-1]], [0, seconds[-1]], color="silver", label="linear")
    axes.set(xlabel="real tokens", ylabel="seconds", title="Time grows with the tokens")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["scoring", "others", "training", "growth"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--families", nargs="+", help="Default: gemma2 and gemma3_text; gemma2 with --quick.")
    parser.add_argument("--dtypes", nargs="+", help="Default: float32, and bfloat16 where the device computes in it.")
    parser.add_argument("--shape", choices=SHAPES, default="270m")
    parser.add_argument("--layers", type=int, default=None, help="Default: 6, 2 with --quick, all on an accelerator.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attn_implementation", default=None, help="Of ours. Default: as users have it.")
    parser.add_argument("--pairs", type=int, default=None, help="Default: 100; 48 with --quick.")
    parser.add_argument("--rounds", type=int, default=None, help="Default: 5; 2 with --quick.")
    parser.add_argument("--vocab_size", type=int, default=None, help="Of training. Default: 262144; 8192 with --quick.")
    parser.add_argument("--compile_layers", action="store_true", help="Ours; with gemma_encoder_fused on a GPU.")
    parser.add_argument("--give_memory_back", action="store_true", help="In training, as the allocator does by itself.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/speed"))
    options = parser.parse_args()
    if options.dtypes is None:
        options.dtypes = ["float32", "bfloat16"] if computes_in_bf16(options.device) else ["float32"]
        if len(options.dtypes) == 1:
            print("No bf16: this device has no instructions for it. --dtypes float32 bfloat16 insists.")
    if options.device != "cpu" and not options.quick:
        options.layers = options.layers or SHAPES[options.shape][2]
    quick = {"layers": (6, 2), "rounds": (5, 2), "pairs": (100, 48), "vocab_size": (262144, 8192)}
    quick["families"] = (["gemma2", "gemma3_text"], ["gemma2"])
    for name, (whole, short) in quick.items():
        setattr(options, name, getattr(options, name) or (short if options.quick else whole))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{module.__name__: module.__version__ for module in (torch, transformers, sentence_transformers)},
    }
    found = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine,
        "layers": options.layers,
        "rounds": options.rounds,
    }
    report = [f"{options.layers} layers of the shape of {options.shape}, {machine}, medians of {options.rounds} rounds"]
    for name, measure, columns in (
        ("scoring", scoring, [*SCORING, "products / ours", "int8 x ours"]),
        ("others", others, ["family", "dtype", "x stock", "x stock compiled", "x LM head"]),
        ("training", training, ["family", "dtype", "steps/s", "x stock", "products / ours"]),
    ):
        if name in options.only:
            found[name] = []
            for family in options.families:
                for dtype in options.dtypes[-1:] if name == "others" else options.dtypes:
                    found[name].append(measure(family, getattr(torch, dtype), options))
                    print(
                        json.dumps({key: value for key, value in found[name][-1].items() if key != "seconds"}),
                        flush=True,
                    )
            report.append(f"{name}\n\n{table(found[name], columns)}")
    if "growth" in options.only:
        found["growth"] = growth(options)
        plot(found["growth"], options.output_dir / "growth.png")
        report.append(
            "\n".join(f"{p} pairs, {t:,} tokens: {s:.2f} s" for p, t, s in zip(*found["growth"].values(), strict=True))
        )
    write(options.output_dir / "results.json", json.dumps(found, indent=2))
    write(options.output_dir / "results.md", "\n\n".join(report))
    print("\n" + "\n\n".join(report))


if __name__ == "__main__":
    main()
