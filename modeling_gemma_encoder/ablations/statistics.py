"""By how much one variant is better than another, and how far to believe it: errors of the seeds
and of the rows.

What two variants reach differs by what they are, by the seeds they had, and by the rows they
happened to be scored on. The rows are the same for both, so what both find hard cancels. The error
of the difference is therefore found by leaving out a part of the rows at a time (the delete-a-group
jackknife; Kott, Journal of Official Statistics 17, 2001), which works for any metric, F1 and
correlations too. Rows that belong together are left out together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..finetuning.tasks import Task
from .studies import Study

PARTS = 100
NEARLY = 0.1  # of the rows whose label is not what is nearly always said; our choice


def split_in_parts(size: int, groups: Sequence | None = None, count: int = PARTS) -> np.ndarray:
    """Return the part of each row, (size,): drawn, and of about as many rows or groups each.

    There are no more parts than rows or groups.
    """
    _, group = np.unique(np.arange(size) if groups is None else np.asarray(groups), return_inverse=True)
    number = group.max() + 1
    part = np.random.default_rng(0).permutation(number) % min(count, number)
    return part[group]


def jackknife_error(left_out: np.ndarray) -> float:
    """Return the standard error of a number that is `left_out`, (parts,), without each part."""
    count = len(left_out)
    return float(np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)))


def mean_and_error(scores: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single score."""
    error = np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    return float(np.mean(scores)), float(error)


def averages(of_study: dict, name: str) -> tuple[float, float]:
    """Return a variant's mean over tasks, and the standard error that follows from those of the
    tasks."""
    pairs = [mean_and_error(variants[name]["scores"]) for variants in of_study.values()]
    means, errors = np.array(pairs).T
    return float(means.mean()), float(np.sqrt(np.sum(errors**2)) / len(pairs))


class Part(Mapping):
    """Hold columns of some rows as lists, which metrics read. A column is made when it is first
    asked for."""

    def __init__(self, rows: Dataset, columns: dict[str, list], places: np.ndarray):
        self.column_names, self.features = rows.column_names, rows.features
        self.rows, self.columns, self.places, self.made = rows, columns, places, {}

    def __getitem__(self, name: str) -> list:
        if name not in self.made:
            if name not in self.columns:
                self.columns[name] = list(self.rows[name])
            self.made[name] = [self.columns[name][place] for place in self.places]
        return self.made[name]

    def __iter__(self):
        return iter(self.column_names)

    def __len__(self) -> int:
        return len(self.places)


class LeftOut:
    """Read what a finished run predicts, and score it without each part of the validation rows, as
    GLUE does.

    Args:
        rows: Validation split -> its rows.
    """

    def __init__(self, task: Task, rows: dict[str, Dataset]):
        self.task, self.rows, self.parts = task, rows, {}
        groups = {split: found[task.group] if task.group else range(len(found)) for split, found in rows.items()}
        count = min(PARTS, *(len(set(found)) for found in groups.values()))
        for split, found in rows.items():
            part, columns = split_in_parts(len(found), groups[split], count), {}
            kept = [np.flatnonzero(part != number) for number in range(count)] if count > 1 else []
            self.parts[split] = [(places, Part(found, columns, places)) for places in kept]

    def __call__(self, folder: Path) -> np.ndarray:
        """Return the score without each part, (parts,); empty where the rows are one part.

        Raises:
            FileNotFoundError: The run kept no predictions.
        """
        scores = []
        for split, parts in self.parts.items():
            found = np.array(json.loads((folder / f"predictions-{split}.json").read_text())["predictions"])
            scores.append([np.mean([*self.task.metric(found[places], rows).values()]) for places, rows in parts])
        return np.mean(scores, axis=0)

    def answers(self, folder: Path) -> list[np.ndarray]:
        """Return the predictions of each split.

        Raises:
            FileNotFoundError: The run kept no predictions.
        """
        files = [folder / f"predictions-{split}.json" for split in self.rows]
        return [np.array(json.loads(file.read_text())["predictions"]) for file in files]

    def always(self, folder: Path) -> str | None:
        """Return what a run says of (nearly) all rows although they differ; None where it tells
        them apart."""
        if self.task.problem == "choice":
            return None
        predicted = np.concatenate(self.answers(folder))
        labels = np.concatenate([np.array(rows["label"]) for rows in self.rows.values()])
        if self.task.problem == "regression":
            return "about the same number" if predicted.std() < NEARLY * labels.std() else None
        values, counts = np.unique(predicted, axis=0, return_counts=True)
        common, share = values[counts.argmax()], counts.max() / len(predicted)
        others = np.sum((labels != common).reshape(len(labels), -1).any(-1))
        if len(predicted) - counts.max() > NEARLY * others or not others:
            return None
        several = self.task.problem == "multi_label_classification"
        names = [self.task.labels[n] for n in (np.flatnonzero(common) if several else [common])]
        return f"{' and '.join(names) or 'none'} for {'all' if share == 1 else f'{share:.1%} of the'} rows"


def difference_and_error(differences: Sequence[float], left_out: np.ndarray) -> tuple[float, float]:
    """Return the mean of the seeds' differences, and its standard error, of seeds and rows.

    For a single seed the error is that of the rows alone. Over the seeds, differences vary also
    because each seed is wrong on other rows. The error of the rows contains that share already, so
    it is subtracted from the error of the seeds.

    Args:
        differences: On all rows, (seeds,).
        left_out: Without each part of the rows, (seeds, parts).
    """
    count, mean = len(differences), left_out.mean(0)  # (parts,)
    variance = jackknife_error(mean) ** 2
    if count > 1:
        shared = sum(jackknife_error(of_seed - mean) ** 2 for of_seed in left_out) / (count * (count - 1))
        variance += max(0.0, np.var(differences, ddof=1) / count - shared)
    return float(np.mean(differences)), float(np.sqrt(variance))


class _ScoresLeftOut:
    """Read the scores of cells without each part of the rows, each cell once."""

    def __init__(self, root: Path, left_out: dict[str, Callable[[Path], np.ndarray]]):
        self.root, self.left_out = root, left_out
        self.known: dict[str, np.ndarray | None] = {}  # cell -> (parts,)

    def of(self, task: str, cells: list[str]) -> np.ndarray | None:
        """Return the scores, (cells, parts), or None where a cell kept no predictions."""
        for cell in cells:
            if cell not in self.known:
                try:
                    self.known[cell] = self.left_out[task](self.root / cell)
                except FileNotFoundError:
                    self.known[cell] = None
        found = [self.known[cell] for cell in cells]
        return None if any(scores is None for scores in found) else np.array(found)


def add_differences(
    studies: dict[str, Study], found: dict, root: Path, left_out: dict[str, Callable[[Path], np.ndarray]]
) -> list[str]:
    """Add to each variant `difference`: from what its study compares it with, and the standard
    error.

    It is None where a cell kept no predictions, the rows are one part, or a score is not a number.

    Args:
        found: What `run_studies` returned. A variant may be missing, and then nothing is compared
            with it.
        root: The folder that holds the cells' folders.
        left_out: Task -> function of a cell's folder, which returns its score without each part of
            the rows, (parts,).

    Returns:
        The cells that kept no predictions.
    """
    scores = _ScoresLeftOut(root, left_out)
    for name, study in studies.items():
        for task, variants in found.get(name, {}).items():
            for variant, of_variant in variants.items():
                reference = variants.get(study.compared_with(variant))
                of_variant["difference"] = None
                if reference is not None:
                    of_variant["difference"] = _difference(task, of_variant, reference, scores)
    return [cell for cell, of_cell in scores.known.items() if of_cell is None]


def _difference(task: str, of_variant: dict, reference: dict, scores: _ScoresLeftOut) -> list[float] | None:
    ours, theirs = scores.of(task, of_variant["cells"]), scores.of(task, reference["cells"])
    if ours is None or theirs is None or ours.shape[1] < 2:
        return None
    # Pairs have the same seed: the same order of rows, and the same fresh head.
    differences = np.subtract(of_variant["scores"], reference["scores"])
    if not np.isfinite(differences).all():
        return None
    return list(difference_and_error(differences, ours - theirs))


def add_answers(found: dict, root: Path, left_out: dict[str, LeftOut]) -> None:
    """Add to each variant which answers are the same: as those of another variant, or for all rows.

    `equal_to` are the variants before it whose answers are the same to every row with every seed.
    `always` is, for each seed, what it says of (nearly) all rows, or None. Cells that kept no
    predictions are passed over.

    Args:
        found: What `run_studies` returned.
        left_out: Task -> what reads its cells.
    """
    for study in found.values():
        for task, variants in study.items():
            before: dict[str, list] = {}
            for name, of_variant in variants.items():
                of_variant["equal_to"], of_variant["always"] = [], []
                cells = [root / cell for cell in of_variant["cells"]]
                try:
                    answers = [left_out[task].answers(cell) for cell in cells]
                    of_variant["always"] = [left_out[task].always(cell) for cell in cells]
                except FileNotFoundError:
                    continue
                of_variant["equal_to"] = [other for other, theirs in before.items() if same(answers, theirs)]
                before[name] = answers


def same(first, second) -> bool:
    """Return whether two arrays, or two lists of them at any depth, are equal."""
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return len(first) == len(second) and all(map(same, first, second))
