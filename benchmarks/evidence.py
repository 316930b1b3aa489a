r"""Ask a decoder whether the paper's choices matter, task by task, and make one table of all tasks.

    python benchmarks/evidence.py --model gemma-3-270m --data_dir data --question attention
    python benchmarks/evidence.py --model gemma-3-270m --data_dir data --question attention --tasks sst2 cola --bf16
    python benchmarks/evidence.py --question attention --tables_only
    python benchmarks/evidence.py --question attention --tasks cb --earlier docs/results/attention-gemma-3-270m.json

Each task has its own number of rows and epochs, `SIZES`, so that a training reads 30,000 to
50,000 tokens. Each is a command of `examples/ablations.py`, which is printed before it runs; flags
that are not named here are passed on to it. What is finished is read and not trained again, and
`--earlier` adds the tasks of a JSON file that this script wrote elsewhere. The script writes in
`--output_dir` for each question tables (`attention.md`), plots, and a JSON file with every score,
rate and command.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder.ablations.catalog import STUDIES
from modeling_gemma_encoder.ablations.reports import name_seeds, plot, report_study

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


# Rows have 10 to 90 tokens in the mean, by task, with Gemma 3's tokenizer.
SIZES = {
    "sst2": Size(4000, 1, 32),
    "cola": Size(3000, 1, 32),
    "stsb": Size(1500, 1, 16),
    "mrpc": Size(800, 1, 16),
    "wic": Size(1500, 1, 32),
    "cb": Size(225, 2, 8),
    "qnli": Size(800, 1, 16, evaluated=1000),
}
# Question -> study -> variants.
QUESTIONS = {
    "attention": {
        "attention": ["causal", "causal with last token", "bidirectional", "radius 16"],
        "baselines": [
            "TF-IDF with logistic regression",
            "TF-IDF on all rows",
            "Gemma*ForSequenceClassification",
            "Gemma Encoder",
        ],
    },
    "pooling": {"pooling": ["mean", "last token", "query probe", "4 key-value probes"]},
    "dropout": {
        "dropout": ["0.0", "0.05", "0.1", "0.15"],
        "dropout_place": ["none", "attention", "feed-forward", "both"],
    },
}
PAPERS_GAIN = 4.9  # points of GLUE's average, from causal to bidirectional, Gemma 2 2B (arXiv 2503.02656)
RATES = ("2e-5", "5e-5")


def make_command(question: str, task: str, options: argparse.Namespace, others: list[str]) -> list[str]:
    """Return the command that trains every variant of a question's studies on a task."""
    studies = QUESTIONS[question]
    words = ["python", "examples/ablations.py", "--study", *studies, "--tasks", task, *SIZES[task].flags()]
    words += ["--variants", *(name for names in studies.values() for name in names)]
    words += ["--learning_rates", *options.learning_rates, "--seeds", *map(str, options.seeds)]
    if options.model:
        words += ["--model", options.model]
    if options.data_dir:
        words += ["--data_dir", options.data_dir]
    return [*words, *others, "--output_dir", str(options.output_dir / question / task)]


def run(words: list[str]) -> None:
    """Print a command and run it with this Python. End this process if it fails."""
    print("\n" + shlex.join(words), flush=True)
    if code := subprocess.run([sys.executable, ROOT / words[1], *words[2:]]).returncode:
        raise SystemExit(code)


@dataclass
class Found:
    """Hold what was found on the tasks that are finished.

    Attributes:
        studies: Study -> task -> variant -> scores.
        sizes: Of each task, `Size` as a dictionary.
    """

    seeds: list[int] = field(default_factory=list)
    sizes: dict[str, dict] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    studies: dict[str, dict] = field(default_factory=dict)

    def add(self, report: dict) -> None:
        """Add the tasks of a report. Raise ValueError if its seeds are others."""
        if self.seeds and self.seeds != report["seeds"]:
            raise ValueError(f"Seeds {self.seeds} and {report['seeds']} cannot be in one table.")
        self.seeds = report["seeds"]
        self.sizes |= report["sizes"]
        self.commands |= report["commands"]
        for study, of_study in report["studies"].items():
            self.studies[study] = {**self.studies.get(study, {}), **of_study}


def collect(question: str, tasks: list[str], root: Path, earlier: Sequence[Path] = ()) -> Found:
    """Return what earlier reports of the question have, and what was found here on the tasks that are finished."""
    found = Found()
    for path in earlier:
        report = json.loads(path.read_text())
        if report["studies"].keys() == QUESTIONS[question].keys():
            found.add(report)
    for task in tasks:
        path = root / question / task / "results.json"
        if path.exists():
            report = json.loads(path.read_text())
            size, command = {task: asdict(SIZES[task])}, {task: report["command"]}
            found.add({**report, "sizes": size, "commands": command})
    return found


def leave_tables(question: str, options: argparse.Namespace) -> None:
    """Write and print the tables of a question, of all tasks, and draw them."""
    found = collect(question, options.tasks, options.output_dir, options.earlier)
    if not found.studies:
        print(f"{question}: no task is finished in {options.output_dir / question}")
        return
    tables = []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    said = name_seeds(found.seeds)
    for name, of_study in found.studies.items():
        whole = STUDIES[name]
        study = replace(whole, variants={key: whole.variants[key] for key in QUESTIONS[question][name]})
        tables.append(report_study(name, study, of_study, found.seeds))
        plot(f"{name.replace('_', ' ')}, {said}", study, of_study, options.output_dir / f"{name}.png")
    if question == "attention":
        plot_gain(found.studies["attention"], options.output_dir / "gain.png")
    report = {**asdict(found), **provenance()}
    write(options.output_dir / f"{question}.json", json.dumps(report, indent=2))
    write(options.output_dir / f"{question}.md", "\n\n".join(tables))
    print("\n" + "\n\n".join(tables), flush=True)


def plot_gain(of_study: dict, path: Path) -> None:
    """Save a plot of bidirectional minus causal attention by task, with standard errors, and the
    paper's average."""
    gains = {task: variants["bidirectional"]["difference"] for task, variants in of_study.items()}
    means, errors = (100 * np.array(values) for values in zip(*gains.values(), strict=True))
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(gains)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(means, range(len(gains)), xerr=errors, fmt="o", capsize=3, label="ours, ± standard error")
    axes.axvline(0, color="silver")
    axes.axvline(PAPERS_GAIN, color="gray", linestyle="--", label="the paper's, GLUE average, Gemma 2 2B")
    axes.set_yticks(range(len(gains)), gains)
    axes.invert_yaxis()
    axes.set(xlabel="bidirectional - causal, mean pooling, points", title="What bidirectional attention gains")
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", help="A decoder. Default: that of ablations.py.")
    parser.add_argument("--data_dir", help="Folder of the tasks' data. Default: the Hub.")
    parser.add_argument("--learning_rates", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tables_only", action="store_true", help="Train nothing; make tables of what is finished.")
    parser.add_argument("--earlier", nargs="+", type=Path, default=[], help="JSON files with further tasks.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    options, others = parser.parse_known_args()
    for question in options.question:
        for task in options.tasks:
            if not options.tables_only:
                run(make_command(question, task, options, others))
        leave_tables(question, options)


if __name__ == "__main__":
    main()
