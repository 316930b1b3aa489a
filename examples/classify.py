r"""Fine-tune a Gemma Encoder on your own table: CSV, TSV, JSONL, JSON or Parquet, or a data set on
the Hub.

    python examples/classify.py --model google/gemma-3-270m --train_file train.csv --validation_file dev.csv \
        --text_column text --label_column label
    python examples/classify.py --model google/gemma-3-270m --dataset stanfordnlp/imdb --validation_split test
    python examples/classify.py ... --text_column question answer --template "Question: {first} Answer: {second}"
    python examples/classify.py ... --label_column toxic obscene insult     # several labels a row, columns of 0 and 1
    python examples/classify.py ... --train_file train.jsonl --class_names toxic obscene insult     # lists of 0 and 1
    python examples/classify.py ... --label_column stars --problem regression      # or several columns of numbers
    python examples/classify.py ... --class_weights balanced                            # rare classes count as much
    python examples/classify.py --model runs/classify/seed-42 --do_train false --do_eval false --do_predict \
        --test_file new.csv --output_dir runs/new                           # with a model that was trained before

The names of the classes are those in the training labels, and the model's config keeps them.
Without validation rows a tenth of the training rows is held out; where a row has one class, a tenth
of each class. Every flag of `TrainingArguments` works. The same command again resumes what was
interrupted, or reads what is finished.

`<output_dir>/seed-<n>` holds `results.json`, plots and the model, which pipelines and
`AutoModelForSequenceClassification.from_pretrained(..., trust_remote_code=True)` load.
`--do_predict` with `--test_file` adds `predictions.csv`: the rows as they were written, lists as
JSON, with `prediction` and the probability of each class. With `--do_train false` the columns are
those that the model was trained on, unless they are named.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pandas
from datasets import Dataset
from scipy.special import expit, softmax

from modeling_gemma_encoder._scripts.command_line import failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.finetuning.arguments import TableArguments
from modeling_gemma_encoder.finetuning.data import Data
from modeling_gemma_encoder.finetuning.own_table import Table, task_of
from modeling_gemma_encoder.finetuning.results import predictions
from modeling_gemma_encoder.finetuning.run import Run, claim, fine_tune
from modeling_gemma_encoder.finetuning.suite import args_of_run, conclude, make_parser, parse, validate
from modeling_gemma_encoder.finetuning.tasks import Task, predictions_of


@interruptible()
def main():
    parser = make_parser(TableArguments, "runs/classify", __doc__)
    with failing(parser):
        # 1. Find out from the training labels, or from a trained model, what is learned.
        given = parser.parse_args()
        table = TableArguments(**{field: getattr(given, field) for field in TableArguments.__dataclass_fields__})
        table.validate(given.do_train, given.do_eval, given.do_predict)
        name, task, source = task_of(table, None if given.do_train else given.model)
        outputs = f"classes {', '.join(task.labels)}" if task.labels else ", ".join(task.label_columns or [task.label])
        print(f"{name}: {task.problem}, {outputs}; reads {' and '.join(task.texts)}")

        # 2. Take the defaults of this task and this size of decoder, and check all flags.
        table, options, args = parse(parser, task)
        seeds = table.seeds or [args.seed]
        validate(args, [task], seeds, options)

        # 3. Read and encode the rows. All of this is checked before anything is trained.
        if not table.lacks_training:
            task.load(source, "train")  # the whole file in its order, so that a message names the right row
            if (said := source.hold_out()) and args.process_index == 0:
                print(said)
        data = Data.load(name, task, source, options, args)
        data.sources = {split: source.source_of(split) for split in data.encoded}
        test_rows = read_test_rows(task, source) if data.test else None
        folder = Path(args.output_dir)
        runs = [
            Run(name, task, data, options, args_of_run(args, folder / f"seed-{seed}", seed, "classify"))
            for seed in seeds
        ]
        for run in runs:
            claim(run)

    # 4. Train, evaluate and predict with each seed, and print a table of the results.
    for run in runs:
        fine_tune(run)
        if test_rows is not None and args.process_index == 0:
            write_predictions(run, test_rows)
    if args.process_index == 0:
        conclude(folder, sorted(folder.glob("seed-*/results.json")), options.model, {})


def read_test_rows(task: Task, source: Table) -> Dataset:
    """Return the test rows as they are written. Raise ValueError where a column has the name of a
    predicted one."""
    rows, no_logits = source.as_written("test"), np.zeros((0, task.outputs))
    added = prediction_columns(task, predictions_of(task, no_logits), no_logits)
    if taken := [column for column in rows.column_names if column in added]:
        raise ValueError(f"{source.place('test')} has a column {taken[0]!r} already; rename it.")
    return rows


def write_predictions(run: Run, rows: Dataset) -> None:
    """Write the test rows of a run and what is predicted for them to `predictions.csv`."""
    table = with_lists_as_json(rows).assign(**prediction_columns(run.task, *predictions(run.folder, "test")))
    path = run.folder / "predictions.csv"
    write(path, as_csv(table).removesuffix("\n"))
    print(f"{len(table):,} predictions are in {path}")


def with_lists_as_json(rows: Dataset) -> pandas.DataFrame:
    """Return rows with lists and objects as JSON, which pandas would write in NumPy's form."""
    table = rows.to_pandas()
    for name in rows.column_names:
        if any(isinstance(cell, (list, dict, np.ndarray)) for cell in table[name]):
            table[name] = [
                cell if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in rows[name]
            ]
    return table


def as_csv(rows: pandas.DataFrame) -> str:
    """Return rows as the text of a .csv file.

    All cells are in quotes where one holds a carriage return, which Python did not quote by itself
    before 3.11.9.
    """
    texts = rows.select_dtypes(exclude="number").to_numpy().ravel()
    returns = any("\r" in text for text in texts if isinstance(text, str))
    return rows.to_csv(index=False, quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)


def prediction_columns(task: Task, predicted: np.ndarray, logits: np.ndarray) -> dict[str, list]:
    """Return the columns that are added to the rows.

    `prediction` is a class, several classes with | between them, or a number; of several numbers
    there is a `prediction_<column>` for each. Classes also have a `probability_<name>` each, and
    where a row has one class, its `probability` comes first.
    """
    if task.problem == "regression":
        if not task.label_columns:
            return {"prediction": predicted.tolist()}
        return {f"prediction_{name}": predicted[:, n].tolist() for n, name in enumerate(task.label_columns)}
    if task.problem == "multi_label_classification":
        names, probabilities = np.array(task.labels), expit(logits)
        columns = {"prediction": ["|".join(names[row == 1]) for row in predicted]}
    else:
        probabilities = softmax(logits, axis=-1)
        columns = {"prediction": [task.labels[value] for value in predicted]}
        columns["probability"] = probabilities.max(-1).tolist()
    of_each = zip(task.labels, probabilities.T.tolist(), strict=True)
    return {**columns, **{f"probability_{name}": values for name, values in of_each}}


if __name__ == "__main__":
    main()
