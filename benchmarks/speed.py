r"""Measure how fast an encoder scores and trains, beside stock transformers with the same weights.

    python benchmarks/speed.py                              # tables, JSON, plot
    python benchmarks/speed.py --model my-gemma             # of another checkpoint
    python benchmarks/speed.py --quick                      # four layers, fewer pairs, no peers
    python benchmarks/speed.py --only scoring --lengths mixed --families gemma2 --dtypes bfloat16
    python benchmarks/speed.py --device cuda --shape 2b --families gemma2 --dtypes bfloat16 \
        --pairs 1000 --attn_implementation gemma_encoder_fused --compile_layers

The model is Gemma 3 270M if `make gemma` has made its folder, and else random weights of that shape,
as with --quick, --families, --layers or --shape. The report says which.

scoring: `score_pairs` with mean pooling against `Gemma*ForSequenceClassification` with
`is_causal=False` in batches of 32. Stock runs twice: through `CrossEncoder.predict` of
sentence-transformers, which sorts the pairs by length, and in the order of the input. Beside them
encoders of the shapes of ModernBERT-base and BERT-base with random weights, on texts of the same
lengths, in padded batches of 32 sorted by length. `--lengths alike` has those of one query's
passages, at most 121 tokens. `mixed` has those of many queries, up to 445 tokens, so that more of a
padded batch is padding.

others: the same on a quarter of the pairs, in the last dtype, against stock under `torch.compile`
and against a causal decoder that scores by the logit of one word. The decoder computes the logits
of the whole vocabulary, as FlagEmbedding's LLM rerankers do.

training: a step of AdamW as the Trainer makes it, on the same 32 texts for both, of 60 tokens in the
mean, or of QNLI's lengths with `--lengths mixed`.

short: such a step on 16 texts of 12 tokens, beside the matrix products and a pass of AdamW over
the weights that are trained.

growth: the time of scoring more and more passages.

start: the seconds until `examples/rerank.py` prints its first score.

The yardstick ("products") is the time of the matrix products of the layers' weights over the real
tokens, and of nothing else. Scores are compared before anything is timed, with last-token pooling,
which is stock's. All variants run in turn in each round, except in "short", where the yardstick
runs after the steps, because both would hold gradients. Ratios are medians over the rounds. Let
nothing else run at the same time.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import sentence_transformers
import torch
import transformers
from matplotlib.figure import Figure
from measures.models import PEERS, SHAPES, Case
from measures.scoring import measure_growth, measure_others, measure_scoring
from measures.starting import measure_start
from measures.texts import PASSAGES
from measures.training import measure_short, measure_training
from transformers import AutoConfig

from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16

TABLES = {
    "scoring": measure_scoring,
    "others": measure_others,
    "training": measure_training,
    "short": measure_short,
}
COLUMNS = {
    "scoring": [
        "padded / real tokens",
        "pairs/s",
        "x stock sorted",
        "x stock unsorted",
        "products / ours",
        *(f"{name} / ours" for name in PEERS),
        "int8 x ours",
    ],
    "others": ["x stock", "x stock compiled", "x LM head"],
    "training": ["padded / real tokens", "steps/s", "x stock", "products / ours"],
    "short": ["steps/s", "ours / least"],
}
MODEL = Path(__file__).parent.parent / "gemma-3-270m"  # of `make gemma`
FAMILIES = ("gemma2", "gemma3_text")
# Defaults without and with --quick.
DEFAULTS = {"rounds": (3, 1), "pairs": (40, 12), "vocab_size": (262144, 8192), "families": (["gemma3_text"],) * 2}
QUICK_LAYERS = 4


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, parts = parser.add_argument, [*TABLES, "growth", "start"]
    add("--only", nargs="+", choices=parts, default=parts)
    add("--model", help="A checkpoint of Gemma 2 or 3. Default: that of `make gemma`, or random weights of --shape.")
    add("--families", nargs="+", choices=FAMILIES, help="Of random weights. Default: gemma3_text.")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="Default: those the device computes in.")
    add("--shape", choices=SHAPES, help="Of random weights. Default: 270m.")
    add("--layers", type=int, help="Of random weights. Default: all of the shape's; 4 with --quick.")
    add("--device", default="cpu")
    add("--attn_implementation", help="Attention of our model. Default: the model's own choice.")
    add("--lengths", choices=PASSAGES, default="alike", help="Of the texts of a batch.")
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
    random = options.quick or options.families or options.layers or options.shape
    if options.model is None and not random and MODEL.is_dir():
        options.model = os.path.relpath(MODEL)
    options.shape = options.shape or "270m"
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


def measure_all(options: argparse.Namespace, results: dict) -> list[str]:
    """Measure the tables of `--only`, put them into the results, and return them as text."""
    report, path = [], options.output_dir / "results.json"
    for name in options.only:
        if name in TABLES:
            results[name] = measure_table(name, options)
            text = markdown(results[name], ["family", "dtype", *COLUMNS[name]])
        elif name == "growth":
            growth = results[name] = measure_growth(options)
            plot_growth(growth, options.output_dir / "growth.png")
            points = zip(*growth.values(), strict=True)
            text = "\n".join(f"{p} pairs, {t:,} tokens: {s:.2f} s" for p, t, s in points)
        else:
            start = results[name] = measure_start(options)
            text = (
                f"{start['first score']:.1f} s until the first score, {start['imports']:.1f} s of them to import torch "
                f"and transformers ({start['beyond imports']:.1f} s beyond)"
            )
        write(path, json.dumps(results, indent=2))
        report.append(f"{name}\n\n{text}")
    return report


def main():
    options = make_parser().parse_args()
    fill_defaults(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(options)
    results = {"command": " ".join(["python", *sys.argv]), "machine": machine}
    results |= {name: getattr(options, name) for name in ("model", "layers", "rounds", "lengths", "seed")}
    what = options.model or f"random weights in the shape of {options.shape}"
    title = (
        f"{what}, {options.layers} layers, passages {options.lengths}, {machine}, medians of {options.rounds} rounds"
    )
    print(title, flush=True)
    report = "\n\n".join([title, *measure_all(options, results)])
    write(options.output_dir / "results.md", report)
    print("\n" + report)


if __name__ == "__main__":
    main()
