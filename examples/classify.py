"""Fine-tunes a Gemma Encoder on your own table: CSV, TSV, JSONL, JSON or Parquet, or a data set on the Hub.

    python examples/classify.py --model google/gemma-3-270m --train_file train.csv --validation_file dev.csv \\
        --text_column text --label_column label
    python examples/classify.py --model google/gemma-3-270m --dataset stanfordnlp/imdb --validation_split test
    python examples/classify.py ... --text_column question answer --template "Question: {first} Answer: {second}"
    python examples/classify.py ... --label_column toxic obscene insult     # several labels a row, columns of 0 and 1
    python examples/classify.py ... --train_file train.jsonl --class_names toxic obscene insult     # lists of 0 and 1
    python examples/classify.py ... --label_column stars --problem regression      # or several columns of numbers
    python examples/classify.py ... --class_weights balanced                            # rare classes count as much
    python examples/classify.py --model runs/classify/seed-42 --do_train false --do_eval false --do_predict \\
        --test_file new.csv --output_dir runs/new                           # with a model that was trained before

Names of the classes are those found in the training labels, and are kept in the model's config. Without validation rows
a tenth of the training rows is held out, of one class a row a tenth of each class. Every flag of `TrainingArguments`
works. `<output_dir>/seed-<n>` holds the model, which `AutoModelForSequenceClassification.from_pretrained(...,
trust_remote_code=True)` and pipelines load, `results.json` and plots; `--do_predict` with `--test_file` adds
`predictions.csv`: the rows as they were written, lists as JSON, `prediction`, and the probability of each class. With
`--do_train false` the columns are those that the model was trained on, unless they are named. The same command again
resumes or reads what is there.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pandas
from datasets import Dataset
from scipy.special import expit, softmax

from modeling_gemma_encoder._scripts.command_line import fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.finetuning.own_table import TableArguments, task_of
from modeling_gemma_encoder.finetuning.run import Data, claim, fine_tune, predictions
from modeling_gemma_encoder.finetuning.suite import cannot_run, conclude, make_parser, of_run, parse
from modeling_gemma_encoder.finetuning.tasks import Task, predictions_of


@interruptible()
def main():
    parser = make_parser(TableArguments, "runs/classify", __doc__)
    given = parser.parse_args()
    table = TableArguments(**{name: getattr(given, name) for name in TableArguments.__dataclass_fields__})
    if problem := table.complaint(given.do_train, given.do_eval, given.do_predict):
        fail(parser, problem)
    with failing(parser):
        name, task, source = task_of(table, None if given.do_train else given.model)
        of_what = f"classes {', '.join(task.labels)}" if task.labels else ", ".join(task.label_columns or [task.label])
        print(f"{name}: {task.problem}, {of_what}; reads {' and '.join(task.texts)}")
        table, options, args = parse(parser, task)
        folder, seeds = Path(args.output_dir), table.seeds or [args.seed]
        if problem := cannot_run(args, [task], seeds, options):
            fail(parser, problem)
        if not table.lacks_training:
            task.load(source, "train")  # all of them, in the file's order, for messages that name a row
            if (said := source.hold_out()) and args.process_index == 0:
                print(said)
        data = Data.load(name, task, source, options, args)
        data.sources = {split: source.source_of(split) for split in data.encoded}
        answered = source.as_written("test") if data.test else None
        nothing = np.zeros((0, task.outputs))
        names = answers(task, predictions_of(task, nothing), nothing)
        if answered and (taken := [column for column in answered.column_names if column in names]):
            raise ValueError(f"{source.place('test')} has a column {taken[0]!r} already; rename it.")
        runs = {seed: of_run(args, folder / f"seed-{seed}", seed, "classify") for seed in seeds}
        for run_args in runs.values():
            claim(name, task, data, options, run_args, None)

    for seed, run_args in runs.items():
        fine_tune(name, task, data, options, run_args)
        if data.test and args.process_index == 0:
            rows = with_lists_as_json(answered).assign(**answers(task, *predictions(folder / f"seed-{seed}", "test")))
            written = folder / f"seed-{seed}" / "predictions.csv"
            write(written, as_csv(rows).removesuffix("\n"))
            print(f"{len(rows):,} predictions are in {written}")
    if args.process_index == 0:
        conclude(folder, sorted(folder.glob("seed-*/results.json")), options.model, {})


def with_lists_as_json(rows: Dataset) -> pandas.DataFrame:
    """Return the rows with lists and objects as JSON, which pandas would write in NumPy's form."""
    table = rows.to_pandas()
    for name in rows.column_names:
        if any(isinstance(cell, (list, dict, np.ndarray)) for cell in table[name]):
            table[name] = [
                cell if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in rows[name]
            ]
    return table


def as_csv(rows: pandas.DataFrame) -> str:
    """The rows as a .csv file; all cells in quotes where one holds a carriage return, which Python did not quote
    by itself before 3.11.9."""
    texts = rows.select_dtypes(exclude="number").to_numpy().ravel()
    returns = any("\r" in text for text in texts if isinstance(text, str))
    return rows.to_csv(index=False, quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)


def answers(task: Task, predicted: np.ndarray, logits: np.ndarray) -> dict[str, list]:
    """Columns in the words of the data: `prediction`, a class, classes with | between them, or a number, of several
    `prediction_<column>`; for one class a row its `probability`; for classes `probability_<name>` of each."""
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
