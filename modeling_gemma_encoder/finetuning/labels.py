"""What the labels of a user's own table are: a class, several classes, or numbers of each row.

`describe` finds it out from the training rows, and `Labels` reads the cells of all splits in the
same way. A file of text, .csv or .tsv, does not say whether "1" is a number or a name; other files
have numbers, texts and lists.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

PLAIN = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,6})?")

DECIMAL_COMMA = re.compile(r"\s*[+-]?[0-9]+,[0-9]+\s*")


@dataclass(frozen=True)
class Labels:
    """What the labels of a table are, and how its cells are read.

    Args:
        problem: One of the config's problem types.
        names: The names of the classes in order; none for numbers.
        numbers: Whether a cell of text that looks like a number is one.
        flags: Whether labels are lists of zeros and ones, one for each class; None where no
            training row tells.
    """

    problem: str
    names: tuple[str, ...] = ()
    numbers: bool = False
    flags: bool | None = None

    def read(self, value: Any) -> Any:
        """Return the label in a cell: None where it is empty, and a number where it is to be one."""
        form = is_number if self.problem == "regression" else is_plain
        return read_cell(value, form if self.numbers else None)


@dataclass(frozen=True)
class LabelColumn:
    """The labels of the training rows as they are written.

    Args:
        name: The name of the column, or "label" where several columns were joined.
        values: A cell of each row.
        kind: The feature of `datasets`, which may have names for numbers.
        source: What messages call the file or split.
        columns: The columns of the table that the labels are from.
        is_text: Whether the file has nothing but text, as .csv and .tsv.
    """

    name: str
    values: list
    kind: Any
    source: str
    columns: tuple[str, ...]
    is_text: bool

    @property
    def place(self) -> str:
        """Return what messages call the column."""
        return f"{self.source}: {self.name!r}"


def describe(column: LabelColumn, problem: str | None, class_names: Sequence[str] | None) -> Labels:
    """
    Return what the labels of the training rows are.

    Args:
        problem: The problem as the user names it; None: the one that the labels look like.
        class_names: The names of the classes where labels are lists of zeros and ones.

    Raises:
        ValueError: A label is empty, or the labels are not what the user says.
    """
    form = is_number if has_numbers(column, problem) else None
    values = [read_cell(value, form) for value in column.values]
    if None in values:
        raise ValueError(f"{column.place} is empty in row {values.index(None)}.")
    several = len(column.columns) > 1
    problem = find_problem(column, values, problem)
    if problem == "regression":
        if class_names and not several:
            raise ValueError(f"--class_names is for lists of zeros and ones; {column.place} holds numbers.")
        return Labels(problem, numbers=True)
    if several:
        return Labels(problem, column.columns)
    if are_flags(values, column.kind):
        return Labels(problem, name_flags(column, class_names), flags=True)
    refuse_uneven_flags(column)
    if class_names:
        raise ValueError(f"--class_names is for lists of zeros and ones; {column.place} has names of its own.")
    return describe_classes(column, problem)


def has_numbers(column: LabelColumn, problem: str | None) -> bool:
    """
    Return whether the cells are text and numbers all of them.

    Raises:
        ValueError: Only some are, where the user does not say that they are names.
    """
    values = column.values
    if not column.is_text or not isinstance(values[0], str):
        return False
    other = next((row for row, value in enumerate(values) if not is_number(value)), None)
    if other is not None and values[other].strip():
        found = f"{column.place} is {values[other]!r} in row {other}"
        if problem == "regression":
            raise ValueError(f"{found}, which is not a number.")
        if problem is None and any(map(is_number, values)):
            raise ValueError(
                f"{found}, and a number in other rows: correct it, or give --problem single_label_classification if "
                "these are names of classes."
            )
    return other is None


def find_problem(column: LabelColumn, values: list, problem: str | None) -> str:
    """Return the problem that the user names, or the one that the labels look like."""
    lists = isinstance(values[0], list)
    if problem == "regression" and len(column.columns) > 1:
        return problem
    if lists and problem not in (None, "multi_label_classification"):
        raise ValueError(f"{column.place} holds lists, which are several labels a row; --problem is {problem}.")
    if problem is not None:
        return problem
    if lists:
        return "multi_label_classification"
    fractions = any(isinstance(value, float) and not value.is_integer() for value in values)
    return "regression" if fractions else "single_label_classification"


def name_flags(column: LabelColumn, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes that lists of zeros and ones stand for, and print them."""
    size = len(column.values[0])
    names = tuple(class_names or map(str, range(size)))
    if len(set(names)) < len(names):
        raise ValueError(f"--class_names gives a name twice: {', '.join(names)}.")
    if len(names) != size:
        raise ValueError(f"--class_names gives {len(names)} names; {column.place} holds {size} zeros and ones.")
    print(f"{column.place}: lists of zeros and ones, one for each of the classes {', '.join(names)}")
    return names


def describe_classes(column: LabelColumn, problem: str) -> Labels:
    """Return the classes that are written in the labels by their names, numbers first."""
    values, lists = column.values, isinstance(column.values[0], list)
    if column.is_text and isinstance(values[0], str):
        form = is_plain if all(map(is_plain, values)) else None
        values = [read_cell(value, form) for value in values]
    found = [as_names(value, column.kind) for value in values]
    names = {name for row in found for name in row} if problem == "multi_label_classification" else set(found)
    if None in names:
        raise ValueError(f"{column.place} is empty in row {found.index(None)}.")
    if len(names) < 2:
        raise ValueError(f"{column.place} holds nothing but {', '.join(names)!r}, and there must be two classes.")
    if len(names) == len(found) > 2 and all(map(DECIMAL_COMMA.fullmatch, names)):
        raise ValueError(
            f"{column.place} holds {found[0]!r} and as many classes as rows: write 0.5 for --problem regression."
        )
    say_alike(names, column.place)
    ordered = sorted(names, key=lambda name: (float(name), name) if name.isdigit() else (math.inf, name))
    # Another file may write the same number in another way, "1.0" for 1.
    return Labels(problem, tuple(ordered), numbers=all(map(is_plain, names)), flags=False if lists else None)


def refuse_uneven_flags(column: LabelColumn) -> None:
    """Raise ValueError where lists repeat a zero or a one, so that they are no names, but are not
    of one length."""
    for row, value in enumerate(column.values):
        if only_flags(value) and len(set(value)) < len(value):
            raise ValueError(
                f"{column.place} is {value} in row {row}, and not in all rows as many zeros and ones: write one for "
                "each class, or the names of the classes."
            )


def say_alike(names: set[str], place: str) -> None:
    """Print which classes differ only in blanks or case, or are the same number. They stay what was
    written."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[float(name) if is_number(name) else " ".join(name.split()).casefold()].append(name)
    for group in groups.values():
        if len(group) > 1:
            alike = ", ".join(map(repr, group))
            print(f"{place}: {alike} are classes of their own, and differ only in how they are written.")


def read_cell(value: Any, form: Callable[[str], bool] | None) -> Any:
    """Return a cell, None where it is blank, and a number where it is text of a form."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return float(value) if form is not None and form(value) else value


def is_number(value: str) -> bool:
    """Return whether a cell of text is read as a number: "007" is a name, and "nan" is not a
    number."""
    return bool(NUMBER.fullmatch(value.strip())) and not re.match(r"\s*[+-]?0\d", value)


def is_plain(value: str) -> bool:
    """Return whether a class is called by the number that is written: "1.0" is 1, but "1e5" and
    long ids are names."""
    return bool(PLAIN.fullmatch(value.strip())) and is_number(value)


def are_flags(values: Sequence, kind: Any) -> bool:
    """Return whether all labels are lists of as many zeros and ones, two or more: one for each
    class."""
    named = isinstance(getattr(kind, "feature", None), ClassLabel)  # these are numbers of names
    return bool(values) and not named and all(only_flags(one) and len(one) == len(values[0]) > 1 for one in values)


def only_flags(value: Any) -> bool:
    """Return whether a label is a list of zeros and ones."""
    return isinstance(value, list) and all(not isinstance(item, str) and item in (0, 1) for item in value)


def as_names(value: Any, kind: Any) -> Any:
    """Return a label, or each one of a list, as text: the data set's name for it, or what is
    written."""
    if isinstance(value, list):
        return [as_names(item, kind.feature) for item in value]
    if isinstance(kind, ClassLabel):
        return None if value in (None, -1) else kind.int2str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)
