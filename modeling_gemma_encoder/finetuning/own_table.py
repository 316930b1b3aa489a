"""A user's own table as the source of a task: its splits, with the labels that `labels.py` reads."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from .._scripts.files import read
from .._scripts.tables import at_row, fill_texts, read_file
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from .arguments import TableArguments
from .held_out import HeldOut, random_tenth, stratified_tenth
from .labels import LabelColumn, Labels, are_flags, as_names, describe, is_number, is_plain, only_flags, read_cell
from .metrics import classification_scores, micro_and_macro_f1, of_columns, regression_scores
from .tasks import Task, by_label

METRICS = {
    "single_label_classification": classification_scores,
    "multi_label_classification": micro_and_macro_f1,
    "regression": regression_scores,
}


class Table:
    """The splits of a table: labels are the names of classes, lists of those, or numbers.

    Args:
        model: A trained model. Its columns are read unless the command line names others. Where
            there is nothing to train on, its problem and its classes take the place of those of the
            training labels.

    Raises:
        ValueError: A file, a column or the model is not what the command line says.
    """

    def __init__(self, table: TableArguments, model: str | None = None):
        self.table, self.began = table, began_with(model)
        self.texts = table.text_column or self.began.get("texts") or ["text"]
        self.columns = table.label_column or self.began.get("label_columns") or [self.began.get("label") or "label"]
        self.files = {"train": table.train_file, "validation": table.validation_file, "test": table.test_file}
        self.splits = {"train": table.train_split, "validation": table.validation_split, "test": table.test_split}
        self.label = self.columns[0] if len(self.columns) == 1 else "label"
        self.held_out: HeldOut | None = None
        if model is not None and table.lacks_training:
            self.labels = self._labels_of_model(model)
        else:
            column = self._label_column(self._read("train", table.problem))
            self.labels = describe(column, table.problem, table.class_names)

    @property
    def problem(self) -> str:
        """Return what the labels are, one of the config's problem types."""
        return self.labels.problem

    @property
    def names(self) -> list[str]:
        """Return the names of the classes; none for numbers."""
        return list(self.labels.names)

    # Where rows are from

    def place(self, split: str) -> str:
        """Return what messages call the file or the split of a data set."""
        own = self._own(split)
        return self.files[own] or f"{self.table.dataset}, split {self.splits[own]!r}"

    def where(self, split: str, row: int) -> str:
        """Return the place of a row, counted from 0 in its file, with its line where there is one."""
        file, part = self.files[self._own(split)], self._part(split)
        return at_row(self.place(split), row if part is None else part[row], file and Path(file))

    def source_of(self, split: str) -> dict[str, str]:
        """Return the file or data set that a split is of, without its folder, and which part of it,
        if held out."""
        own = self._own(split)
        file = self.files[own]
        found = {"data": Path(file).name} if file else {"data": self.table.dataset, "split": self.splits[own]}
        return {**found, "part": self.held_out.how} if own != split else found

    def hold_out(self) -> str:
        """Hold out a tenth of the training rows if there are no validation rows, and return in
        words what was done."""
        if self.files["validation"] or self.splits["validation"]:
            return ""
        rows = self.rows("train")
        if self.problem == "single_label_classification":
            held_out = stratified_tenth(list(rows[self.label]))
            if not held_out.validation:
                raise ValueError(f"{self.place('train')}: no class has two rows: give --validation_file.")
        else:
            held_out = random_tenth(len(rows))
        self.held_out = held_out
        count = f"{len(held_out.validation):,} of {len(rows):,} rows are held out"
        return f"{self.place('train')}: {count}, {held_out.how}{held_out.note}"

    def _part(self, split: str) -> list[int] | None:
        """Return the places of a split's rows among the training rows, where some of these are held
        out."""
        return None if self.held_out is None or split == "test" else self.held_out.of(split)

    def _own(self, split: str) -> str:
        """Return the split that the rows of a split are read from."""
        return split if self._part(split) is None else "train"

    # Rows

    def rows(self, split: str, texts: Sequence[str] = ()) -> Dataset:
        """Return the rows of a split, with their labels where it has any."""
        rows = self._read(self._own(split), self.problem)
        if (part := self._part(split)) is not None:
            rows = rows.select(part)
        if self.label not in rows.column_names:
            return rows
        kind = rows.features[self.label]
        labels = [self.labels.read(value) for value in rows[self.label]]
        if self._has_flags(split, labels, kind):
            labels = [row and [name for name, flag in zip(self.names, row, strict=True) if flag] for row in labels]
        elif self.problem != "regression":
            labels = [as_names(value, kind) for value in labels]
        else:
            wrong = next((row for row, value in enumerate(labels) if isinstance(value, str)), None)
            if wrong is not None:
                found = f"{self.place(split)}, row {wrong}: {self.label!r} is {labels[wrong]!r}"
                raise ValueError(f"{found}, which is not a number.")
        return rows.remove_columns(self.label).add_column(self.label, labels)

    def as_written(self, split: str) -> Dataset:
        """Return the rows of a split with every column of a .csv or .tsv file as text."""
        return self._load(split, None)

    def _load(self, split: str, texts: Sequence[str] | None) -> Dataset:
        if self.table.dataset:
            name, _, config = self.table.dataset.partition(":")
            return load_dataset(name, config or None, split=self.splits[split])
        return read_file(Path(self.files[split]), texts)

    def _read(self, split: str, problem: str | None) -> Dataset:
        """Read a split, with several columns of labels joined to one."""
        single = self.columns if len(self.columns) == 1 else []
        rows = fill_texts(self._load(split, [*self.texts, *single]), self.texts, self.place(split))
        absent = [column for column in self.texts if column not in rows.column_names]
        if absent and self.began and not self.table.text_column:
            raise ValueError(
                f"{self.place(split)} has no column {', '.join(absent)}, which --model was trained on; it has "
                f"{', '.join(rows.column_names)}. --text_column names others."
            )
        if single:
            self._refuse_nulls(split, rows)
            return rows
        missing = [column for column in self.columns if column not in rows.column_names]
        if missing and (len(missing) < len(self.columns) or split != "test"):
            has = ", ".join(rows.column_names)
            raise ValueError(f"{self.place(split)} has no column {', '.join(missing)}; it has {has}.")
        others = rows.remove_columns({*self.columns, "label"} & set(rows.column_names))
        if missing:
            return others
        join = self._join_numbers if problem == "regression" else self._join_flags
        return others.add_column("label", join(split, rows))

    def _refuse_nulls(self, split: str, rows: Dataset) -> None:
        """Raise ValueError where a list of labels has a null; a null in place of a list is a row
        without labels."""
        for row, value in enumerate(rows[self.label] if self.label in rows.column_names else ()):
            if isinstance(value, list) and None in value:
                known = [item for item in value if item is not None]
                hint = "leave null out, and write [] where no label applies"
                if known and only_flags(known):
                    hint = "write 0 or 1 in place of null"
                file = self.files[split]
                where = at_row(self.place(split), row, file and Path(file))
                raise ValueError(f"{where}: {self.label!r} is {json.dumps(value, default=str)}; {hint}.")

    def _join_flags(self, split: str, rows: Dataset) -> list[list[str]]:
        """Return the columns that hold 1 in each row."""
        for column in self.columns:
            wrong = next((row for row, value in enumerate(rows[column]) if value not in (0, 1)), None)
            if wrong is not None:
                raise ValueError(
                    f"{self.place(split)}: {column!r} is {rows[column][wrong]!r} in row {wrong}; several columns of "
                    "labels hold 0 and 1, or numbers with --problem regression."
                )
        flags = np.array([rows[column] for column in self.columns]).T  # (rows, columns)
        return [[self.columns[number] for number in np.flatnonzero(row)] for row in flags]

    def _join_numbers(self, split: str, rows: Dataset) -> list[list[float] | None]:
        """Return the numbers of each row; None for a row to be predicted where one is empty."""
        lists = []
        for row, cells in enumerate(zip(*(rows[column] for column in self.columns), strict=True)):
            values = [read_cell(cell, is_number) for cell in cells]
            for column, value in zip(self.columns, values, strict=True):
                if isinstance(value, str) or (value is None and split != "test"):
                    found = "empty" if value is None else f"{value!r}, which is not a number"
                    raise ValueError(f"{self.place(split)}, row {row}: {column!r} is {found}.")
            lists.append(None if None in values else values)
        return lists

    # Labels

    def _label_column(self, rows: Dataset) -> LabelColumn:
        """Return the labels of the training rows as they are written."""
        place = self.place("train")
        if self.label not in rows.column_names:
            missing = ", ".join(set(self.columns) - set(rows.column_names))
            raise ValueError(f"{place} has no column {missing}; it has {', '.join(rows.column_names)}.")
        values = list(rows[self.label])
        if not values:
            raise ValueError(f"{place} has no rows.")
        is_text = bool(self.table.train_file) and Path(self.table.train_file).suffix in (".csv", ".tsv")
        return LabelColumn(self.label, values, rows.features[self.label], place, tuple(self.columns), is_text)

    def _labels_of_model(self, model: str) -> Labels:
        """Return the labels that a model was trained for; the columns of its numbers are its own,
        unless named."""
        config = GemmaEncoderConfig.from_pretrained(model)
        if not is_trained(model):
            raise ValueError(f"--model {model} is not a trained classifier: give --train_file or --dataset.")
        problem = "regression" if config.num_labels == 1 else "single_label_classification"
        problem = config.problem_type or problem
        if self.table.problem not in (None, problem):
            raise ValueError(f"--problem {self.table.problem}: --model {model} was trained for {problem}.")
        names = list(config.id2label.values())
        if problem != "regression":
            return Labels(problem, tuple(names), numbers=all(map(is_plain, names)))
        if self.table.label_column is None and len(names) > 1:
            self.columns, self.label = names, "label"
        if len(self.columns) != len(names):
            raise ValueError(f"--label_column {' '.join(self.columns)}: --model {model} predicts {len(names)} numbers.")
        return Labels(problem, numbers=True)

    def _has_flags(self, split: str, labels: list, kind: Any) -> bool:
        """Return whether the labels of a split are lists of zeros and ones. Raise ValueError if
        only training's are."""
        flags = self.labels.flags
        if self.problem != "multi_label_classification" or flags is False or len(self.columns) > 1:
            return False
        known = {row: value for row, value in enumerate(labels) if value is not None}
        given = are_flags(list(known.values()), kind) and len(next(iter(known.values()))) == len(self.names)
        if flags and known and not given:
            wrong = next(row for row, one in known.items() if not only_flags(one) or len(one) != len(self.names))
            found = f"{self.place(split)}, row {wrong}: {self.label!r} is {labels[wrong]}"
            raise ValueError(f"{found}, and must be a list of {len(self.names)} zeros and ones.")
        return given


def began_with(model: str | None) -> dict:
    """Return what the run that trained a model wrote in `run.json` when it began; {} where there is
    none."""
    if model is None:
        return {}
    folder = Path(model)
    return read((folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json")


def is_trained(model: str) -> bool:
    """Return whether a checkpoint has the head of a classifier."""
    architectures = GemmaEncoderConfig.from_pretrained(model).architectures
    return GemmaEncoderForSequenceClassification.__name__ in (architectures or ())


def task_of(table: TableArguments, model: str | None = None) -> tuple[str, Task, Table]:
    """Return a table's name in results and cards, the task to learn from it, and its splits.

    Args:
        model: A model that was trained before; see `Table`.
    """
    source = Table(table, model)
    metric = METRICS[source.problem]
    if metric is classification_scores:
        metric = partial(metric, classes=len(source.names))
    elif table.class_weights:
        raise ValueError(f"--class_weights {table.class_weights} is for one class a row; this is {source.problem}.")
    several = tuple(source.columns) if len(source.columns) > 1 else ()
    if source.problem == "regression" and several:
        metric = partial(of_columns, metric, several)
    task = Task(
        tuple(source.texts),
        by_label(metric),
        tuple(source.names),
        problem=source.problem,
        label=source.label,
        label_columns=several,
        class_weights=table.class_weights,
        standardize=table.standardize_labels and source.problem == "regression",
        template=table.template or (None if model and is_trained(model) else Task.template),
        max_length=512,
    )
    file = table.train_file or table.validation_file or table.test_file
    return table.dataset or Path(file).name, task, source
