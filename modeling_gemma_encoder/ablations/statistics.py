"""By how much is one variant better than another, and how far to believe it: errors of the seeds and of the rows.

What two variants reach differs by what they are, by the seeds they had, and by which rows they happened to be scored
on. The rows are the same for both, so what they find hard cancels: the error of the difference is found by leaving out
a part of the rows at a time (the delete-a-group jackknife; Kott, Journal of Official Statistics 17, 2001), for any
metric, F1 and correlations too. A whole group is left out where rows belong together.
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


class Part(Mapping):
    """Columns of some rows, lists, as metrics read them; made when they are asked for, and then kept."""

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
    """What a finished run predicts, and its scores without each part of the validation rows, as GLUE counts them.

    Args:
        rows: Of each validation split.
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
        """(parts,), empty where the rows are one part. Raises FileNotFoundError where no predictions were kept."""
        scores = []
        for split, parts in self.parts.items():
            found = np.array(json.loads((folder / f"predictions-{split}.json").read_text())["predictions"])
            scores.append([np.mean([*self.task.metric(found[places], rows).values()]) for places, rows in parts])
        return np.mean(scores, axis=0)

    def answers(self, folder: Path) -> list[np.ndarray]:
        """Predictions of each split. Raises FileNotFoundError where none were kept."""
        files = [folder / f"predictions-{split}.json" for split in self.rows]
        return [np.array(json.loads(file.read_text())["predictions"]) for file in files]

    def always(self, folder: Path) -> str | None:
        """What a run says of (nearly) all rows, which are not all so; None where it tells them apart."""
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
    """
    The mean of the seeds' differences and its standard error, of seeds and rows; of the rows alone for a single seed.

    Over the seeds, differences vary also because each seed is wrong on other rows, which the rows' error of their mean
    has already: that share is counted once.

    Args:
        differences: (seeds,), on all rows.
        left_out: (seeds, parts), without each part.
    """
    count, mean = len(differences), left_out.mean(0)
    variance = jackknife_error(mean) ** 2
    if count > 1:
        shared = sum(jackknife_error(of_seed - mean) ** 2 for of_seed in left_out) / (count * (count - 1))
        variance += max(0.0, np.var(differences, ddof=1) / count - shared)
    return float(np.mean(differences)), float(np.sqrt(variance))


def add_differences(
    studies: dict[str, Study], found: dict, root: Path, left_out: dict[str, Callable[[Path], np.ndarray]]
) -> list[str]:
    """
    Puts into what `run_studies` found, of each variant, `difference`: from what the study compares it with, and its
    standard error; None where a cell kept no predictions, the rows are one part, or a score is not a number.

    Args:
        found: Where a variant may be missing, and is compared with nothing then.
        root: Where the cells' folders are.
        left_out: Task -> a cell's folder -> its score without each part of the rows, (parts,).

    Returns:
        The cells that kept no predictions.
    """
    known: dict[str, np.ndarray | None] = {}

    def without(task: str, cells: list[str]) -> np.ndarray | None:
        for cell in cells:
            if cell not in known:
                try:
                    known[cell] = left_out[task](root / cell)
                except FileNotFoundError:
                    known[cell] = None
        return None if any(known[cell] is None for cell in cells) else np.array([known[cell] for cell in cells])

    for name, study in studies.items():
        for task, variants in found.get(name, {}).items():
            for variant, of_variant in variants.items():
                reference, of_variant["difference"] = variants.get(study.compared_with(variant)), None
                if reference is None:
                    continue
                ours, theirs = without(task, of_variant["cells"]), without(task, reference["cells"])
                # Pairs have the same seed: the same order of rows, the same fresh head.
                differences = np.subtract(of_variant["scores"], reference["scores"])
                if ours is not None and theirs is not None and ours.shape[1] > 1 and np.isfinite(differences).all():
                    of_variant["difference"] = list(difference_and_error(differences, ours - theirs))
    return [cell for cell, scores in known.items() if scores is None]


def add_answers(found: dict, root: Path, left_out: dict[str, LeftOut]) -> None:
    """
    Puts into what `run_studies` found, of each variant, `equal_to`, the variants before it whose answers are the same
    to every row with every seed, and `always`, of each seed what it says of (nearly) all rows, or None.

    Args:
        left_out: Task -> what reads its cells; as in `add_differences`. Cells that kept no predictions are passed over.
    """
    for study in found.values():
        for task, variants in study.items():
            before: dict[str, list] = {}
            for name, of_variant in variants.items():
                of_variant["equal_to"], of_variant["always"] = [], []
                try:
                    answers = [left_out[task].answers(root / cell) for cell in of_variant["cells"]]
                    of_variant["always"] = [left_out[task].always(root / cell) for cell in of_variant["cells"]]
                except FileNotFoundError:
                    continue
                of_variant["equal_to"] = [other for other, theirs in before.items() if same(answers, theirs)]
                before[name] = answers


def same(first, second) -> bool:
    """Whether lists of arrays, or of lists of them, are equal."""
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return len(first) == len(second) and all(map(same, first, second))
