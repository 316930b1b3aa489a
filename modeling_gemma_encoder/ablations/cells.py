"""Cells of an ablation: a task, the options that differ, a learning rate and a seed.

A cell is a training run like any other (`finetuning.run.fine_tune`). It has a folder and a
`results.json` of its own. A finished cell is read and not trained again.
"""

import copy
import json
import shutil
from collections.abc import Callable
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


@dataclass(frozen=True)
class Cell:
    """Identify one training run of an ablation.

    Args:
        options: What differs from the options of the command line, as sorted pairs.
        choosing: Whether it is scored on rows set aside, to choose a learning rate.
    """

    task: str
    options: tuple[tuple[str, object], ...]
    learning_rate: float
    seed: int
    choosing: bool

    @property
    def name(self) -> str:
        """Return the name of the cell's folder."""
        options = [f"{key}={Path(value).name if key == 'model' else value}" for key, value in self.options]
        return ",".join([*options, f"lr={self.learning_rate:g}", f"seed={self.seed}"])

    def folder(self, root: Path) -> Path:
        """Return the folder of the cell below `root`."""
        return root / "cells" / ("choosing" if self.choosing else "final") / self.task / self.name


def hold_out(data: Data, rows: int | None, seed: int, group: str | None = None) -> tuple[Data, Data]:
    """Return the data to choose a learning rate on, and the data to report.

    Both train on the same rows. The former is validated on a tenth of the training rows, a thousand
    at most, which are set aside for all variants and seeds; the latter on the official validation
    rows.

    Args:
        rows: How many of the other rows are trained on, drawn by `seed`; None for all.
        group: A column. Rows with the same value stay together, so that a few more may be set
            aside.

    Raises:
        ValueError: All rows have the same value of `group`.
    """
    aside, left = _split_rows(data, group)
    if rows is not None and rows < len(left):
        left = np.random.default_rng(seed).permutation(left)[:rows]
    split = next(iter(data.validation))
    chosen, encoded = data.train.select(left), data.encoded["train"].select(left)
    held = data.train.select(aside)
    report = replace(
        data,
        train=chosen,
        test={},
        encoded={**data.encoded, "train": encoded},
        digests={**data.digests, "train": digest(chosen)},
    )
    choose = replace(
        report,
        validation={split: held},
        encoded={"train": encoded, split: data.encoded["train"].select(aside)},
        digests={**report.digests, split: digest(held)},
    )
    return choose, report


def _split_rows(data: Data, group: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the training rows to set aside, and of the others."""
    # One order for all variants and seeds: none may train on what another chooses on.
    order = np.random.default_rng(0).permutation(len(data.train))
    size = max(1, min(len(order) // 10, 1000))
    if group is not None:
        values = list(data.train[group])
        drawn = dict.fromkeys(values[row] for row in order)  # in the order of their first rows
        rank = {value: number for number, value in enumerate(drawn)}
        order = np.array(sorted(order, key=lambda row: rank[values[row]]))
        while size < len(order) and values[order[size - 1]] == values[order[size]]:
            size += 1
        if size == len(order):
            raise ValueError(
                f"All training rows have the same {group!r}, so that none of them can be set aside without the others."
            )
    return order[:size], order[size:]


@dataclass
class Bench:
    """Run cells in this process, and load the data once for each task and tokenizer.

    Args:
        root: The folder that holds the cells' folders.
        others: Tasks that are not rows of a table: name -> function that makes a cell's report in a
            folder.
        task_defaults: Which of the number of epochs and the batch sizes come from the task and not
            from `args`.
        keep_models: Keep the weights of every cell.
    """

    tasks: dict[str, tuple[Task, Source]]
    options: FineTuningArguments
    args: TrainingArguments
    root: Path
    others: dict[str, Callable[[Cell, Path], dict]] = field(default_factory=dict)
    task_defaults: tuple[str, ...] = ()
    keep_models: bool = False
    loaded: dict[tuple, Data] = field(default_factory=dict, init=False)

    def read(self, cell: Cell) -> dict | None:
        """Return the report of a finished cell, and None for a cell that is not finished.

        Raises:
            ValueError: The folder holds another run, or one that was evaluated on other rows.
        """
        folder = cell.folder(self.root)
        if not (folder / "results.json").exists():
            return None
        if cell.task in self.others:
            return self.run(cell)
        if ("kind", "words") in cell.options:
            return json.loads((folder / "results.json").read_text())
        data, options, args = self._prepare(cell, folder)
        claim(Run(cell.task, self.tasks[cell.task][0], data, options, args))
        report = json.loads((folder / "results.json").read_text())
        evaluated = report["evaluated"]
        if other := [s for s in data.validation if evaluated.get(s) != data.digests[s]]:
            raise ValueError(
                f"{folder} was evaluated on other rows of {', '.join(other)}. Give the command "
                "without --finished_only to evaluate it again."
            )
        return report

    def run(self, cell: Cell) -> dict:
        """Return a cell's report, `results.json`; what the run prints goes into `log.txt`."""
        folder = cell.folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        if cell.task in self.others:
            report = self.others[cell.task](cell, folder)
            self._tidy(folder)
            return report
        task, kind = self.tasks[cell.task][0], dict(cell.options).get("kind")
        data, options, args = self._prepare(cell, folder)
        if kind == "words":
            return bag_of_words(task, data, folder, cell.task, cell.seed)
        with (folder / "log.txt").open("a") as log, redirect_stdout(log):
            report = fine_tune(Run(cell.task, task, data, options, args, make=MAKERS.get(kind)))
        self._tidy(folder)
        return report

    def _prepare(self, cell: Cell, folder: Path) -> tuple[Data, FineTuningArguments, TrainingArguments]:
        """Return what a cell trains and is scored on, its options and its arguments."""
        task, source = self.tasks[cell.task]
        options, args = self._options_of(cell), self._arguments_of(cell, task, folder)
        # Rows are drawn after some are set aside; all of them are encoded once.
        rows, options.max_train_samples = options.max_train_samples, None
        key = (cell.task, options.model, options.max_length)
        if key not in self.loaded:
            self.loaded[key] = Data.load(cell.task, task, source, options, args)
        choose, final = hold_out(self.loaded[key], rows, cell.seed, task.group)
        return choose if cell.choosing else final, options, args

    def _options_of(self, cell: Cell) -> FineTuningArguments:
        options = copy.copy(self.options)
        for key, value in cell.options:
            if key != "kind":
                setattr(options, key, value)
        return options

    def _arguments_of(self, cell: Cell, task: Task, folder: Path) -> TrainingArguments:
        args = copy.copy(self.args)
        defaults = {
            "num_train_epochs": task.epochs,
            "per_device_train_batch_size": task.batch_size,
            "per_device_eval_batch_size": 2 * task.batch_size,
        }
        for name in self.task_defaults:
            setattr(args, name, defaults[name])
        args.learning_rate, args.seed, args.output_dir = cell.learning_rate, cell.seed, str(folder)
        return args

    def _tidy(self, folder: Path) -> None:
        """Delete the model of a finished cell, unless models are kept."""
        if self.keep_models:
            return
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.py"), folder / "tokenizer.json"]:
            path.unlink(missing_ok=True)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
