r"""Train a reranker with each ranking loss on the same lists, and compare them in one table.

    python benchmarks/ranking_losses.py --seeds 1 2 3 --output_dir runs/losses \
        --model examples/nano --train_data trecqa/train.jsonl --eval_data trecqa/test.jsonl \
        --pair_columns question answer label

The table has BM25 and random order too. All other flags are those of `examples/msmarco.py`, which
trains. All losses have the same learning rate. Losses on the scores of a teacher need data that has
such scores.

Runs that are finished are only read, and runs that were interrupted go on. The script writes
results.md and results.json, beside what `msmarco.py` writes for each run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.ranking.measures import heading

SCRIPT = Path(__file__).parent.parent / "examples" / "msmarco.py"
LOSSES = ["point_ce", "pair", "softmax", "poly1", "lambdarank"]
BASELINES = ("BM25", "random order")


def train(loss: str, seed: int, folder: Path, flags: list[str]) -> None:
    """Train and evaluate a reranker in a process of its own. End this process if that one fails."""
    own = ["--ranking_loss", loss, "--seed", str(seed), "--output_dir", str(folder)]
    print(f"{loss}, seed {seed}", flush=True)
    if code := subprocess.run([sys.executable, SCRIPT, *flags, *own]).returncode:
        raise SystemExit(code)


def collect(folder: Path, losses: list[str], seeds: list[int]) -> dict:
    """Return the tables of all collections: collection -> row -> measure -> a value for each seed.

    A baseline has one value for each measure, that of the first run.
    """
    tables = {}
    for loss in losses:
        for seed in seeds:
            for path in sorted((folder / loss / f"seed-{seed}").glob("*/results.json")):
                means = json.loads(path.read_text())["means"]
                baselines = {name: means[name] for name in BASELINES}
                table = tables.setdefault(path.parent.name, baselines)
                for measure, value in means["Gemma Encoder"].items():
                    table.setdefault(loss, {}).setdefault(measure, []).append(value)
    return tables


def as_text(values: float | list[float]) -> str:
    """Return the mean in percent, with the sample deviation if there are several values."""
    percent = np.atleast_1d(values) * 100
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f}"


def markdown(tables: dict, seeds: list[int]) -> str:
    """Return the tables of `collect` in Markdown, one below the other."""
    lines = []
    of_seeds = f"x 100, mean ± sample deviation of seeds {', '.join(map(str, seeds))}"
    for name, table in tables.items():
        measures = list(table[BASELINES[0]])
        lines.append(f"| {name}, {of_seeds} | {' | '.join(map(heading, measures))} |")
        lines.append("| --- |" + " ---: |" * len(measures))
        for row, values in table.items():
            cells = [as_text(values[measure]) for measure in measures]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ranking_losses"))
    args, flags = parser.parse_known_args()
    for seed in args.seeds:
        for loss in args.losses:
            train(loss, seed, args.output_dir / loss / f"seed-{seed}", flags)
    tables = collect(args.output_dir, args.losses, args.seeds)
    table = markdown(tables, args.seeds)
    write(args.output_dir / "results.md", table)
    results = {"flags": flags, "seeds": args.seeds, "results": tables}
    write(args.output_dir / "results.json", json.dumps(results, indent=2))
    print(f"\n{table}")


if __name__ == "__main__":
    main()
