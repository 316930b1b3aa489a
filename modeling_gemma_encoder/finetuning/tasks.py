"""A task is a row of a table: which columns are read, what is to be said of them, and how that is scored.

`Task.load` gives the rows of a split, checked; `Task.encode` makes of a row what the model reads: `input_ids` and
`attention_mask` (seq_len,) and a label, or, where one of several candidates is chosen, lists of those (num_docs,).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, get_dataset_split_names, load_dataset
from transformers import PreTrainedTokenizerBase

from .._scripts.tables import FORMATS, at_row, fill_texts, read_file
from ..losses_gemma_encoder import IGNORE
from ..modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from ..templates import set_template
from .truncation import truncate

Metric = Callable[[np.ndarray, Dataset], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What is learned of a data set's rows: which texts are read, how, and how predictions are scored.

    Args:
        texts: The one or two columns that are read.
        problem: One class a row, several, a number, or a choice among candidates (a ranker then picks the best).
        labels: Names of the classes 0, 1, ...; rows may have the numbers or the names, in a list where several apply.
        metric: Predictions and rows, in the same order -> named scores, the best being the highest.
        prepare: Row -> what of it is not as it is read: `first` and `second`, texts; `label`; `keep`, {"first": (start,
            end)}, the characters that truncation must spare. Of a choice, `second`, `keep` and `label` are lists, one
            for each candidate, the label 1 where right.
        columns: What `prepare` asks of a row, besides `texts` and the label.
        template: How two texts are read as one; saved in the tokenizer. None: as it has it.
        label: Name of the column with the label; none where `prepare` finds it.
        label_columns: The columns of the data that the label's values are from, where there are several.
        max_length: Tokens that are read, unless the user says otherwise.
        validation, test: Names of the splits.
        group: Name of the column whose value rows have in common that belong together: when some rows are set aside,
            a group is as a whole.
        train_on: Name of the task that is trained instead, for a task without training rows.
        config: Name of the Hub's config, when it is not the task's.
        class_weights: What a row counts in the loss, by its class: "balanced", the training rows / (number of classes x
            rows of its class).
        standardize: Whether a fresh head learns a regression's labels less their mean, over their standard deviation;
            predictions are in the labels' units all the same.
        epochs, batch_size: Of training, unless the user says otherwise. Our choice.
    """

    texts: tuple[str, ...]
    metric: Metric
    labels: tuple[str, ...] = ()
    problem: Literal["single_label_classification", "multi_label_classification", "regression", "choice"] = (
        "single_label_classification"
    )
    prepare: Callable[[dict], dict] | None = None
    columns: tuple[str, ...] = ()
    template: str | None = "{first}\n{second}"
    label: str | None = "label"
    label_columns: tuple[str, ...] = ()
    group: str | None = None
    max_length: int = 128
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    train_on: str | None = None
    config: str | None = None
    class_weights: Literal["balanced"] | None = None
    standardize: bool = False
    epochs: int = 3
    batch_size: int = 32

    @property
    def head(self) -> type:
        """The class that is fine-tuned."""
        return GemmaEncoderForRanking if self.problem == "choice" else GemmaEncoderForSequenceClassification

    @property
    def outputs(self) -> int:
        """How many numbers the model gives for a text."""
        return len(self.labels) if "classification" in self.problem else len(self.label_columns) or 1

    def load(self, source: "Source", split: str, labelled: bool = True) -> Dataset:
        """
        The rows of a split, labels as numbers in a column `label`. If not `labelled`, labels may be missing; then there
        is no such column.

        Raises:
            ValueError: the split is missing or empty, a column is missing or holds no text, or a label is not one of
                the task's.
        """
        rows, place = source.rows(split, self.texts), source.place(split)
        if not len(rows):
            raise ValueError(f"{place} has no rows.")
        needed = [*self.texts, *self.columns, *([self.label] if labelled and self.label else [])]
        if missing := [column for column in needed if column not in rows.column_names]:
            has = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"{place} has no column {', '.join(map(repr, missing))}; it has {has}.")
        for column in self.texts:
            # Empty ones pass, see `fill_texts`: a few of QQP's questions are.
            wrong = next((number for number, text in enumerate(rows[column]) if not isinstance(text, str)), None)
            if wrong is not None:
                raise ValueError(f"{place}, row {wrong}: {column!r} is {rows[column][wrong]!r}, not a text.")
        if self.label in rows.column_names:
            labels = list(rows[self.label])
            rows = rows.remove_columns({self.label, "label"} & set(rows.column_names))
            of_minus_one = all if self.problem == "regression" else any  # -1 may be a number
            if labelled or not (None in labels or of_minus_one(label == -1 for label in labels)):
                labels = [self._label(label, f"{place}, row {number}") for number, label in enumerate(labels)]
                rows = rows.add_column("label", labels)
        return rows

    def _label(self, value: Any, where: str) -> int | float | list[float]:
        if self.problem == "multi_label_classification":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{where}: label {value!r} is not a list of the labels that apply.")
            found = {self._class(item, where) for item in value}
            return [float(number in found) for number in range(len(self.labels))]
        if self.labels:
            return self._class(value, where)
        if self.label_columns:
            if not isinstance(value, Sequence) or len(value) != len(self.label_columns):
                raise ValueError(f"{where}: label {value!r} is not {len(self.label_columns)} numbers.")
            return [
                self._number(item, f"{where}, {name!r}") for item, name in zip(value, self.label_columns, strict=True)
            ]
        return self._number(value, where)

    def _number(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise ValueError(f"{where}: label {value!r} is not a number.")
        return float(value)

    def _class(self, value: Any, where: str) -> int:
        if isinstance(value, str) and value in self.labels:
            return self.labels.index(value)
        if isinstance(value, (bool, int)) and 0 <= value < len(self.labels):
            return int(value)
        raise ValueError(
            f"{where}: label {value!r} is none of {', '.join(self.labels)}, nor their number, 0 to "
            f"{len(self.labels) - 1}."
        )

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        return tokenizer if self.template is None else set_template(tokenizer, pair=self.template)

    def read(self, row: dict) -> dict:
        """What of a row is read: `first`, perhaps `second` and `keep`, and the label where there is one."""
        read = dict(zip(("first", "second"), (row[column] for column in self.texts), strict=False))
        if row.get("label") is not None:
            read["label"] = row["label"]
        return {**read, **(self.prepare(row) if self.prepare else {})}

    def fingerprint(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
        """What `encode` makes of rows has this name in the cache of `datasets`, which itself would hash for seconds."""
        functions = [Task.encode, truncate, *([self.prepare] if self.prepare else [])]
        code = [inspect.getsource(inspect.getmodule(function)) for function in functions]
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # as every call sets it anew, what the last one left is not part of the name
        backend.no_padding()
        read = repr((self.texts, self.problem, self.template, max_length, rows._fingerprint))
        return sha256("".join([*code, read, backend.to_str()]).encode()).hexdigest()[:32]

    def encode(self, row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
        """`input_ids`, `attention_mask`, whether they were `cut`, and `labels`: of a choice always, zeros if unknown.

        Labels of a choice also say, when lists are padded, which candidates there are.

        Raises:
            ValueError: a text has no token, or what is to be kept of it does not fit.
        """
        read = self.read(row)
        chooses = self.problem == "choice"
        seconds = read["second"] if chooses else [read.get("second")]
        kept = read.get("keep") if chooses else [read.get("keep")]
        pairs = ([read["first"]] * len(seconds), *([seconds] if seconds[0] is not None else []))
        whole = tokenizer(*pairs, verbose=False)["input_ids"]
        if not all(whole):  # an empty text, where the tokenizer begins with nothing, as Qwen's
            raise ValueError(
                f"{read['first']!r} has no token, as this tokenizer puts none around a text: give the row a text, or "
                "leave it out."
            )
        ids = [
            ids if len(ids) <= max_length else truncate(tokenizer, read["first"], second, max_length, keep or {})
            for ids, second, keep in zip(whole, seconds, kept or [{}] * len(seconds), strict=True)
        ]
        labels = {"labels": read["label"]} if "label" in read else {"labels": [0] * len(ids)} if chooses else {}
        cut = any(len(long) > max_length for long in whole)
        mask = [[1] * len(one) for one in ids]
        texts = (
            {"input_ids": ids, "attention_mask": mask} if chooses else {"input_ids": ids[0], "attention_mask": mask[0]}
        )
        return {**texts, **labels, "cut": cut}


@dataclass(frozen=True)
class Source:
    """Where the splits of a task are: files `<folder>/<split>.jsonl` (.json, .csv, .tsv, .parquet), or the Hub."""

    dataset: str | None = None
    config: str | None = None
    folder: Path | None = None

    def place(self, split: str) -> str:
        return f"{self.folder}, split {split!r}" if self.folder else f"{self.dataset} ({self.config}), split {split!r}"

    def where(self, split: str, row: int) -> str:
        """Return the place of a row, counted from 0, with its line where the file has one a row."""
        path = self._path(split)
        return at_row(str(path or self.place(split)), row, path)

    def splits(self) -> list[str]:
        if self.folder is None:
            return get_dataset_split_names(self.dataset, self.config)
        return sorted(path.stem for path in self.folder.glob("*.*") if path.suffix in FORMATS)

    def rows(self, split: str, texts: Sequence[str] = ()) -> Dataset:
        if self.folder is None:
            return fill_texts(load_dataset(self.dataset, self.config, split=split), texts, self.place(split))
        if path := self._path(split):
            return fill_texts(read_file(path, texts), texts, self.place(split))
        found = ", ".join(self.splits()) or "none"
        raise ValueError(f"{self.folder / split}.jsonl does not exist; splits there: {found}.")

    def _path(self, split: str) -> Path | None:
        paths = [self.folder / f"{split}{suffix}" for suffix in FORMATS] if self.folder else []
        return next((path for path in paths if path.exists()), None)


def say_empty(name: str, source: "Source", split: str, rows: Dataset, texts: Sequence[str]) -> None:
    """Print how many rows of a split have a text without a word, and which is the first."""
    columns = [list(rows[column]) for column in texts]
    empty = [row for row, found in enumerate(zip(*columns, strict=True)) if not all(map(str.strip, found))]
    if empty:
        column = next(column for column, values in zip(texts, columns, strict=True) if not values[empty[0]].strip())
        first = f"the first is {source.where(split, empty[0])}, column {column!r}"
        print(f"{name}, {split}: {len(empty):,} of {len(rows):,} rows have an empty text; {first}", flush=True)


def by_label(metric: Callable[[np.ndarray, np.ndarray], dict[str, float]]) -> Metric:
    """A metric of predictions and labels as one of predictions and rows."""
    return lambda predictions, rows: metric(predictions, np.array(rows["label"]))


def most_frequent(task: Task, train: Dataset, rows: Dataset) -> np.ndarray:
    """What one says who has not read the rows: the commonest class, the mean number, or the first candidate."""
    if task.problem == "choice":
        return np.zeros(len(rows), dtype=int)
    labels = np.array(train["label"])
    if task.problem == "single_label_classification":
        return np.full(len(rows), np.bincount(labels).argmax())
    mean = np.broadcast_to(labels.mean(0), (len(rows), *labels.shape[1:]))
    return mean if task.problem == "regression" else (mean > 0.5).astype(int)


def predictions_of(task: Task, logits: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Scores -> classes (n,), zeros and ones (n, num_labels), numbers (n,) or (n, num_labels), or which candidate of
    each list is the best (n,).

    Args:
        labels: Of choices, whose shorter lists are padded with -100.
    """
    if task.problem == "choice":
        return np.where(labels == IGNORE, -np.inf, logits).argmax(-1)
    if task.problem == "multi_label_classification":
        return (logits > 0).astype(int)
    if task.problem == "single_label_classification":
        return logits.argmax(-1)
    return logits if task.label_columns else logits[:, 0]
