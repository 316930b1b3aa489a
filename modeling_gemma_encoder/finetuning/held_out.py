"""The rows that are held out for validation where a table has none: a tenth, of each class where
there are classes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from sklearn.model_selection import train_test_split

FEW = 10  # rows of a class, a tenth of which is less than one


@dataclass(frozen=True)
class HeldOut:
    """The places of the rows that are trained on and of those that are held out, and how these were
    chosen."""

    train: list[int]
    validation: list[int]
    how: str
    note: str = ""

    def of(self, split: str) -> list[int]:
        """Return the places of the rows of a split, "train" or "validation"."""
        return self.validation if split == "validation" else self.train


def random_tenth(rows: int) -> HeldOut:
    """Hold out a random tenth of so many rows."""
    parts = Dataset.from_dict({"row": range(rows)}).train_test_split(0.1, seed=0)
    return HeldOut(parts["train"]["row"][:], parts["test"]["row"][:], "a tenth")


def stratified_tenth(labels: Sequence[str]) -> HeldOut:
    """
    Hold out a tenth of each class.

    A class with fewer than `FEW` rows has its first one trained on, so that no class is held out as
    a whole; a tenth of the further rows of all such classes together is held out.
    """
    counts = Counter(labels)
    few = sorted(label for label in counts if counts[label] < FEW)
    first = {label: row for row, label in reversed([*enumerate(labels)]) if label in few}
    further = [row for row, label in enumerate(labels) if label in few and row != first[label]]
    many = [row for row, label in enumerate(labels) if label not in few]
    train, validation = list(first.values()), []
    for rows, strata in ((many, [labels[row] for row in many]), (further, None)):
        if len(rows) > 1:
            size = math.ceil(len(rows) / 10)
            kept, rows = train_test_split(rows, test_size=size, stratify=strata, random_state=0)
            train += kept
        validation += rows
    note = ""
    if few:
        names = ", ".join([*few[:5], "..."] if len(few) > 5 else few)
        note = f"; classes with fewer than {FEW} rows ({names}) each have one trained on, and share their tenth"
    return HeldOut(sorted(train), sorted(validation), "a tenth of each class", note)
