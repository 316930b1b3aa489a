"""Tasks: which columns of a data set are read, what is learned of them, and how predictions are
scored.

`Task.load` returns the checked rows of a split. `Task.encode` turns a row into what the model
reads: `input_ids` and `attention_mask` (seq_len,), and a label. Where one of several candidates is
chosen, these are lists of num_docs.
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
    """What is learned of the rows of a data set.

    Args:
        texts: The one or two columns that are read.
        metric: A function of predictions and rows in the same order. It returns named scores, of
            which higher is better.
        labels: The names of the classes 0, 1, ... Rows have the numbers or the names, in a list
            where several apply.
        problem: A class of each row, several classes, a number, or a choice among candidates, which
            a ranker scores.
        prepare: A function of a row that returns what is not read as it is: the texts `first` and
            `second`; `label`; and `keep`, the characters that truncation must spare, as {"first":
            (start, end)}. Of a choice `second`, `keep` and `label` are lists with an entry for each
            candidate; the label of the right one is 1.
        columns: The columns that `prepare` reads besides `texts` and the label.
        template: The text into which two texts are set, which is saved in the tokenizer. None: the
            tokenizer's own.
        label: The name of the column with the label. None: `prepare` finds it.
        label_columns: The columns of the data that the values of a label are from, where there are
            several.
        max_length: The number of tokens that are read, unless the user says otherwise.
        validation, test: The names of the splits.
        group: The name of a column. Rows with the same value in it are never parted when rows are
            set aside.
        train_on: The name of the task that is trained instead of one without training rows.
        config: The name of the config on the Hub, where it is not the task's.
        class_weights: The weight of a row in the loss. "balanced": the number of training rows /
            (number of classes x rows of its class).
        standardize: Whether a fresh head learns a regression's labels less their mean, over their
            standard deviation. Predictions are in the units of the labels all the same.
        epochs, batch_size: How a task is trained, unless the user says otherwise. Our choice.
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
        """Return the class of the model that is fine-tuned."""
        return GemmaEncoderForRanking if self.problem == "choice" else GemmaEncoderForSequenceClassification

    @property
    def outputs(self) -> int:
        """Return the number of logits for a text."""
        return len(self.labels) if "classification" in self.problem else len(self.label_columns) or 1

    def load(self, source: "Source", split: str, labelled: bool = True) -> Dataset:
        """
        Return the rows of a split, with labels as numbers in a column `label`.

        Args:
            labelled: Whether every row must have a label. If not, there is no such column where one
                is missing.

        Raises:
            ValueError: The split is missing or empty, a column is missing or holds something else
                than text, or a label is not one of the task's.
        """
        rows, place = source.rows(split, self.texts), source.place(split)
        self._check_columns(rows, place, [self.label] if labelled and self.label else [])
        if self.label not in rows.column_names:
            return rows
        labels = list(rows[self.label])
        rows = rows.remove_columns({self.label, "label"} & set(rows.column_names))
        # GLUE's test rows have -1 in place of a label, which among numbers may be one.
        of_minus_one = all if self.problem == "regression" else any
        if not labelled and (None in labels or of_minus_one(label == -1 for label in labels)):
            return rows
        labels = [self._label(label, f"{place}, row {number}") for number, label in enumerate(labels)]
        return rows.add_column("label", labels)

    def _check_columns(self, rows: Dataset, place: str, labels: list[str]) -> None:
        if not len(rows):
            raise ValueError(f"{place} has no rows.")
        if missing := [column for column in (*self.texts, *self.columns, *labels) if column not in rows.column_names]:
            has = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"{place} has no column {', '.join(map(repr, missing))}; it has {has}.")
        for column in self.texts:
            # Empty texts pass: a few of QQP's questions are empty.
            wrong = next((number for number, text in enumerate(rows[column]) if not isinstance(text, str)), None)
            if wrong is not None:
                raise ValueError(f"{place}, row {wrong}: {column!r} is {rows[column][wrong]!r}, not a text.")

    def _label(self, value: Any, where: str) -> int | float | list[float]:
        if self.problem == "multi_label_classification":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{where}: label {value!r} is not a list of the labels that apply.")
            found = {self._class(item, where) for item in value}
            return [float(number in found) for number in range(len(self.labels))]
        if self.labels:
            return self._class(value, where)
        if not self.label_columns:
            return self._number(value, where)
        if not isinstance(value, Sequence) or len(value) != len(self.label_columns):
            raise ValueError(f"{where}: label {value!r} is not {len(self.label_columns)} numbers.")
        named = zip(value, self.label_columns, strict=True)
        return [self._number(item, f"{where}, {name!r}") for item, name in named]

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
            f"{where}: the label must be one of {', '.join(self.labels)}, or its number, 0 to {len(self.labels) - 1}; "
            f"got {value!r}."
        )

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a tokenizer that reads two texts as the task says."""
        return tokenizer if self.template is None else set_template(tokenizer, pair=self.template)

    def read(self, row: dict) -> dict:
        """Return what is read of a row: `first`, `second` and `keep` if there are any, and the
        label if it has one."""
        read = dict(zip(("first", "second"), (row[column] for column in self.texts), strict=False))
        if row.get("label") is not None:
            read["label"] = row["label"]
        return {**read, **(self.prepare(row) if self.prepare else {})}

    def fingerprint(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
        """Return the name of encoded rows in the cache of `datasets`, which would take seconds to
        find one itself."""
        functions = [Task.encode, truncate, *([self.prepare] if self.prepare else [])]
        code = [inspect.getsource(inspect.getmodule(function)) for function in functions]
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # what the last call left is set anew by the next, and not part of the name
        backend.no_padding()
        read = repr((self.texts, self.problem, self.template, max_length, rows._fingerprint))
        return sha256("".join([*code, read, backend.to_str()]).encode()).hexdigest()[:32]

    def encode(self, row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
        """
        Return `input_ids`, `attention_mask`, `labels`, and whether a text was `cut`.

        Lists of candidates always have labels, zeros if they are not known: where lists are padded,
        labels say which candidates there are.

        Raises:
            ValueError: A text has no token, or what is to be kept of it does not fit.
        """
        read, chooses = self.read(row), self.problem == "choice"
        seconds = read["second"] if chooses else [read.get("second")]
        keeps = (read.get("keep") or [{}] * len(seconds)) if chooses else [read.get("keep") or {}]
        pairs = ([read["first"]] * len(seconds), *([seconds] if seconds[0] is not None else []))
        whole = tokenizer(*pairs, verbose=False)["input_ids"]
        if not all(whole):  # an empty text, where the tokenizer puts no token before it, as Qwen's
            raise ValueError(
                f"{read['first']!r} has no token, as this tokenizer puts none around a text: give the row a text, or "
                "leave it out."
            )
        ids = [
            ids if len(ids) <= max_length else truncate(tokenizer, read["first"], second, max_length, keep)
            for ids, second, keep in zip(whole, seconds, keeps, strict=True)
        ]
        mask = [[1] * len(one) for one in ids]
        encoded = {"input_ids": ids, "attention_mask": mask}  # (num_docs, seq_len)
        if not chooses:
            encoded = {"input_ids": ids[0], "attention_mask": mask[0]}  # (seq_len,)
        if "label" in read:
            encoded["labels"] = read["label"]
        elif chooses:
            encoded["labels"] = [0] * len(ids)
        return {**encoded, "cut": any(len(long) > max_length for long in whole)}


@dataclass(frozen=True)
class Source:
    """The place of a task's splits: files `<folder>/<split>.jsonl` (.json, .csv, .tsv, .parquet),
    or the Hub."""

    dataset: str | None = None
    config: str | None = None
    folder: Path | None = None

    def place(self, split: str) -> str:
        """Return what messages call a split."""
        return f"{self.folder}, split {split!r}" if self.folder else f"{self.dataset} ({self.config}), split {split!r}"

    def where(self, split: str, row: int) -> str:
        """Return the place of a row, counted from 0, with its line where the file has one a row."""
        path = self._path(split)
        return at_row(str(path or self.place(split)), row, path)

    def splits(self) -> list[str]:
        """Return the names of all splits."""
        if self.folder is None:
            return get_dataset_split_names(self.dataset, self.config)
        return sorted(path.stem for path in self.folder.glob("*.*") if path.suffix in FORMATS)

    def rows(self, split: str, texts: Sequence[str] = ()) -> Dataset:
        """Return the rows of a split, with the columns `texts` as text."""
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
    """Return a metric of predictions and rows that compares predictions with the rows' labels."""
    return lambda predictions, rows: metric(predictions, np.array(rows["label"]))


def most_frequent(task: Task, train: Dataset, rows: Dataset) -> np.ndarray:
    """Return what is predicted without reading: the most frequent class, the mean number, or the
    first candidate."""
    if task.problem == "choice":
        return np.zeros(len(rows), dtype=int)
    labels = np.array(train["label"])
    if task.problem == "single_label_classification":
        return np.full(len(rows), np.bincount(labels).argmax())
    mean = np.broadcast_to(labels.mean(0), (len(rows), *labels.shape[1:]))
    return mean if task.problem == "regression" else (mean > 0.5).astype(int)


def predictions_of(task: Task, logits: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """
    Return the predictions that logits (rows, num_labels) stand for.

    Args:
        labels: The labels of a choice (rows, num_docs), whose shorter lists are padded with -100.

    Returns:
        Classes (rows,), zeros and ones (rows, num_labels), numbers (rows,) or (rows, num_labels),
        or the place of the best candidate in each list (rows,).
    """
    if task.problem == "choice":
        return np.where(labels == IGNORE, -np.inf, logits).argmax(-1)
    if task.problem == "multi_label_classification":
        return (logits > 0).astype(int)
    if task.problem == "single_label_classification":
        return logits.argmax(-1)
    return logits if task.label_columns else logits[:, 0]
