"""Compare what the paper says matters on your decoder: attention, pooling, dropout, one choice
changed at a time.

    python examples/ablations.py --study attention pooling --tasks cola mrpc stsb --model google/gemma-3-270m --bf16
    python examples/ablations.py --study dropout dropout_place --tasks cola wic --model examples/nano --data_dir data
    python examples/ablations.py --study start --starts examples/nano runs/nano-mlm --tasks sst2 --model examples/nano
    python examples/ablations.py --study attention --tasks cola --model google/gemma-2-2b --bf16 --workers 8
    python examples/ablations.py --study pooling --table train.csv dev.csv --table_flags "--label_column stars" ...

Studies are those of `ablations/catalog.py`; `--variants causal bidirectional` takes only these
variants of them. The study `start` compares checkpoints: decoders of other sizes and families, or
up-trained ones. Tasks are those of GLUE and SuperGLUE, from the Hub or from `--data_dir`: <task>/,
glue/<task>/ or superglue/<task>/ in it. For every variant and task the learning rate is the one of
`--learning_rates` that does best on a tenth of the training rows (a thousand at most), which are
set aside. Then each of `--seeds` is trained and scored on the official validation rows; several
metrics are averaged as GLUE does. Every other flag is one of `glue.py`, and every flag of
`TrainingArguments` works. `--table` adds your own table as a task, as `classify.py` reads it.
`--ranking` adds a reranker, with the variants, rates and seeds of this command and everything else
from `--ranking_flags`.

A finished cell is read and not trained again. Give an interrupted command again and it goes on;
studies share cells. `--finished_only` makes tables and plots of the cells that are there, of
several commands, or while one runs elsewhere. With `--workers` cells run side by side on Ray, each
with a GPU or a share of the cores. The script leaves in `--output_dir` tables and a plot of each
study, `results.json`, and `cells/`, each with its own `results.json` and predictions. Scores have
the standard error of the seeds. Differences, from the first variant or from what the study names,
have that of seeds and rows. Variants whose answers are equal, or nearly always the same, are named
under their table. Tables and plots show what the last command asked for.
"""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_gemma_encoder._scripts.command_line import YamlScriptParser, fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder.ablations.arguments import AblationArguments
from modeling_gemma_encoder.ablations.catalog import PLAIN, choose_studies
from modeling_gemma_encoder.ablations.cells import Bench
from modeling_gemma_encoder.ablations.reports import name_seeds, plot, report_study
from modeling_gemma_encoder.ablations.reranker import LeftOutQueries, RankingTask
from modeling_gemma_encoder.ablations.statistics import LeftOut, add_answers, add_differences
from modeling_gemma_encoder.ablations.studies import Plan, Study, run_studies
from modeling_gemma_encoder.ablations.tasks import TASKS, find_source, read_own_table, validation_rows
from modeling_gemma_encoder.ablations.workers import Workers
from modeling_gemma_encoder.finetuning.arguments import COMMON, FineTuningArguments, training_defaults
from modeling_gemma_encoder.finetuning.model import check_model
from modeling_gemma_encoder.finetuning.suite import HelpOfSuites
from modeling_gemma_encoder.finetuning.suite import validate as validate_runs
from modeling_gemma_encoder.finetuning.tasks import Source, Task

# What every task has for itself unless the command line says otherwise.
OF_TASK = ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size")


@dataclass(frozen=True)
class Command:
    """Hold what the command line asks for, read and checked."""

    own: AblationArguments
    options: FineTuningArguments
    args: TrainingArguments
    studies: dict[str, Study]
    tasks: dict[str, tuple[Task, Source]]
    rankings: dict[str, RankingTask]
    learning_rates: tuple[float, ...]
    task_defaults: tuple[str, ...]  # those of `OF_TASK` that were not given

    @property
    def root(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def plan(self) -> Plan:
        names = (*self.tasks, *self.rankings)
        return Plan(self.studies, names, self.options, self.learning_rates, tuple(self.own.seeds))

    def workers(self) -> Workers:
        bench = Bench(
            tasks=self.tasks,
            options=self.options,
            args=self.args,
            root=self.root,
            others=self.rankings,
            task_defaults=self.task_defaults,
            keep_models=self.own.keep_models,
        )
        return Workers(bench, self.own.workers, self.own.finished_only)


# 1. What is asked for, checked before anything is trained


def read_command(parser: YamlScriptParser) -> Command:
    """Return what the command line asks for.

    Raises:
        ValueError: Something that it names does not exist, or flags contradict each other.
    """
    given = parser.parse_args()
    validate_names(given)
    of_user = []
    if given.table is not None:
        of_user = [read_own_table(given.table, given.table_flags)]
    first = TASKS[given.tasks[0]] if given.tasks else next(iter(TASKS.values()))
    defaults = training_defaults(given.model, given.lora_r is not None, first)
    parser.set_defaults(seed=given.seeds[0], **defaults)
    own, options, args = parser.parse_args_into_dataclasses()
    studies = choose_studies(own.study, own.variants, own.starts, options.model, Path(args.output_dir))
    if not own.tasks:  # GLUE's average means nothing beside other data
        studies = {name: replace(study, paper={}) for name, study in studies.items()}
    tasks = {name: (TASKS[name], find_source(name, own.data_dir)) for name in own.tasks}
    tasks |= {name: (task, source) for name, task, source in of_user}
    only_tasks = {name: task for name, (task, _) in tasks.items()}
    options.validate(args)
    validate_runs(args, [*only_tasks.values()], own.seeds, options)
    own.validate(options, args, studies, only_tasks)
    rates = own.learning_rates or [factor * defaults["learning_rate"] for factor in (0.5, 1, 2)]
    return Command(
        own=own,
        options=options,
        args=args,
        studies=studies,
        tasks=tasks,
        rankings=find_rankings(own, options),
        learning_rates=tuple(rates),
        task_defaults=tuple(name for name in OF_TASK if getattr(given, name) is None),
    )


def validate_names(given) -> None:
    """Raise ValueError for flags of `glue.py`, for no task, and for tasks that are not trained."""
    if given.learning_rate is not None or given.seed is not None:
        raise ValueError("--learning_rate and --seed are for glue.py. Give --learning_rates and --seeds instead.")
    if not (given.tasks or given.table or given.ranking):
        raise ValueError("Give --tasks, --table or --ranking, or several of them.")
    if unknown := [name for name in given.tasks if name not in TASKS or TASKS[name].train_on]:
        trained = [name for name, task in TASKS.items() if not task.train_on]
        raise ValueError(f"--tasks must be one of {', '.join(trained)}; got {', '.join(unknown)}.")


def find_rankings(own: AblationArguments, options: FineTuningArguments) -> dict[str, RankingTask]:
    """Return the reranker that --ranking asks for, by its name."""
    if not own.ranking:
        return {}
    plain = {name: getattr(options, name) for name in PLAIN}
    flags, script = tuple(shlex.split(own.ranking_flags)), Path(__file__).parent / "msmarco.py"
    task = RankingTask(options.model, plain, *own.ranking, flags, script)
    return {task.name: task}


def check_models(command: Command) -> None:
    """Raise ValueError where a model cannot be trained as a variant asks, or data cannot be read."""
    options, args, tasks = command.options, command.args, command.tasks
    starts = [options.model]
    if "start" in command.studies:
        starts += command.own.starts
    for task, source in tasks.values():
        for start in starts:
            check_model(task, replace(options, model=start), args)
        for split in ("train", *task.validation):
            task.load(source, split)
    if tasks:
        first = next(iter(tasks.values()))[0]
        for study in command.studies.values():
            for changed in study.variants.values():
                fields = {key: value for key, value in changed.items() if key != "kind"}
                check_model(first, replace(options, **fields), args)
    any_task = next(iter(TASKS.values()))
    rates = {training_defaults(start, False, any_task)["learning_rate"] for start in starts}
    if len(rates) > 1 and command.own.learning_rates is None:
        raise ValueError(
            "--starts are of sizes with different default learning rates, "
            f"{', '.join(f'{rate:g}' for rate in sorted(rates))}. Give --learning_rates for all of them."
        )


# 2. Cells


def run_cells(command: Command) -> dict:
    """Return the scores of all variants, see `run_studies`."""
    root = command.root
    kept = "only read" if command.own.finished_only else "read"
    print(
        f"{command.plan.count()} runs, to choose rates and then of each seed; those finished in {root} are {kept}",
        flush=True,
    )
    try:
        return run_studies(command.plan, command.workers())
    except KeyboardInterrupt:
        done = len([*root.glob("cells/*/*/*/results.json")])
        raise KeyboardInterrupt(
            f"the same command goes on, and reads the {done} cells that are finished in {root}"
        ) from None


# 3. What they say


def compare(command: Command, found: dict) -> list[str]:
    """Add differences and equal answers to what was found. Return the cells that kept no
    predictions."""
    limit = command.options.max_eval_samples
    left_out = {name: LeftOutQueries() for name in command.rankings}
    for name, (task, source) in command.tasks.items():
        left_out[name] = LeftOut(task, validation_rows(task, source, limit))
    studies = {name: study for name, study in command.studies.items() if name in found}
    lacking = add_differences(studies, found, command.root, left_out)
    add_answers(found, command.root, left_out)
    return lacking


def leave_results(command: Command, found: dict) -> None:
    """Write and print the tables, draw the plots, and write `results.json`."""
    own, root, tables = command.own, command.root, []
    model, seeds = Path(command.options.model).name, name_seeds(own.seeds)
    for name in found:
        study = command.studies[name]
        tables.append(report_study(name, study, found[name], own.seeds))
        title = f"{name.replace('_', ' ')}, {model}, {seeds}"
        plot(title, study, found[name], root / f"{name}.png")
    report = {"studies": found, "seeds": own.seeds, "learning_rates": command.learning_rates}
    report |= {"torch": torch.__version__, **provenance()}
    write(root / "results.json", json.dumps(report, indent=2))
    write(root / "results.md", "\n\n".join(tables))
    print("\n" + "\n\n".join(tables) + f"\n\nTables, plots and cells are in {root}")


def make_parser() -> YamlScriptParser:
    """Return the parser; what stays None is told from what was given."""
    parser = YamlScriptParser((AblationArguments, FineTuningArguments, TrainingArguments), __doc__, HelpOfSuites)
    parser.set_defaults(output_dir="runs/ablations", **COMMON)
    parser.set_defaults(eval_strategy="no", save_strategy="no", disable_tqdm=True, **PLAIN)
    parser.set_defaults(**dict.fromkeys((*OF_TASK, "learning_rate", "seed")))
    return parser


@interruptible()
def main():
    parser = make_parser()
    with failing(parser):
        command = read_command(parser)
        check_models(command)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        found = run_cells(command)
    if not found:
        fail(
            parser,
            f"--finished_only: no variant is finished in {command.root} with these --learning_rates and "
            "--seeds. Leave out --finished_only to train them.",
        )
    lacking = compare(command, found)
    leave_results(command, found)
    if lacking:
        print(f"{len(lacking)} cells kept no predictions to compare. Delete them to run them again: {lacking[0]} ...")


if __name__ == "__main__":
    main()
