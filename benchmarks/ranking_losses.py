"""Every ranking loss on the same lists, against BM25 and random order: a reranker is trained with each, in one table.

    python benchmarks/ranking_losses.py --seeds 1 2 3 --output_dir runs/losses --model examples/nano \
        --train_data trecqa/train.jsonl --eval_data trecqa/test.jsonl --pair_columns question answer label

All other flags are those of `examples/msmarco.py`, which trains, all losses at one learning rate; losses of a teacher's
scores need such data. Runs that are finished are read, interrupted ones go on. Leaves results.md, results.json, and
per run what `msmarco.py` leaves.
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


def collect(folder: Path, losses: list[str], seeds: list[int]) -> dict:
    """Collection -> row -> measure -> values of the seeds; a baseline's are of the first."""
    found = {}
    for loss in losses:
        for seed in seeds:
            for path in sorted((folder / loss / f"seed-{seed}").glob("*/results.json")):
                means = json.loads(path.read_text())["means"]
                table = found.setdefault(path.parent.name, {name: means[name] for name in BASELINES})
                for measure, value in means["Gemma Encoder"].items():
                    table.setdefault(loss, {}).setdefault(measure, []).append(value)
    return found


def markdown(found: dict, seeds: list[int]) -> str:
    lines = []
    for name, table in found.items():
        measures = list(table[BASELINES[0]])
        title = f"{name}, x 100, mean ± sample deviation of seeds {', '.join(map(str, seeds))}"
        lines += [f"| {title} | {' | '.join(map(heading, measures))} |", "| --- |" + " ---: |" * len(measures)]
        for row, values in table.items():
            cells = [np.atleast_1d(values[measure]) * 100 for measure in measures]
            shown = [f"{c.mean():.1f}" + (f" ± {c.std(ddof=1):.1f}" if len(c) > 1 else "") for c in cells]
            lines.append(f"| {row} | {' | '.join(shown)} |")
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
            run = ["--ranking_loss", loss, "--seed", seed, "--output_dir", args.output_dir / loss / f"seed-{seed}"]
            print(f"{loss}, seed {seed}", flush=True)
            if code := subprocess.run([sys.executable, SCRIPT, *flags, *map(str, run)]).returncode:
                raise SystemExit(code)
    found = collect(args.output_dir, args.losses, args.seeds)
    table = markdown(found, args.seeds)
    write(args.output_dir / "results.md", table)
    write(
        args.output_dir / "results.json", json.dumps({"flags": flags, "seeds": args.seeds, "results": found}, indent=2)
    )
    print(f"\n{table}")


if __name__ == "__main__":
    main()
