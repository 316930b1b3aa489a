r"""Ask a decoder whether the paper's choices matter, task by task, and make one table of all tasks.

    python benchmarks/evidence.py --model gemma-3-270m --data_dir data --study attention
    python benchmarks/evidence.py --model gemma-3-270m --data_dir data --study attention --tasks sst2 cola --bf16
    python benchmarks/evidence.py --study attention --tables_only

Each task has its own number of rows and epochs, `SIZES`, so that a training reads about 50,000
tokens. Each is a command of `examples/ablations.py`, which is printed before it runs; flags that
are not named here are passed on to it. What is finished is read and not trained again. The script
writes in `--output_dir` tables and a plot of each study, and `results.json` with every score, rate
and command.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder.ablations.catalog import STUDIES
from modeling_gemma_encoder.ablations.reports import name_seeds, plot, report_study
from modeling_gemma_encoder.ablations.studies import Study

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Size:
    """Hold how much of a task is trained on and evaluated."""

    rows: int
    epochs: int
    batch: int
    evaluated: int | None = None  # all validation rows if None

    def flags(self) -> list[str]:
        """Return the flags of `examples/ablations.py` that say so."""
        found = ["--max_train_samples", self.rows, "--num_train_epochs", self.epochs]
        found += ["--per_device_train_batch_size", self.batch, "--per_device_eval_batch_size", 2 * self.batch]
        if self.evaluated:
            found += ["--max_eval_samples", self.evaluated]
        return [str(word) for word in found]


# Texts have 12, 11, 30, 53, 22, 75 and 50 tokens in the mean, with Gemma 3's tokenizer.
SIZES = {
    "sst2": Size(4000, 1, 32),
    "cola": Size(4000, 1, 32),
    "stsb": Size(2000, 1, 16),
    "mrpc": Size(1000, 1, 16),
    "wic": Size(2500, 1, 32),
    "cb": Size(225, 3, 8),
    "qnli": Size(1000, 1, 16, evaluated=1500),
}
VARIANTS = {"attention": ["causal", "causal, last token", "bidirectional", "radius 16"]}
RATES = ("2e-5", "5e-5")


def shape(study: str) -> Study:
    """Return a study with the variants that are asked for here."""
    whole = STUDIES[study]
    names = VARIANTS.get(study, whole.variants)
    return replace(whole, variants={name: whole.variants[name] for name in names})


def make_command(study: str, task: str, options: argparse.Namespace, others: list[str]) -> list[str]:
    """Return the command that trains every variant of a study on a task."""
    words = ["python", "examples/ablations.py", "--study", study, "--tasks", task, *SIZES[task].flags()]
    words += ["--variants", *shape(study).variants]
    words += ["--learning_rates", *options.learning_rates, "--seeds", *map(str, options.seeds)]
    if options.model:
        words += ["--model", options.model]
    if options.data_dir:
        words += ["--data_dir", options.data_dir]
    return [*words, *others, "--output_dir", str(options.output_dir / study / task)]


def run(words: list[str]) -> None:
    """Print a command and run it with this Python. End this process if it fails."""
    print("\n" + shlex.join(words), flush=True)
    if code := subprocess.run([sys.executable, ROOT / words[1], *words[2:]]).returncode:
        raise SystemExit(code)


def collect(study: str, tasks: list[str], root: Path) -> tuple[dict, list[int]]:
    """Return what was found on the tasks that are finished, task -> variant -> scores, and the
    seeds."""
    found, seeds = {}, []
    for task in tasks:
        path = root / study / task / "results.json"
        if path.exists():
            report = json.loads(path.read_text())
            found |= report["studies"].get(study, {})
            seeds = report["seeds"]
    return found, seeds


def leave_tables(study: str, options: argparse.Namespace, others: list[str]) -> None:
    """Write and print the tables of all tasks of a study, and draw them."""
    found, seeds = collect(study, options.tasks, options.output_dir)
    if not found:
        print(f"{study}: no task is finished in {options.output_dir / study}")
        return
    tables, sizes = report_study(study, shape(study), found, seeds), {task: asdict(SIZES[task]) for task in found}
    plot(f"{study}, {name_seeds(seeds)}", shape(study), found, options.output_dir / f"{study}.png")
    commands = {task: shlex.join(make_command(study, task, options, others)) for task in found}
    report = {"study": study, "seeds": seeds, "sizes": sizes, "commands": commands, "tasks": found, **provenance()}
    write(options.output_dir / f"{study}.json", json.dumps(report, indent=2))
    write(options.output_dir / f"{study}.md", tables)
    print("\n" + tables, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", help="A decoder. Default: that of ablations.py.")
    parser.add_argument("--data_dir", help="Folder of the tasks' data. Default: the Hub.")
    parser.add_argument("--learning_rates", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tables_only", action="store_true", help="Train nothing; make tables of what is finished.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    options, others = parser.parse_known_args()
    for study in options.study:
        for task in options.tasks:
            if not options.tables_only:
                run(make_command(study, task, options, others))
        leave_tables(study, options, others)


if __name__ == "__main__":
    main()
