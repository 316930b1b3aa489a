"""Ablations: the same fine-tuning with one choice changed, on several tasks and seeds, in one table.

A cell is a task, the options that differ, a learning rate and a seed; it is a run like any other (`runs.fine_tune`),
with a folder and a `results.json` of its own, which is read and not run again when it is there. Every variant has the
learning rate that does best for it and the task on rows set aside from the training set, so that none is handicapped.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from ..finetuning.arguments import FineTuningArguments
from ..finetuning.data import Data, digest
from ..finetuning.run import Run, claim, fine_tune
from ..finetuning.tasks import Source, Task
from .baselines import MAKERS, bag_of_words

Options = dict[str, object]  # fields of FineTuningArguments, and `kind`: "words" or one of `baselines.MAKERS`


@dataclass
class Study:
    """Variants of one choice, and what they are compared with.

    Args:
        variants: Name -> the options that it changes.
        paper: Name -> GLUE average of Gemma 2 2B in the paper (arXiv 2503.02656), where it is known.
        reference: Name of what the others are compared with; default: the first. Or a name for each that has its own.
    """

    variants: dict[str, Options]
    paper: dict[str, float] = field(default_factory=dict)
    reference: str | dict[str, str] | None = None

    def compared_with(self, name: str) -> str:
        """What a variant is compared with; the first, where that is not among the variants."""
        reference = self.reference.get(name) if isinstance(self.reference, dict) else self.reference
        return reference if reference in self.variants else next(iter(self.variants))


@dataclass(frozen=True)
class Cell:
    """One fine-tuning; `choosing` is on rows set aside, for a learning rate."""

    task: str
    options: tuple[tuple[str, object], ...]  # what differs from the command line's, sorted
    learning_rate: float
    seed: int
    choosing: bool

    @property
    def name(self) -> str:
        options = [f"{key}={Path(value).name if key == 'model' else value}" for key, value in self.options]
        return ",".join([*options, f"lr={self.learning_rate:g}", f"seed={self.seed}"])

    def folder(self, root: Path) -> Path:
        return root / "cells" / ("choosing" if self.choosing else "final") / self.task / self.name


def as_options(changed: Options, given: FineTuningArguments) -> tuple[tuple[str, object], ...]:
    """What a variant changes of the options given, so that studies share the cells that are the same."""
    return tuple(sorted((key, value) for key, value in changed.items() if getattr(given, key, None) != value))


def hold_out(data: Data, rows: int | None, seed: int, group: str | None = None) -> tuple[Data, Data]:
    """The data to choose on, validated on a tenth of the training rows, a thousand at most, and the data to report.

    Args:
        rows: How many of the others are trained on, chosen by `seed`; None: all.
        group: A column; rows that have its value in common are on one side, and then a few more may be set aside.
    """
    order = np.random.default_rng(0).permutation(len(data.train))
    size = max(1, min(len(order) // 10, 1000))
    if group is not None:
        values = list(data.train[group])
        drawn = dict.fromkeys(values[row] for row in order)  # groups, by where their first row came
        rank = {value: number for number, value in enumerate(drawn)}
        order = np.array(sorted(order, key=lambda row: rank[values[row]]))
        while size < len(order) and values[order[size - 1]] == values[order[size]]:
            size += 1
        if size == len(order):
            raise ValueError(f"All training rows have the same {group!r}: none can be set aside without the others.")
    aside, left = np.split(order, [size])
    if rows is not None and rows < len(left):
        left = np.random.default_rng(seed).permutation(left)[:rows]
    split = next(iter(data.validation))
    chosen, encoded = data.train.select(left), data.encoded["train"].select(left)
    held = data.train.select(aside)
    digests = {**data.digests, "train": digest(chosen)}
    report = replace(data, train=chosen, test={}, encoded={**data.encoded, "train": encoded}, digests=digests)
    choose = replace(
        report,
        validation={split: held},
        encoded={"train": encoded, split: data.encoded["train"].select(aside)},
        digests={**digests, split: digest(held)},
    )
    return choose, report


class Bench:
    """Runs cells in this process. Data is loaded once for each task and tokenizer.

    Args:
        root: Where the cells' folders are.
        others: Tasks that are no rows of a table: name -> what makes a cell's report in a folder.
        of_task: Of the number of epochs and the batch sizes those that every task has for itself, and not from `args`.
        keep_models: Keep the weights of every cell.
    """

    def __init__(
        self,
        tasks: dict[str, tuple[Task, Source]],
        options: FineTuningArguments,
        args: TrainingArguments,
        root: Path,
        others: dict[str, Callable[[Cell, Path], dict]],
        of_task: tuple[str, ...] = (),
        keep_models: bool = False,
    ):
        self.tasks, self.options, self.args, self.root = tasks, options, args, root
        self.others, self.of_task, self.keep_models = others, of_task, keep_models
        self.loaded: dict[tuple, Data] = {}

    def read(self, cell: Cell) -> dict | None:
        """The report of a cell that is finished. Raises ValueError where it is of another run."""
        folder = cell.folder(self.root)
        if not (folder / "results.json").exists():
            return None
        if cell.task in self.others:
            return self.run(cell)
        if ("kind", "words") in cell.options:
            return json.loads((folder / "results.json").read_text())
        data, options, args = self.prepare(cell, folder)
        claim(Run(cell.task, self.tasks[cell.task][0], data, options, args))
        report = json.loads((folder / "results.json").read_text())
        if other := [split for split in data.validation if report["evaluated"].get(split) != data.digests[split]]:
            raise ValueError(f"{folder} was evaluated on other rows of {', '.join(other)}: run it again.")
        return report

    def run(self, cell: Cell) -> dict:
        """The cell's report, `results.json`; what else is said goes into `log.txt`."""
        folder = cell.folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        if cell.task in self.others:
            report = self.others[cell.task](cell, folder)
            self.tidy(folder)
            return report
        task, kind = self.tasks[cell.task][0], dict(cell.options).get("kind")
        data, options, args = self.prepare(cell, folder)
        if kind == "words":
            return bag_of_words(task, data, folder, cell.task, cell.seed)
        with (folder / "log.txt").open("a") as log, redirect_stdout(log):
            report = fine_tune(Run(cell.task, task, data, options, args, make=MAKERS.get(kind)))
        self.tidy(folder)
        return report

    def prepare(self, cell: Cell, folder: Path) -> tuple[Data, FineTuningArguments, TrainingArguments]:
        """What a cell trains and scores on, and how."""
        task, source = self.tasks[cell.task]
        options, args = copy.copy(self.options), copy.copy(self.args)
        changed = dict(cell.options)
        changed.pop("kind", None)
        for key, value in changed.items():
            setattr(options, key, value)
        if "num_train_epochs" in self.of_task:
            args.num_train_epochs = task.epochs
        if "per_device_train_batch_size" in self.of_task:
            args.per_device_train_batch_size = task.batch_size
        if "per_device_eval_batch_size" in self.of_task:
            args.per_device_eval_batch_size = 2 * task.batch_size
        args.learning_rate, args.seed, args.output_dir = cell.learning_rate, cell.seed, str(folder)
        rows, options.max_train_samples = options.max_train_samples, None
        key = (cell.task, options.model, options.max_length)
        if key not in self.loaded:
            self.loaded[key] = Data.load(cell.task, task, source, options, args)
        choose, final = hold_out(self.loaded[key], rows, cell.seed, task.group)
        return choose if cell.choosing else final, options, args

    def tidy(self, folder: Path) -> None:
        """Leaves of a finished cell what it found out, and its model only if that is to be kept."""
        if self.keep_models:
            return
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.py"), folder / "tokenizer.json"]:
            path.unlink(missing_ok=True)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


def score(report: dict) -> float:
    """A run's score as GLUE counts it: its metrics, averaged, of its splits, averaged."""
    return float(np.mean([np.mean([*scores.values()]) for scores in report["scores"].values()]))


def metric_of(report: dict) -> str:
    """What `score` is of."""
    names = dict.fromkeys(name.replace("_", " ") for scores in report["scores"].values() for name in scores)
    return ("mean of " if len(names) > 1 else "") + " and ".join(names)


def run_studies(
    studies: dict[str, Study],
    tasks: Iterable[str],
    given: FineTuningArguments,
    learning_rates: list[float],
    seeds: list[int],
    run_all: Callable[[list[Cell]], Iterable[dict | None]],
) -> dict:
    """
    Study -> task -> variant -> `learning_rate`, `chosen_on` (rate -> score), `scores` of the seeds, what they are,
    `metric`, `cells`, their folders below the root, and `simple`, what is reached without reading: the majority, or
    random order, and BM25.

    Args:
        run_all: Cells -> their reports, in order; where they run is its matter. None for a cell that is not to run: a
            variant that needs it is left out, and so is a task or a study that then has nothing to compare.
    """
    tasks = list(tasks)
    places = [
        (study, task, name, as_options(options, given))
        for study, of_study in studies.items()
        for task in tasks
        for name, options in of_study.variants.items()
    ]
    wanted = dict.fromkeys((task, options) for _, task, _, options in places)
    best = {place: dict.fromkeys(learning_rates) for place in wanted}
    several = len(learning_rates) > 1
    if several:
        cells = [Cell(task, options, rate, 0, True) for task, options in wanted for rate in learning_rates]
        for cell, report in zip(cells, run_all(cells), strict=True):
            best[cell.task, cell.options][cell.learning_rate] = None if report is None else score(report)
    rates = {
        place: max(found, key=lambda rate: np.nan_to_num(found[rate] if several else 0.0, nan=-np.inf))
        for place, found in best.items()
        if not several or None not in found.values()
    }
    cells = [Cell(*place, rate, seed, False) for place, rate in rates.items() for seed in seeds]
    reports: dict[tuple, list[dict | None]] = {}
    for cell, report in zip(cells, run_all(cells), strict=True):
        reports.setdefault((cell.task, cell.options), []).append(report)
    found = {}
    for study, task, name, options in places:
        runs = reports.get((task, options), [None])
        if None in runs:
            continue
        simple = {name: runs[0][name] for name in ("majority", "BM25") if runs[0].get(name)}
        found.setdefault(study, {}).setdefault(task, {})[name] = {
            "learning_rate": rates[task, options],
            "chosen_on": best[task, options],
            "scores": [score(report) for report in runs],
            "metric": metric_of(runs[0]),
            "cells": [str(Cell(task, options, rates[task, options], seed, False).folder(Path())) for seed in seeds],
            "simple": {name: score({"scores": scores}) for name, scores in simple.items()},
        }
    for study, tasks in found.items():
        least = min(2, len(studies[study].variants))
        found[study] = {task: variants for task, variants in tasks.items() if len(variants) >= least}
    return {study: tasks for study, tasks in found.items() if tasks}
