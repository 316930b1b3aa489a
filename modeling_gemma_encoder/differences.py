"""By how much is one variant better than another, and how far to believe it: errors of the seeds and of the rows.

What two variants reach differs by what they are, by the seeds they had, and by which rows they happened to be scored
on. The rows are the same for both, so what they find hard cancels: the error of the difference is found by leaving out
a part of the rows at a time (the delete-a-group jackknife; Kott, Journal of Official Statistics 17, 2001), for any
metric, F1 and correlations too. A whole group is left out where rows belong together.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from .ablations import Study
from .tasks import Task

PARTS = 100


def split_in_parts(size: int, groups: Sequence | None = None, count: int = PARTS) -> np.ndarray:
    """The part of each row, drawn, all of about as many rows, or groups; no more parts than those. (size,)"""
    _, group = np.unique(np.arange(size) if groups is None else np.asarray(groups), return_inverse=True)
    number = group.max() + 1
    part = np.random.default_rng(0).permutation(number) % min(count, number)
    return part[group]


def jackknife_error(left_out: np.ndarray) -> float:
    """The standard error of a number that is `left_out` (parts,) without each part."""
    count = len(left_out)
    return float(np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)))


def mean_and_error(scores: list[float]) -> tuple[float, float]:
    """Mean and standard error; the latter is NaN for a single score."""
    error = np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    return float(np.mean(scores)), float(error)


def averages(of_study: dict, name: str) -> tuple[float, float]:
    """A variant's mean over tasks, and the standard error that the tasks' own make."""
    pairs = [mean_and_error(variants[name]["scores"]) for variants in of_study.values()]
    return float(np.mean([mean for mean, _ in pairs])), float(np.sqrt(sum(e**2 for _, e in pairs)) / len(pairs))


class LeftOut:
    """Scores of a finished run without each part of the validation rows, as GLUE counts them.

    Args:
        rows: Of each validation split.
    """

    def __init__(self, task: Task, rows: dict[str, Dataset]):
        self.task, self.parts = task, {}
        groups = {split: found[task.group] if task.group else range(len(found)) for split, found in rows.items()}
        count = min(PARTS, *(len(set(found)) for found in groups.values()))
        for split, found in rows.items():
            part = split_in_parts(len(found), groups[split], count)
            kept = [np.flatnonzero(part != number) for number in range(count)]
            self.parts[split] = [(places, found.select(places)) for places in kept]

    def __call__(self, folder: Path) -> np.ndarray:
        """(parts,). Raises FileNotFoundError where the run kept no predictions."""
        scores = []
        for split, parts in self.parts.items():
            found = np.array(json.loads((folder / f"predictions-{split}.json").read_text())["predictions"])
            scores.append([np.mean([*self.task.metric(found[places], rows).values()]) for places, rows in parts])
        return np.mean(scores, axis=0)


def add_differences(
    studies: dict[str, Study], found: dict, root: Path, left_out: dict[str, Callable[[Path], np.ndarray]]
) -> None:
    """
    Puts into what `run_studies` found, of each variant, `difference`: from the study's reference, and its standard
    error; None where a cell kept no predictions.

    Args:
        root: Where the cells' folders are.
        left_out: Task -> a cell's folder -> its score without each part of the rows, (parts,).
    """
    known: dict[tuple, np.ndarray] = {}

    def scores_of(task: str, cells: list[str]) -> np.ndarray:
        key = (task, *cells)
        if key not in known:
            known[key] = np.mean([left_out[task](root / cell) for cell in cells], axis=0)
        return known[key]

    for name, study in studies.items():
        for task, variants in found[name].items():
            reference = variants[study.compared_with]
            for variant in variants.values():
                pairs = zip(variant["scores"], reference["scores"], strict=True)  # the same seed, order and head
                difference, of_seeds = mean_and_error([ours - theirs for ours, theirs in pairs])
                try:
                    without = scores_of(task, variant["cells"]) - scores_of(task, reference["cells"])
                except FileNotFoundError:
                    variant["difference"] = None
                    continue
                error = float(np.hypot(jackknife_error(without), np.nan_to_num(of_seeds)))
                variant["difference"] = [difference, error]
