"""A user's own table as a task: its texts, its labels and what they are, and the rows that are held out."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForSequenceClassification

from .._scripts.files import read
from .._scripts.tables import at_row, fill_texts, read_file
from .metrics import accuracy_and_macro_f1, micro_and_macro_f1, of_columns, pearson_and_spearman
from .tasks import Task, by_label


def one_class(predictions: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    scores = accuracy_and_macro_f1(predictions, labels, classes)
    return {"accuracy": scores["accuracy"], "macro_f1": scores["f1"]}


def number(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Correlations, and R², which also notices a wrong scale: 0 is as good as always saying the mean."""
    return {**pearson_and_spearman(predictions, labels), "r2": float(r2_score(labels, predictions))}


METRICS = {
    "single_label_classification": one_class,
    "multi_label_classification": micro_and_macro_f1,
    "regression": number,
}


@dataclass
class TableArguments:
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    dataset: str | None = field(default=None, metadata={"help": "On the Hub, as `name` or `name:config`, instead."})
    train_split: str = field(default="train", metadata={"help": "Of --dataset."})
    validation_split: str | None = field(default=None, metadata={"help": "Of --dataset."})
    test_split: str = field(default="test", metadata={"help": "Of --dataset, for --do_predict."})
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs. Default: text; with --do_train false as --model was trained."},
    )
    label_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "One column, several of 0 and 1, or several of numbers with --problem regression. Default: label; "
            "with --do_train false as --model was trained."
        },
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Of the classes, where labels are lists of 0 and 1. Default: 0, 1, 2, ..."}
    )
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "Default: by the training labels; numbers with a fraction are regression."}
    )
    template: str | None = field(
        default=None,
        metadata={"help": "How two texts are read as one. Default: {first}\n{second}, or as a trained --model does."},
    )
    class_weights: Literal["balanced"] | None = field(
        default=None,
        metadata={"help": "What a row counts in the loss; balanced: training rows / (classes x rows of its class)."},
    )
    standardize_labels: bool = field(
        default=True,
        metadata={
            "help": "A regression learns labels less their mean, over their deviation, and predicts them as read."
        },
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "A run for each. Default: --seed alone."})

    @property
    def lacks_training(self) -> bool:
        return self.train_file is None and self.dataset is None

    def complaint(self, do_train: bool, do_eval: bool, do_predict: bool) -> str | None:
        """What cannot be, in the words of the command line."""
        if (do_train and self.lacks_training) or (self.train_file and self.dataset):
            return "give either --train_file or --dataset"
        if self.lacks_training and do_eval and not self.validation_file:
            return "--do_eval needs --validation_file; or give --do_eval false"
        if self.text_column and len(self.text_column) > 2:
            return f"--text_column takes one or two columns, got {', '.join(self.text_column)}"
        if self.class_names and (self.lacks_training or len(self.label_column or ()) > 1):
            return "--class_names is for training on one column of lists of 0 and 1"
        if self.problem == "single_label_classification" and len(self.label_column or ()) > 1:
            return f"--problem {self.problem} takes one --label_column, got {', '.join(self.label_column)}"
        if self.class_weights and not do_train:
            return f"--class_weights {self.class_weights} is for training"
        if do_predict and not (self.test_file or self.dataset):
            return "--do_predict needs --test_file"
        if not (do_train or do_eval or do_predict):
            return "there is nothing to do without --do_train, --do_eval and --do_predict"
        return None


NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

PLAIN = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,6})?")

DECIMAL_COMMA = re.compile(r"\s*[+-]?[0-9]+,[0-9]+\s*")


def is_number(value: str) -> bool:
    """Whether a cell of a .csv or .tsv file is to be read as a number: "007" is a name, and "nan" is none."""
    return bool(NUMBER.fullmatch(value.strip())) and not re.match(r"\s*[+-]?0\d", value)


def is_plain(value: str) -> bool:
    """Whether a class may be called by the number that is written: "1.0" is 1, but "1e5" and long ids are names."""
    return bool(PLAIN.fullmatch(value.strip())) and is_number(value)


def are_flags(values: Sequence, kind) -> bool:
    """Whether lists of labels are as many zeros and ones, two or more, which say of each class whether it is one."""
    named = isinstance(getattr(kind, "feature", None), ClassLabel)  # then they are numbers of names
    return bool(values) and not named and all(only_flags(one) and len(one) == len(values[0]) > 1 for one in values)


def only_flags(value) -> bool:
    return isinstance(value, list) and all(not isinstance(item, str) and item in (0, 1) for item in value)


class Table:
    """The splits as a task's source: classes by their names, several columns of labels joined to one of lists.

    Args:
        model: A trained one, whose columns these are unless the command line names others, and, where there is nothing
            to train on, whose problem and classes. Default: those of the training labels.

    Raises:
        ValueError: a file, a column or the model is not what the command line says.
    """

    def __init__(self, table: TableArguments, model: str | None = None):
        self.table, self.began = table, began_with(model)
        self.texts = table.text_column or self.began.get("texts") or ["text"]
        self.columns = table.label_column or self.began.get("label_columns") or [self.began.get("label") or "label"]
        self.files = {"train": table.train_file, "validation": table.validation_file, "test": table.test_file}
        self.splits = {"train": table.train_split, "validation": table.validation_split, "test": table.test_split}
        self.label = self.columns[0] if len(self.columns) == 1 else "label"
        self.numbers, self.parts, self.flags, self.problem = False, {}, None, table.problem
        self.part = ""  # of the training rows, which is held out
        of_model = model is not None and table.lacks_training
        self.problem, self.names = self._of_model(model) if of_model else self._describe(self._read("train"))

    def place(self, split: str) -> str:
        split = "train" if split in self.parts else split
        return self.files[split] or f"{self.table.dataset}, split {self.splits[split]!r}"

    def where(self, split: str, row: int) -> str:
        """Return the place of a row, counted from 0 in its file, with its line where there is one."""
        file = self.files["train" if split in self.parts else split]
        return at_row(self.place(split), self.parts[split][row] if split in self.parts else row, file and Path(file))

    def source_of(self, split: str) -> dict[str, str]:
        """Return the file or data set that a split is of, without its folder, and which part of it, if held out."""
        own = "train" if split in self.parts else split
        file = self.files[own]
        found = {"data": Path(file).name} if file else {"data": self.table.dataset, "split": self.splits[own]}
        return {**found, "part": self.part} if own != split else found

    def hold_out(self) -> str:
        """Make a tenth of the training rows validation rows, if there are none, and return in words what was done."""
        if self.files["validation"] or self.splits["validation"]:
            return ""
        rows = self.rows("train")
        if self.problem == "single_label_classification":
            train, validation, how = stratified_tenth(list(rows[self.label]))
            if not validation:
                raise ValueError(f"{self.place('train')}: no class has two rows: give --validation_file.")
        else:
            parts = Dataset.from_dict({"row": range(len(rows))}).train_test_split(0.1, seed=0)
            train, validation, how = parts["train"]["row"][:], parts["test"]["row"][:], "a tenth"
        self.parts, self.part = {"train": train, "validation": validation}, how.partition(";")[0]
        return f"{self.place('train')}: {len(validation):,} of {len(rows):,} rows are held out, {how}"

    def rows(self, split: str, texts: Sequence[str] = ()) -> Dataset:
        rows = self._read(split if split not in self.parts else "train")
        if split in self.parts:
            rows = rows.select(self.parts[split])
        if self.label not in rows.column_names:
            return rows
        labels = [self._value(value, self.problem) for value in rows[self.label]]
        if self._has_flags(split, labels, rows.features[self.label]):
            labels = [row and [name for name, flag in zip(self.names, row, strict=True) if flag] for row in labels]
            return rows.remove_columns(self.label).add_column(self.label, labels)
        if self.problem == "regression":
            wrong = next((row for row, value in enumerate(labels) if isinstance(value, str)), None)
            if wrong is not None:
                raise ValueError(f"{self.place(split)}, row {wrong}: {self.label!r} is {labels[wrong]!r}, no number.")
        else:
            labels = [as_names(value, rows.features[self.label]) for value in labels]
        return rows.remove_columns(self.label).add_column(self.label, labels)

    def as_written(self, split: str) -> Dataset:
        """Every column of a .csv or .tsv file as text."""
        return self._load(split, None)

    def _load(self, split: str, texts: Sequence[str] | None) -> Dataset:
        if self.table.dataset:
            name, _, config = self.table.dataset.partition(":")
            return load_dataset(name, config or None, split=self.splits[split])
        return read_file(Path(self.files[split]), texts)

    def _has_flags(self, split: str, labels: list, kind) -> bool:
        """Whether a split's labels are lists of zeros and ones; ValueError if only the training's were."""
        if self.problem != "multi_label_classification" or self.flags is False or len(self.columns) > 1:
            return False
        known = {row: value for row, value in enumerate(labels) if value is not None}
        given = are_flags(list(known.values()), kind) and len(next(iter(known.values()))) == len(self.names)
        if self.flags and known and not given:
            wrong = next(row for row, one in known.items() if not only_flags(one) or len(one) != len(self.names))
            found = f"{self.place(split)}, row {wrong}: {self.label!r} is {labels[wrong]}"
            raise ValueError(f"{found}, not {len(self.names)} zeros and ones.")
        return given

    def _value(self, value, problem: str | None):
        """Of a label's cell: None where it is empty, a number where it is to be one."""
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        is_one = is_number if problem == "regression" else is_plain
        return float(value) if self.numbers and is_one(value) else value

    def _of_model(self, model: str) -> tuple[str, list[str]]:
        config = GemmaEncoderConfig.from_pretrained(model)
        if GemmaEncoderForSequenceClassification.__name__ not in (config.architectures or ()):
            raise ValueError(f"--model {model} is no trained classifier: give --train_file or --dataset.")
        problem = "regression" if config.num_labels == 1 else "single_label_classification"
        problem = config.problem_type or problem
        if self.table.problem not in (None, problem):
            raise ValueError(f"--problem {self.table.problem}: --model {model} was trained for {problem}.")
        names = list(config.id2label.values())
        if problem == "regression":
            if self.table.label_column is None and len(names) > 1:
                self.columns, self.label = names, "label"
            if len(self.columns) != len(names):
                raise ValueError(
                    f"--label_column {' '.join(self.columns)}: --model {model} predicts {len(names)} numbers."
                )
            names = []
        self.numbers = all(map(is_plain, names))
        return problem, names

    def _read(self, split: str) -> Dataset:
        columns = self.columns
        rows = self._load(split, [*self.texts, *(columns if len(columns) == 1 else [])])
        rows = fill_texts(rows, self.texts, self.place(split))
        absent = [column for column in self.texts if column not in rows.column_names]
        if absent and self.began and not self.table.text_column:
            has = ", ".join(rows.column_names)
            raise ValueError(
                f"{self.place(split)} has no column {', '.join(absent)}, which --model was trained on; it has {has}. "
                "--text_column names others."
            )
        missing = [column for column in columns if column not in rows.column_names]
        if 0 < len(missing) < len(columns) or (missing and len(columns) > 1 and split != "test"):
            has = ", ".join(rows.column_names)
            raise ValueError(f"{self.place(split)} has no column {', '.join(missing)}; it has {has}.")
        if len(columns) == 1:
            self._refuse_nulls(split, rows)
            return rows
        own = rows.remove_columns({*columns, "label"} & set(rows.column_names))  # "label" is what they become
        if missing:
            return own
        if self.problem == "regression":
            return own.add_column("label", self._numbers(split, rows))
        for column in columns:
            if others := [row for row, value in enumerate(rows[column]) if value not in (0, 1)]:
                found = f"{column!r} is {rows[column][others[0]]!r} in row {others[0]}"
                hint = "are numbers with --problem regression"
                raise ValueError(f"{self.place(split)}: {found}; several columns of labels hold 0 and 1, or {hint}.")
        flags = np.array([rows[column] for column in columns]).T
        lists = [[columns[number] for number in np.flatnonzero(row)] for row in flags]
        return own.add_column("label", lists)

    def _refuse_nulls(self, split: str, rows: Dataset) -> None:
        """Raise ValueError where a list of labels has a null; a null in place of a list is a row without labels."""
        for row, value in enumerate(rows[self.label] if self.label in rows.column_names else ()):
            if isinstance(value, list) and None in value:
                known = [item for item in value if item is not None]
                hint = "leave null out, and write [] where no label applies"
                if known and only_flags(known):
                    hint = "write 0 or 1 in place of null"
                file = self.files[split]
                where = at_row(self.place(split), row, file and Path(file))
                raise ValueError(f"{where}: {self.label!r} is {json.dumps(value, default=str)}; {hint}.")

    def _numbers(self, split: str, rows: Dataset) -> list[list[float] | None]:
        """The numbers of several columns, a list a row; of rows to be predicted None where one is empty."""
        self.numbers, lists = True, []
        for row, cells in enumerate(zip(*(rows[column] for column in self.columns), strict=True)):
            values = [self._value(cell, "regression") for cell in cells]
            for column, value in zip(self.columns, values, strict=True):
                if isinstance(value, str) or (value is None and split != "test"):
                    found = "empty" if value is None else f"{value!r}, no number"
                    raise ValueError(f"{self.place(split)}, row {row}: {column!r} is {found}.")
            lists.append(None if None in values else values)
        return lists

    def _describe(self, rows: Dataset) -> tuple[str, list[str]]:
        """What the training labels are, unless the command line says it, and the names of the classes."""
        if self.label not in rows.column_names:
            missing = ", ".join(set(self.columns) - set(rows.column_names))
            raise ValueError(f"{self.place('train')} has no column {missing}; it has {', '.join(rows.column_names)}.")
        values, kind = rows[self.label], rows.features[self.label]
        problem, place = self.table.problem, f"{self.place('train')}: {self.label!r}"
        if not values:
            raise ValueError(f"{self.place('train')} has no rows.")
        of_csv = self.table.train_file and Path(self.table.train_file).suffix in (".csv", ".tsv")
        if of_csv and isinstance(values[0], str):
            other = next((row for row, value in enumerate(values) if not is_number(value)), None)
            self.numbers = other is None
            if other is not None and values[other].strip():
                is_now = f"{place} is {values[other]!r} in row {other}"
                if problem == "regression":
                    raise ValueError(f"{is_now}, which is no number.")
                if problem is None and any(map(is_number, values)):
                    raise ValueError(f"{is_now}, and a number elsewhere; --problem single_label_classification if not.")
        written, values = values, [self._value(value, "regression") for value in values]
        if None in values:
            raise ValueError(f"{place} is empty in row {values.index(None)}.")
        if problem == "regression" and len(self.columns) > 1:
            return problem, []
        if isinstance(values[0], list) and problem not in (None, "multi_label_classification"):
            raise ValueError(f"{self.place('train')}: {self.label!r} holds lists, which are several labels a row.")
        if problem is None and isinstance(values[0], list):
            problem = "multi_label_classification"
        elif problem is None:
            fractions = any(isinstance(value, float) and not value.is_integer() for value in values)
            problem = "regression" if fractions else "single_label_classification"
        if problem == "regression":
            if self.table.class_names:
                raise ValueError(f"--class_names is for lists of zeros and ones; {place} holds numbers.")
            self.numbers = True
            return problem, []
        if len(self.columns) > 1:
            return problem, self.columns
        if isinstance(values[0], list) and (names := self._of_flags(values, kind, place)):
            return problem, names
        if self.table.class_names:
            raise ValueError(f"--class_names is for lists of zeros and ones; {place} has names of its own.")
        if of_csv and isinstance(written[0], str):
            self.numbers = all(map(is_plain, written))
            values = [self._value(value, problem) for value in written]
        found = [as_names(value, kind) for value in values]
        names = {name for row in found for name in row} if problem == "multi_label_classification" else set(found)
        if None in names:
            raise ValueError(f"{self.place('train')}: {self.label!r} is empty in row {found.index(None)}.")
        if len(names) < 2:
            raise ValueError(f"{self.place('train')}: {self.label!r} holds nothing but {', '.join(names)!r}.")
        self.numbers = all(map(is_plain, names))  # so a table of text writes them too, "1.0" for 1
        if len(names) == len(found) > 2 and all(map(DECIMAL_COMMA.fullmatch, names)):
            raise ValueError(
                f"{place} holds {found[0]!r} and as many classes as rows: write 0.5 for --problem regression."
            )
        say_alike(names, place)
        return problem, sorted(names, key=lambda name: (float(name), name) if name.isdigit() else (math.inf, name))

    def _of_flags(self, values: list[list], kind, place: str) -> list[str] | None:
        """The classes that lists of zeros and ones tell of; None where lists hold names."""
        self.flags = are_flags(values, kind)
        if not self.flags:
            repeated = [row for row, value in enumerate(values) if only_flags(value) and len(set(value)) < len(value)]
            if repeated:
                row = repeated[0]
                raise ValueError(f"{place} is {values[row]} in row {row}, and not in all rows as many zeros and ones.")
            return None
        names = self.table.class_names or [str(number) for number in range(len(values[0]))]
        if len(set(names)) < len(names):
            raise ValueError(f"--class_names gives a name twice: {', '.join(names)}.")
        if len(names) != len(values[0]):
            raise ValueError(f"--class_names gives {len(names)} names; {place} holds {len(values[0])} zeros and ones.")
        print(f"{place}: lists of zeros and ones, each of one of the classes {', '.join(names)} in turn")
        return names


def began_with(model: str | None) -> dict:
    """Return what the run that trained a model wrote down when it began, `run.json`; {} where there is none."""
    if model is None:
        return {}
    folder = Path(model)
    return read((folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json")


def is_trained(model: str) -> bool:
    """Return whether a checkpoint has a classifier's head."""
    architectures = GemmaEncoderConfig.from_pretrained(model).architectures
    return GemmaEncoderForSequenceClassification.__name__ in (architectures or ())


FEW = 10  # rows of a class, a tenth of which is less than one


def stratified_tenth(labels: Sequence[str]) -> tuple[list[int], list[int], str]:
    """
    Return the rows that are trained on, those that are held out, a tenth of each class, and that in words.

    A class with fewer than `FEW` rows has its first one trained on, so that no class is held out as a whole; a tenth of
    the further rows of all such classes together is held out.
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
    how = "a tenth of each class"
    if few:
        names = ", ".join(few[:5]) + ", ..." * (len(few) > 5)
        how += f"; classes with fewer than {FEW} rows ({names}) each have one trained on, and share their tenth"
    return sorted(train), sorted(validation), how


def say_alike(names: set[str], place: str) -> None:
    """Say which classes differ by blanks or case alone, or are one number; they stay what was written."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[float(name) if is_number(name) else " ".join(name.split()).casefold()].append(name)
    for group in groups.values():
        if len(group) > 1:
            alike = ", ".join(map(repr, group))
            print(f"{place}: {alike} are classes of their own, and differ only in how they are written.")


def as_names(value, kind):
    """A label, or a list of labels, as text: the name where the data set has names, otherwise as it is written."""
    if isinstance(value, list):
        return [as_names(item, kind.feature) for item in value]
    if isinstance(kind, ClassLabel):
        return None if value in (None, -1) else kind.int2str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


def task_of(table: TableArguments, model: str | None = None) -> tuple[str, Task, Table]:
    """What results and cards call a table, what is to be learned of it, or was by `model`, and its splits."""
    source = Table(table, model)
    metric = METRICS[source.problem]
    if metric is one_class:
        metric = partial(one_class, classes=len(source.names))
    elif table.class_weights:
        raise ValueError(f"--class_weights {table.class_weights} is for one class a row; this is {source.problem}.")
    several = tuple(source.columns[1:] and source.columns)
    if source.problem == "regression" and several:
        metric = partial(of_columns, number, several)
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
