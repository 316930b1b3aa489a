"""Fine-tunes a Gemma Encoder on your own table: CSV, TSV, JSONL, JSON or Parquet, or a data set on the Hub.

    python examples/classify.py --model google/gemma-3-270m --train_file train.csv --validation_file dev.csv \\
        --text_column text --label_column label
    python examples/classify.py --model google/gemma-3-270m --dataset stanfordnlp/imdb --validation_split test
    python examples/classify.py ... --text_column question answer --template "Question: {first} Answer: {second}"
    python examples/classify.py ... --label_column toxic obscene insult     # several labels a row, columns of 0 and 1
    python examples/classify.py ... --label_column stars --problem regression

Names of the classes are those found in the training labels, and are kept in the model's config. Without validation rows
a tenth of the training rows is held out. Every flag of `TrainingArguments` works. `<output_dir>/seed-<n>` holds the
model, which `AutoModelForSequenceClassification.from_pretrained(..., trust_remote_code=True)` and pipelines load,
`results.json` and plots; `--do_predict` with `--test_file` adds `predictions.csv`. The same command again resumes or
reads what is there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from scipy.special import softmax
from sklearn.metrics import r2_score

from modeling_gemma_encoder.files import write
from modeling_gemma_encoder.metrics import accuracy_and_macro_f1, micro_and_macro_f1, pearson_and_spearman
from modeling_gemma_encoder.recipes import fail, failing
from modeling_gemma_encoder.runs import Data, claim, fine_tune, predictions
from modeling_gemma_encoder.suites import cannot_run, conclude, make_parser, of_run, parse
from modeling_gemma_encoder.tasks import Task, by_label, read_file


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
    text_column: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "One column, or two for pairs."})
    label_column: list[str] = field(
        default_factory=lambda: ["label"], metadata={"help": "One column, or several of 0 and 1."}
    )
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "Default: by the training labels; numbers with a fraction are regression."}
    )
    template: str = field(default="{first}\n{second}", metadata={"help": "How two texts are read as one."})
    seeds: list[int] | None = field(default=None, metadata={"help": "A run for each. Default: --seed alone."})

    def complaint(self, do_predict: bool) -> str | None:
        """What cannot be, in the words of the command line."""
        if (self.train_file is None) == (self.dataset is None):
            return "give either --train_file or --dataset"
        if len(self.text_column) > 2:
            return f"--text_column takes one or two columns, got {', '.join(self.text_column)}"
        if do_predict and not (self.test_file or self.dataset):
            return "--do_predict needs --test_file"
        return None


class Table:
    """The splits as a task's source: classes by their names, several columns of labels joined to one of lists.

    Raises:
        ValueError: a file or a column is not what the command line says.
    """

    def __init__(self, table: TableArguments):
        self.table = table
        self.files = {"train": table.train_file, "validation": table.validation_file, "test": table.test_file}
        self.splits = {"train": table.train_split, "validation": table.validation_split, "test": table.test_split}
        self.label = table.label_column[0] if len(table.label_column) == 1 else "label"
        self.problem, self.names = self._describe(self._read("train"))
        self.held_out = 0.0

    def place(self, split: str) -> str:
        return self.files[split] or f"{self.table.dataset}, split {self.splits[split]!r}"

    def hold_out(self) -> None:
        """A tenth of the training rows becomes validation rows, if there are none."""
        if not (self.files["validation"] or self.splits["validation"]):
            self.held_out = 0.1

    def rows(self, split: str, texts: Sequence[str] = ()) -> Dataset:
        if self.held_out and split != "test":
            parts = self._read("train").train_test_split(self.held_out, seed=0)
            rows = parts["train" if split == "train" else "test"]
        else:
            rows = self._read(split)
        if self.problem == "regression" or self.label not in rows.column_names:
            return rows
        names = [as_names(value, rows.features[self.label]) for value in rows[self.label]]
        return rows.remove_columns(self.label).add_column(self.label, names)

    def as_written(self, split: str) -> Dataset:
        if self.table.dataset:
            name, _, config = self.table.dataset.partition(":")
            return load_dataset(name, config or None, split=self.splits[split])
        return read_file(Path(self.files[split]), self.table.text_column)

    def _read(self, split: str) -> Dataset:
        rows = self.as_written(split)
        columns = self.table.label_column
        if len(columns) == 1 or not set(columns) <= set(rows.column_names):
            return rows
        if wrong := [column for column in columns if not set(rows[column]) <= {0, 1}]:
            raise ValueError(f"{self.place(split)}: column {wrong[0]!r} holds more than 0 and 1.")
        flags = np.array([rows[column] for column in columns]).T
        lists = [[columns[number] for number in np.flatnonzero(row)] for row in flags]
        return rows.remove_columns(columns).add_column("label", lists)

    def _describe(self, rows: Dataset) -> tuple[str, list[str]]:
        """What the training labels are, unless the command line says it, and the names of the classes."""
        if self.label not in rows.column_names:
            missing = ", ".join(set(self.table.label_column) - set(rows.column_names))
            raise ValueError(f"{self.place('train')} has no column {missing}; it has {', '.join(rows.column_names)}.")
        values, kind = rows[self.label], rows.features[self.label]
        problem = self.table.problem
        if not values:
            raise ValueError(f"{self.place('train')} has no rows.")
        if isinstance(values[0], list) and problem not in (None, "multi_label_classification"):
            raise ValueError(f"{self.place('train')}: {self.label!r} holds lists, which are several labels a row.")
        if problem is None and isinstance(values[0], list):
            problem = "multi_label_classification"
        elif problem is None:
            fractions = any(isinstance(value, float) and not value.is_integer() for value in values)
            problem = "regression" if fractions else "single_label_classification"
        if problem == "regression":
            return problem, []
        if len(self.table.label_column) > 1:
            return problem, self.table.label_column
        found = [as_names(value, kind) for value in values]
        names = {name for row in found for name in row} if problem == "multi_label_classification" else set(found)
        if None in names:
            raise ValueError(f"{self.place('train')}: {self.label!r} is empty in row {found.index(None)}.")
        if len(names) < 2:
            raise ValueError(f"{self.place('train')}: {self.label!r} holds nothing but {', '.join(names)!r}.")
        return problem, sorted(names, key=lambda name: (float(name), name) if name.isdigit() else (math.inf, name))


def as_names(value, kind):
    """A label, or a list of labels, as text: the name where the data set has names, otherwise as it is written."""
    if isinstance(value, list):
        return [as_names(item, kind.feature) for item in value]
    if isinstance(kind, ClassLabel):
        return None if value in (None, -1) else kind.int2str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


def task_of(table: TableArguments) -> tuple[str, Task, Table]:
    """What results and cards call a table, what is to be learned of it, and its splits."""
    source = Table(table)
    metric = METRICS[source.problem]
    if metric is one_class:
        metric = partial(one_class, classes=len(source.names))
    task = Task(
        tuple(table.text_column),
        by_label(metric),
        tuple(source.names),
        problem=source.problem,
        label=source.label,
        template=table.template,
        max_length=512,
    )
    return table.dataset or Path(table.train_file).name, task, source


def main():
    parser = make_parser(TableArguments, "runs/classify", __doc__)
    given = parser.parse_args()
    table = TableArguments(**{name: getattr(given, name) for name in TableArguments.__dataclass_fields__})
    if problem := table.complaint(given.do_predict):
        fail(parser, problem)
    with failing(parser):
        name, task, source = task_of(table)
        table, options, args = parse(parser, task)
        folder, seeds = Path(args.output_dir), table.seeds or [args.seed]
        if problem := cannot_run(args, [task], seeds, options):
            fail(parser, problem)
        task.load(source, "train")  # all of them, in the file's order, for messages that name a row
        source.hold_out()
        data = Data.load(name, task, source, options, args)
        runs = {seed: of_run(args, folder / f"seed-{seed}", seed, "classify") for seed in seeds}
        for run_args in runs.values():
            claim(name, task, data, options, run_args, None)
        answered = source.as_written("test") if data.test else None
        if answered and (taken := {"prediction", "probability"} & set(answered.column_names)):
            raise ValueError(f"{source.place('test')} has a column {taken.pop()!r} already; rename it.")

    for seed, run_args in runs.items():
        fine_tune(name, task, data, options, run_args)
        if data.test and args.process_index == 0:
            rows = answered.to_pandas().assign(**answers(task, *predictions(folder / f"seed-{seed}", "test")))
            write(folder / f"seed-{seed}" / "predictions.csv", rows.to_csv(index=False).rstrip())
    if args.process_index == 0:
        conclude(folder, sorted(folder.glob("seed-*/results.json")), options.model, {})


def answers(task: Task, predicted: np.ndarray, logits: np.ndarray) -> dict[str, list]:
    """Predictions in the words of the data: a class and its probability, classes with | between them, or a number."""
    if task.problem == "regression":
        return {"prediction": predicted.tolist()}
    if task.problem == "multi_label_classification":
        names = np.array(task.labels)
        return {"prediction": ["|".join(names[row == 1]) for row in predicted]}
    probabilities = softmax(logits, axis=-1).max(-1)
    return {"prediction": [task.labels[value] for value in predicted], "probability": probabilities.round(4).tolist()}


if __name__ == "__main__":
    main()
