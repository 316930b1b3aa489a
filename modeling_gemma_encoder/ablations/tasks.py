"""Tasks of an ablation, each with the source of its rows: GLUE's, SuperGLUE's, and a table of one's
own."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser

from ..finetuning import glue, own_table, superglue
from ..finetuning.metrics import of_columns, pearson_and_spearman
from ..finetuning.tasks import Source, Task, by_label

# Suite -> its data set on the Hub, and its tasks.
SUITES = {
    "glue": ("nyu-mll/glue", glue.TASKS),
    "superglue": ("aps/super_glue", superglue.TASKS),
}
TASKS = {name: task for _, tasks in SUITES.values() for name, task in tasks.items()}
# What may be said of a table; everything else of TableArguments is the ablation's to decide.
TABLE_FLAGS = ("text_column", "label_column", "problem", "template")


def find_source(name: str, data_dir: str | None) -> Source:
    """Return where the rows of a task of GLUE or SuperGLUE are.

    Raises:
        ValueError: `data_dir` has no folder for the task.
    """
    suite = next(suite for suite, (_, tasks) in SUITES.items() if name in tasks)
    dataset, tasks = SUITES[suite]
    folder = None
    if data_dir:
        places = [Path(data_dir) / name, Path(data_dir) / suite / name]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise ValueError(f"--data_dir: there is neither a folder {places[0]} nor {places[1]}.")
    return Source(dataset, tasks[name].config or name, folder)


def read_own_table(files: list[str], flags: str) -> tuple[str, Task, own_table.Table]:
    """Return the name, the task and the source of a table.

    Args:
        files: A file to train on and a file to evaluate, or one file, of which a tenth is
            evaluated.
        flags: Some of `TABLE_FLAGS` as they are written on a command line.

    Raises:
        ValueError: A file, a flag or a column is not what is needed.
    """
    if len(files) > 2:
        raise ValueError(f"--table takes one or two files, to train on and to evaluate; got {len(files)}.")
    table = _parse_table(dict(zip(("train_file", "validation_file"), files, strict=False)), flags)
    try:
        table.validate(do_train=True, do_eval=True, do_predict=False)
    except ValueError as error:
        raise ValueError(f"--table_flags: {error}") from error
    name, task, source = own_table.task_of(table)
    source.hold_out()
    if task.problem == "regression":
        # Without R², which has no least value: it would outweigh the correlations in their mean.
        metric = pearson_and_spearman
        if task.label_columns:
            metric = partial(of_columns, pearson_and_spearman, task.label_columns)
        task = replace(task, metric=by_label(metric))
    return name, task, source


def _parse_table(files: dict[str, str], flags: str) -> own_table.TableArguments:
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    parser = HfArgumentParser(own_table.TableArguments)
    (table,) = parser.parse_args_into_dataclasses(args=[*words, *shlex.split(flags)])
    plain = vars(own_table.TableArguments(**files))
    wrong = [key for key, value in plain.items() if getattr(table, key) != value]
    if wrong := [key for key in wrong if key not in TABLE_FLAGS]:
        raise ValueError(f"--table_flags takes --{', --'.join(TABLE_FLAGS)}, but not --{', --'.join(wrong)}.")
    return table


def validation_rows(task: Task, source: Source, limit: int | None) -> dict[str, Dataset]:
    """Return the rows that cells are scored on, by split: the first `limit` of each, or all."""
    rows = {split: task.load(source, split) for split in task.validation}
    if limit is None:
        return rows
    return {split: found.select(range(min(limit, len(found)))) for split, found in rows.items()}
