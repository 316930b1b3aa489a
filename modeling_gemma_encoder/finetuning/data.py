"""The splits of a task, checked and encoded before a model is trained or scored on them."""

import json
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..checkpoints import load_tokenizer
from ..configuration_gemma_encoder import GemmaEncoderConfig
from .arguments import FineTuningArguments
from .model import weighted_loss
from .tasks import Source, Task, say_empty


@dataclass(frozen=True)
class Splits:
    """The rows of a task, as numbers and texts.

    Args:
        drawn: The places of the training rows in their split, where only some of them are used.
    """

    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    drawn: list[int] | None = None

    @property
    def by_name(self) -> dict[str, Dataset]:
        """Return all splits by their names."""
        train = {} if self.train is None else {"train": self.train}
        return {**train, **self.validation, **self.test}


@dataclass(frozen=True)
class Reader:
    """What turns a row into tokens: a task, its tokenizer, and the number of tokens that are read."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int


@dataclass(frozen=True)
class Place:
    """Where the rows of a split come from, for messages that name a row.

    Args:
        numbers: The places of the rows in their split, where they are not all of them in order.
    """

    source: Source
    split: str
    numbers: list[int] | None = None

    def of_row(self, row: int) -> str:
        """Return the place of a row, counted from 0 among those that are used."""
        return self.source.where(self.split, row if self.numbers is None else self.numbers[row])


@dataclass
class Data:
    """The splits of a task, checked and encoded.

    Args:
        encoded: What `Task.encode` makes of each split.
        digests: A hash of the content of each split.
        sources: What a model card says about the origin of each split.
    """

    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    encoded: dict[str, Dataset]
    digests: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, name: str, task: Task, source: Source, options: FineTuningArguments, args: TrainingArguments
    ) -> "Data":
        """Read, check and encode the splits that a run needs.

        Args:
            name: What the task is called in messages.

        Raises:
            ValueError: A split, a column, a label, or the length of a text is not what the task
                needs.
        """
        splits = read_splits(task, source, args)
        if args.process_index == 0:
            for split, rows in splits.by_name.items():
                say_empty(name, source, split, rows, task.texts)
        splits = limit_rows(splits, options, args.seed)
        if splits.train is not None and task.class_weights:
            weighted_loss(task, splits.train)  # a class without a row is an error before anything is encoded
        reader = make_reader(task, options, args)
        encoded = {}
        for split, rows in splits.by_name.items():
            place = Place(source, split, splits.drawn if split == "train" else None)
            with args.main_process_first():
                encoded[split] = encode(rows, reader, place, name, options.preprocessing_num_workers)
            if args.process_index == 0 and (cut := np.mean(encoded[split]["cut"])):
                print(f"{name}, {split}: {cut:.1%} of the rows are cut to {reader.max_length} tokens", flush=True)
        digests = {split: digest(rows) for split, rows in splits.by_name.items()}
        return cls(splits.train, splits.validation, splits.test, encoded, digests, reader.tokenizer, reader.max_length)


def read_splits(task: Task, source: Source, args: TrainingArguments) -> Splits:
    """Read the splits that a run trains on, evaluates and predicts."""
    train = task.load(source, "train") if args.do_train and not task.train_on else None
    validation = {split: task.load(source, split) for split in task.validation} if args.do_eval else {}
    # A task without training rows is a diagnostic: its test set is all that it is for.
    predicted = args.do_predict or task.train_on
    test = {split: task.load(source, split, labelled=False) for split in task.test} if predicted else {}
    return Splits(train, validation, test)


def limit_rows(splits: Splits, options: FineTuningArguments, seed: int) -> Splits:
    """Draw `--max_train_samples` training rows, and take the first `--max_eval_samples` of each
    validation split."""
    train, validation, drawn = splits.train, splits.validation, None
    if train is not None and options.max_train_samples and options.max_train_samples < len(train):
        order = Dataset.from_dict({"row": range(len(train))}).shuffle(seed=seed)
        drawn = order["row"][: options.max_train_samples]
        train = train.select(drawn)
    if limit := options.max_eval_samples:
        validation = {split: rows.select(range(min(limit, len(rows)))) for split, rows in validation.items()}
    return Splits(train, validation, splits.test, drawn)


def make_reader(task: Task, options: FineTuningArguments, args: TrainingArguments) -> Reader:
    """Load the tokenizer with the task's template and the number of tokens that are read.

    The number is `--max_length`; for a model that is not trained here the one it was trained with,
    if it was saved; and otherwise the task's. It is never more than the decoder has positions.
    """
    tokenizer = task.set_template(load_tokenizer(options.model))
    positions = GemmaEncoderConfig.from_pretrained(options.model).max_position_embeddings
    saved = tokenizer.model_max_length
    as_trained = saved if not args.do_train and saved <= positions else None
    max_length = min(options.max_length or as_trained or task.max_length, positions)
    template = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < template + 2:
        raise ValueError(f"--max_length {max_length} leaves no room beside the template's {template} tokens.")
    tokenizer.model_max_length = max_length  # saved with the model, which is then read as it was trained
    return Reader(task, tokenizer, max_length)


def encode(rows: Dataset, reader: Reader, place: Place, name: str, num_proc: int | None) -> Dataset:
    """Encode a split, or read it from the cache of `datasets`."""
    return rows.map(
        encode_row,
        with_indices=True,
        fn_kwargs={"reader": reader, "place": place},
        remove_columns=rows.column_names,
        new_fingerprint=reader.task.fingerprint(rows, reader.tokenizer, reader.max_length),
        num_proc=num_proc,
        desc=f"{name}, {place.split}",
    )


def encode_row(row: dict, number: int, reader: Reader, place: Place) -> dict:
    """Encode a row with `Task.encode`. A ValueError begins with the place of the row."""
    try:
        return reader.task.encode(row, reader.tokenizer, reader.max_length)
    except ValueError as error:
        raise ValueError(f"{place.of_row(number)}: {error}") from error


def digest(rows: Dataset) -> str:
    """Return a hash of the content of rows."""
    found = sha256()
    for part in rows.with_format("arrow").iter(1000):
        found.update(json.dumps(part.to_pydict(), default=str).encode())
    return found.hexdigest()[:16]
