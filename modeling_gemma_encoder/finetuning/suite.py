"""A command line over a table of tasks: `--task sst2 cola` or `--task all`, `--seeds 1 2 3`, and
Trainer flags."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments

from .._scripts.command_line import Help, YamlScriptParser, fail, failing, interruptible, share_batch
from .._scripts.files import read, write
from .._scripts.training import names_checkpoint, rows_per_step, under_fsdp
from .arguments import COMMON, FineTuningArguments, training_defaults
from .data import Data
from .model import check_model
from .reports import average, markdown, summarize, without_scores
from .results import predictions
from .run import Run, claim, fine_tune
from .tasks import Source, Task

# Name of the task, its row, split, rows and predictions -> the test server's file name and text.
Submission = Callable[[str, Task, str, Dataset, np.ndarray], tuple[str, str]]


@dataclass
class SuiteArguments:
    """The options of which tasks are run, and where their data is."""

    task: list[str] = field(metadata={"help": "Names of tasks, or `all`."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of <task>/<split>.jsonl (.json, .csv, .tsv, .parquet); default: the Hub."},
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "A run for each. Default: --seed alone."})


class HelpOfSuites(Help):
    """Help with the defaults that `training_defaults` finds."""

    LATER: ClassVar = {
        "learning_rate": "by the size of --model",
        "num_train_epochs": "the task's",
        "per_device_train_batch_size": "the task's",
        "per_device_eval_batch_size": "the task's",
    }


@dataclass(frozen=True)
class Suite:
    """A table of tasks, as GLUE and SuperGLUE are.

    Args:
        dataset: The data set on the Hub, which has a config for each task.
        submission: The function that writes predictions as the test server wants them.
        unscored: Tasks that do not count in the suite's average.
        other_script: The script of the other suite, which is named where its tasks or its data are
            meant.
        other_tasks: The tasks of the other suite.
    """

    tasks: dict[str, Task]
    dataset: str
    submission: Submission | None
    unscored: tuple[str, ...] = ()
    other_script: str = ""
    other_tasks: dict[str, Task] = field(default_factory=dict)

    def chosen(self, names: list[str]) -> list[str]:
        """Return the tasks of `--task`, each after the one that is trained in its place.

        Raises:
            ValueError: There is no task of that name.
        """
        names = list(self.tasks) if "all" in names else names
        if unknown := [name for name in names if name not in self.tasks]:
            message = f"--task must be one of {', '.join(self.tasks)}, all; got {', '.join(unknown)}"
            if self.other_tasks.keys() >= {*unknown}:
                message += f", which {self.other_script} has"
            raise ValueError(f"{message}.")
        return list(dict.fromkeys(name for task in names for name in (self.tasks[task].train_on or task, task)))

    @property
    def scored(self) -> dict[str, tuple[str, ...]]:
        """Return the validation splits of each task that counts in the average."""
        counted = {name: task.validation for name, task in self.tasks.items() if name not in self.unscored}
        return {name: splits for name, splits in counted.items() if splits}


@interruptible()
def run_suite(suite: Suite, output_dir: str, description: str = "") -> None:
    """
    Run the tasks that the command line names, once for each seed, and print a table of the results.

    Args:
        output_dir: The default of `--output_dir`.
        description: The text with which `--help` begins.
    """
    parser = make_parser(SuiteArguments, output_dir, description)
    given = parser.parse_args()
    with failing(parser):
        names = suite.chosen(given.task)
    # Everything is checked before anything is trained.
    plan = {name: plan_task(suite, name, names, parser) for name in names}
    for seed in given.seeds or [given.seed]:
        for runs in plan.values():
            run = runs[seed]
            fine_tune(run)
            if run.args.process_index == 0:
                submit(suite, run)
    if run.args.process_index == 0:
        folder = run.folder.parents[1]
        conclude(folder, sorted(folder.glob("*/seed-*/results.json")), given.model, suite.scored)


def plan_task(suite: Suite, name: str, names: list[str], parser: YamlScriptParser) -> dict[int, Run]:
    """Check a task's flags and rows, and return its run for each seed. End the process where
    something is wrong.

    Args:
        names: All tasks that are run.
    """
    task = suite.tasks[name]
    own, options, args = parse(parser, task)
    folder, seeds, runs = Path(args.output_dir), own.seeds or [args.seed], {}
    with failing(parser):
        validate(args, [suite.tasks[name] for name in names], seeds, options)
    source = Source(suite.dataset, task.config or name, Path(own.data_dir) / name if own.data_dir else None)
    with failing(parser, f"{name}: "):
        check_folder(suite, name, source.folder)
        data = Data.load(name, task, source, options, args)
        for seed in seeds:
            trained = folder / task.train_on / f"seed-{seed}" if task.train_on else None
            own_args = args_of_run(args, folder / name / f"seed-{seed}", seed, name)
            runs[seed] = Run(name, task, data, options, own_args, trained)
            claim(runs[seed])
    return runs


def submit(suite: Suite, run: Run) -> None:
    """Write the test predictions of a run as the test server wants them, beside those of the other
    tasks."""
    folder = run.folder.parents[1] / f"submission-seed-{run.args.seed}"
    for split, rows in run.data.test.items():
        predicted, _ = predictions(run.folder, split)
        file, text = suite.submission(run.name, run.task, split, rows, predicted)
        folder.mkdir(exist_ok=True)
        write(folder / file, text)


def check_folder(suite: Suite, name: str, folder: Path | None) -> None:
    """Raise ValueError where a task has no folder of data, or its rows have the columns of the
    other suite."""
    if folder is None:
        return
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir())) or "none"
        raise ValueError(f"there is no folder {folder}; folders in {folder.parent}: {there}.")
    source, texts = Source(folder=folder), {*suite.tasks[name].texts}
    if name in suite.other_tasks and (splits := source.splits()):
        columns = {*source.rows(splits[0]).column_names}
        others = suite.other_tasks[name].texts
        if not texts <= columns and {*others} <= columns:
            raise ValueError(f"{folder} has the columns {', '.join(others)}, as {suite.other_script} reads {name}.")


def conclude(folder: Path, finished: list[Path], model: str, scored: dict[str, tuple[str, ...]]) -> None:
    """Write `results.json` and `results.md` of all finished runs of a model in a folder, and print
    the table.

    Args:
        finished: The `results.json` of each finished run.
        scored: The tasks, and their splits, that count in an average.
    """
    runs = []
    for path in finished:
        began = read(path.parent / "run.json")
        if began["model"] == model:
            runs.append({**read(path), "problem": began.get("problem")})
    summary = summarize(runs)
    sources = {(run["task"], split): of for run in runs for split, of in run.get("sources", {}).items()}
    table = markdown(summary, sources) if summary else without_scores(runs)
    scored = {task: splits for task, splits in scored.items() if any(row["task"] == task for row in summary)}
    if len(scored) > 1:
        table += f"\n\nAverage of {len(scored)} tasks' validation scores: {average(summary, scored) * 100:.1f}"
    speeds = {f"{run['task']}, seed {run['seed']}": run.get("real_tokens_per_second") for run in runs}
    results = {"summary": summary, "model": model, "real_tokens_per_second": speeds}
    write(folder / "results.json", json.dumps(results, indent=2))
    write(folder / "results.md", table)
    print(f"\n{table}\n\n{left_by([path.parent for path in finished])} in {folder}")


def left_by(runs: list[Path]) -> str:
    """Return the start of a sentence on what is in the folders of finished runs: "Models, plots and
    results are"."""
    kinds = {"models": "*model*.safetensors", "plots": "*.png"}
    found = [kind for kind, form in kinds.items() if any(any(run.glob(form)) for run in runs)]
    said = f"{', '.join(found)} and results" if found else "results"
    return f"{said.capitalize()} are"


def make_parser(own: type, output_dir: str, description: str) -> YamlScriptParser:
    """Return the parser of a script that fine-tunes.

    Args:
        own: The dataclass of the script's own options.
        output_dir: The default of `--output_dir`.
    """
    parser = YamlScriptParser((own, FineTuningArguments, TrainingArguments), description, HelpOfSuites)
    parser.set_defaults(output_dir=output_dir, **COMMON)
    return parser


def parse(parser: YamlScriptParser, task: Task) -> tuple:
    """Return the options of the command line, checked, with the defaults of a task and of the
    decoder's size.

    The process ends with a message where the options cannot be.

    Returns:
        The script's own options, `FineTuningArguments` and `TrainingArguments`.
    """
    given = parser.parse_args()
    with failing(parser, f"--model {given.model}: "):
        parser.set_defaults(**training_defaults(given.model, given.lora_r is not None, task))
    with failing(parser):
        share_batch(parser)
    if not parser.parse_args().do_eval:  # the Trainer would turn it on again
        parser.set_defaults(eval_strategy="no")
    own, options, args = parser.parse_args_into_dataclasses()
    batch = rows_per_step(args)
    if options.total_batch_size not in (None, batch):
        fail(parser, f"--total_batch_size {options.total_batch_size}: these devices would take {batch} a step.")
    sync_gradients(args)
    with failing(parser):
        options.validate(args)
        check_model(task, options, args)
        check_writable(Path(args.output_dir))
    return own, options, args


def sync_gradients(args: TrainingArguments) -> None:
    """Synchronize gradients in every accumulation step under FSDP2.

    Otherwise every device holds all gradients between the steps, in half precision.
    """
    if under_fsdp(args) and args.gradient_accumulation_steps > 1:
        kept = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **kept}


def check_writable(folder: Path) -> None:
    """Make the folder of `--output_dir`. Raise ValueError where that, or a file in it, is not
    possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror}.") from error


def validate(args: TrainingArguments, tasks: list[Task], seeds: list[int], options: FineTuningArguments) -> None:
    """Raise ValueError for what the Trainer, or several runs in one process, cannot do."""
    several = len(tasks) * len(seeds) > 1
    of_lists = options.ranking_loss is not None or options.list_chunk_size is not None
    if of_lists and tasks and all(task.problem != "choice" for task in tasks):
        raise ValueError(
            "--ranking_loss and --list_chunk_size are for tasks that choose among candidates, and for msmarco.py."
        )
    if several and names_checkpoint(args):
        raise ValueError(
            "--resume_from_checkpoint is of one run; without it each run resumes from its own last checkpoint."
        )
    if several and (args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"):
        raise ValueError("DeepSpeed runs one task and one seed a process: give one --task and one --seed.")
    if under_fsdp(args) and any(task.train_on for task in tasks):
        raise ValueError(
            "Diagnostics, which train on another task, cannot run under FSDP2; run them later, in one process."
        )
    if args.label_smoothing_factor and any(task.class_weights for task in tasks):
        raise ValueError("--class_weights and --label_smoothing_factor are two losses: give one of them.")


def args_of_run(args: TrainingArguments, folder: Path, seed: int, name: str) -> TrainingArguments:
    """Return the Trainer's arguments of one of several runs, with a folder and a repository on the
    Hub of its own."""
    args = copy.copy(args)
    if args.push_to_hub:
        args.hub_model_id = f"{args.hub_model_id or Path(args.output_dir).resolve().name}-{name}-seed-{seed}"
    args.seed, args.output_dir = seed, str(folder)
    return args
