"""A command line over a table of tasks: `--task sst2 cola` or `--task all`, `--seeds 1 2 3`, any Trainer flag."""

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

from .._scripts.command_line import Help, RecipeParser, fail, failing, interruptible, share_batch
from .._scripts.files import write
from .._scripts.training import names_checkpoint, rows_per_step, under_fsdp
from .arguments import COMMON, FineTuningArguments, training_defaults
from .model import check_model
from .reports import average, markdown, summarize, without_scores
from .run import Data, claim, fine_tune, predictions
from .tasks import Source, Task

# Name of the task, its row, split, rows and predictions -> the test server's file name and text.
Submission = Callable[[str, Task, str, Dataset, np.ndarray], tuple[str, str]]


@dataclass
class SuiteArguments:
    task: list[str] = field(metadata={"help": "Names of tasks, or `all`."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of <task>/<split>.jsonl (.json, .csv, .tsv, .parquet); default: the Hub."},
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "A run for each. Default: --seed alone."})


class HelpOfSuites(Help):
    """Defaults that `training_defaults` finds."""

    LATER: ClassVar = {
        "learning_rate": "by the size of --model",
        "num_train_epochs": "the task's",
        "per_device_train_batch_size": "the task's",
        "per_device_eval_batch_size": "the task's",
    }


@interruptible()
def run_suite(
    tasks: dict[str, Task],
    dataset: str,
    output_dir: str,
    submission: Submission,
    unscored=(),
    description: str = "",
    elsewhere: tuple[str, dict[str, tuple[str, ...]]] = ("", {}),
) -> None:
    """
    Runs tasks of a table as the command line says; ends the process with a message where it cannot.

    Args:
        dataset: On the Hub, with a config for each task.
        output_dir: Default of the flag.
        submission: How the test server wants predictions.
        unscored: Tasks that do not count in the suite's average.
        description: Begins `--help`.
        elsewhere: The script of the other suite, and the texts of its tasks, to name where these are meant.
    """
    script, others = elsewhere
    parser = make_parser(SuiteArguments, output_dir, description)
    given = parser.parse_args()
    chosen = list(tasks) if "all" in given.task else given.task
    if unknown := [name for name in chosen if name not in tasks]:
        there = f"; {script} has {', '.join(unknown)}" if others.keys() >= {*unknown} else ""
        fail(parser, f"--task: {', '.join(unknown)} is none of {', '.join(tasks)}, all{there}")
    needed = dict.fromkeys(name for task in chosen for name in (tasks[task].train_on or task, task))

    plan = {}
    for name in needed:  # everything is checked before anything is trained
        task = tasks[name]
        suite, options, args = parse(parser, task)
        folder, seeds = Path(args.output_dir), suite.seeds or [args.seed]
        if problem := cannot_run(args, [tasks[name] for name in needed], seeds, options):
            fail(parser, problem)
        source = Source(dataset, task.config or name, Path(suite.data_dir) / name if suite.data_dir else None)
        with failing(parser, f"{name}: "):
            check_folder(source.folder, name, task, script, others.get(name, ()))
            data = Data.load(name, task, source, options, args)
            runs = {}
            for seed in seeds:
                run_args = of_run(args, folder / name / f"seed-{seed}", seed, name)
                trained = folder / task.train_on / f"seed-{seed}" if task.train_on else None
                runs[seed] = (name, task, data, options, run_args, trained)
                claim(*runs[seed])
        plan[name] = (task, data, runs)

    for seed in seeds:
        for name, (task, data, runs) in plan.items():
            fine_tune(*runs[seed])
            for split, rows in data.test.items() if args.process_index == 0 else ():
                found, _ = predictions(folder / name / f"seed-{seed}", split)
                file, text = submission(name, task, split, rows, found)
                (folder / f"submission-seed-{seed}").mkdir(exist_ok=True)
                write(folder / f"submission-seed-{seed}" / file, text)
    if args.process_index == 0:
        scored = {name: task.validation for name, task in tasks.items() if name not in unscored and task.validation}
        conclude(folder, sorted(folder.glob("*/seed-*/results.json")), options.model, scored)


def check_folder(folder: Path | None, name: str, task: Task, script: str, others: tuple[str, ...]) -> None:
    """Raises ValueError where there is no such folder of a task, or its rows have the other suite's columns."""
    if folder is None:
        return
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir())) or "none"
        raise ValueError(f"there is no folder {folder}; folders in {folder.parent}: {there}.")
    source = Source(folder=folder)
    if others and (splits := source.splits()):
        columns = source.rows(splits[0]).column_names
        if not {*task.texts} <= {*columns} and {*others} <= {*columns}:
            raise ValueError(f"{folder} has the columns {', '.join(others)}, as {script} reads {name}.")


def conclude(folder: Path, finished: list[Path], model: str, scored: dict[str, tuple[str, ...]]) -> None:
    """`results.json`, `results.md` and the table on the screen, of all finished runs of a model in the folder."""
    reports = [json.loads(path.read_text()) for path in finished]
    began = [run_of(path) for path in finished]
    of_model = [
        {**report, "problem": run.get("problem")}
        for report, run in zip(reports, began, strict=True)
        if run["model"] == model
    ]
    summary = summarize(of_model)
    table = markdown(summary) if summary else without_scores(of_model)
    scored = {task: splits for task, splits in scored.items() if any(row["task"] == task for row in summary)}
    if len(scored) > 1:
        table += f"\n\nAverage of {len(scored)} tasks' validation scores: {average(summary, scored) * 100:.1f}"
    speeds = {f"{r['task']}, seed {r['seed']}": r.get("real_tokens_per_second") for r in of_model}
    results = {"summary": summary, "model": model, "real_tokens_per_second": speeds}
    write(folder / "results.json", json.dumps(results, indent=2))
    write(folder / "results.md", table)
    print(f"\n{table}\n\n{left_by([path.parent for path in finished])} in {folder}")


def left_by(runs: list[Path]) -> str:
    """Return the start of a sentence on what is in the folders of finished runs: "Models, plots and results are"."""
    kinds = {"models": "*model*.safetensors", "plots": "*.png"}
    found = [kind for kind, form in kinds.items() if any(any(run.glob(form)) for run in runs)]
    said = f"{', '.join(found)} and results" if found else "results"
    return f"{said.capitalize()} are"


def run_of(results: Path) -> dict:
    """What the run began with, whose results these are."""
    return json.loads((results.parent / "run.json").read_text())


def make_parser(own: type, output_dir: str, description: str) -> RecipeParser:
    parser = RecipeParser((own, FineTuningArguments, TrainingArguments), description, HelpOfSuites)
    parser.set_defaults(output_dir=output_dir, **COMMON)
    return parser


def parse(parser: RecipeParser, task: Task) -> tuple:
    """The command line, with the task's defaults for this size of decoder where it says nothing; checked."""
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
        fail(parser, f"--total_batch_size {options.total_batch_size}: these devices would take {batch} a step")
    if under_fsdp(args) and args.gradient_accumulation_steps > 1:
        # Or every device holds all gradients between the steps, in half precision.
        kept = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **kept}
    if problem := options.problem(args):
        fail(parser, problem)
    with failing(parser):
        check_model(task, options, args)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / ".writable").touch()
        (Path(args.output_dir) / ".writable").unlink(missing_ok=True)
    except OSError as error:
        fail(parser, f"--output_dir {args.output_dir} cannot be written: {error.strerror}")
    return own, options, args


def cannot_run(
    args: TrainingArguments, tasks: list[Task], seeds: list[int], options: FineTuningArguments
) -> str | None:
    """What the Trainer, or several runs in one process, cannot do, in the words of the command line."""
    of_lists = options.ranking_loss is not None or options.list_chunk_size is not None
    if of_lists and tasks and all(task.problem != "choice" for task in tasks):
        return "--ranking_loss and --list_chunk_size are for tasks that choose among candidates, and for msmarco.py"
    several = len(tasks) * len(seeds) > 1
    if several and names_checkpoint(args):
        return "--resume_from_checkpoint is of one run; without it each of them resumes its own last checkpoint"
    if several and (args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"):
        return "DeepSpeed runs one task and one seed a process: give one --task and one --seed"
    if under_fsdp(args) and any(task.train_on for task in tasks):
        return "diagnostics, which train on another task, cannot run under FSDP2; run them later, in one process"
    if args.label_smoothing_factor and any(task.class_weights for task in tasks):
        return "--class_weights and --label_smoothing_factor are two losses: give one of them"
    return None


def of_run(args: TrainingArguments, folder: Path, seed: int, name: str) -> TrainingArguments:
    """The arguments of one of several runs: a folder and, when it is pushed to the Hub, a repository of its own."""
    args = copy.copy(args)
    if args.push_to_hub:
        args.hub_model_id = f"{args.hub_model_id or Path(args.output_dir).resolve().name}-{name}-seed-{seed}"
    args.seed, args.output_dir = seed, str(folder)
    return args
