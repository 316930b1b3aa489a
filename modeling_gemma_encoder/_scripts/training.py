"""What training scripts share: resuming a run, refusing another one in its folder, and reports of
how it went."""

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from transformers import Trainer, TrainingArguments

from ..adapter_gemma_encoder import quiet
from ..callbacks import StepTimer
from .command_line import Help, ScriptParser, fail
from .files import write
from .provenance import provenance

# Defaults of `TrainingArguments` for scripts that read plain text; our choice, for a few million
# parameters.
READING = {
    "max_steps": 1000,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "include_num_input_tokens_seen": True,
    "use_cpu": not torch.accelerator.is_available(),
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


class HelpOfReading(Help):
    """Help with the defaults that `set_steps` finds."""

    LATER: ClassVar = {"num_train_epochs": "as many as --max_steps are", "max_steps": "1000, or --num_train_epochs"}


def set_steps(parser: ScriptParser) -> None:
    """Let `--num_train_epochs` alone say how long a training is; the default of `--max_steps` would
    win over it."""
    parser.set_defaults(num_train_epochs=None, max_steps=None)
    given = parser.parse_args()
    steps, epochs = given.max_steps, given.num_train_epochs
    if steps is None:
        steps = READING["max_steps"] if epochs is None else -1
    if given.streaming and steps <= 0:
        fail(parser, "--streaming needs --max_steps: a stream has no known length.")
    parser.set_defaults(num_train_epochs=3.0 if epochs is None else epochs, max_steps=steps)


def say_how_long(args: TrainingArguments, blocks: Dataset | IterableDataset, block_size: int) -> None:
    """Print how many tokens a training reads, and how often it reads the text."""
    batch = rows_per_step(args)
    there = None if isinstance(blocks, IterableDataset) else len(blocks)
    check_warmup(args, there or 0)
    blocks_read = args.max_steps * batch if args.max_steps > 0 else args.num_train_epochs * there
    steps = say_steps(args, there or 0)
    line = f"{steps} of {batch} blocks of {block_size} tokens: {blocks_read * block_size:,.0f} tokens"
    if there:
        line += f"; the text has {there * block_size:,}, to be read {blocks_read / there:.2g} times"
    print(line, flush=True)


def last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that is complete, which has `trainer_state.json`; the Trainer
    writes that last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def names_checkpoint(args: TrainingArguments) -> bool:
    """Return whether `--resume_from_checkpoint` names a folder, and is not True, which the Trainer
    also takes."""
    return args.resume_from_checkpoint not in (None, True, "True", "true")


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that is named, or the last complete one in the folder, or None.

    Raises:
        ValueError: There is no checkpoint of that name.
    """
    if not names_checkpoint(args):
        return last_checkpoint(Path(args.output_dir))
    if not (Path(args.resume_from_checkpoint) / "trainer_state.json").exists():
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a checkpoint of the Trainer.")
    return args.resume_from_checkpoint


def step_of(checkpoint: str) -> int:
    """Return the optimizer step at which a checkpoint was written."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from the start, or from a checkpoint, and print which."""
    if checkpoint and trainer.is_world_process_zero():
        print(f"Resuming from step {step_of(checkpoint)}, {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)


@contextmanager
def resumable(args: TrainingArguments, finished: Path | None = None) -> Iterator[None]:
    """
    Add to a `KeyboardInterrupt` where the same command goes on.

    Args:
        finished: A file that exists when the model is trained and saved.
    """
    try:
        yield
    except KeyboardInterrupt:
        checkpoint = checkpoint_to_resume(args)
        if finished is not None and finished.exists():
            how = f"the model in {args.output_dir} is trained, and the same command goes on after that"
        elif checkpoint:
            how = f"the same command goes on from step {step_of(checkpoint)}, {checkpoint}"
        else:
            how = f"nothing was saved in {args.output_dir} yet, so the same command begins anew"
        raise KeyboardInterrupt(how) from None


def replacing_weights(checkpoint: str | None) -> AbstractContextManager:
    """Suppress upstream's warning of new weights while a model is loaded whose weights a checkpoint
    will replace."""
    return quiet() if checkpoint else nullcontext()


def rows_per_step(args: TrainingArguments) -> int:
    """Return the number of rows of an optimizer step on all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def count_steps(args: TrainingArguments, rows: int) -> int:
    """Return the number of optimizer steps of a training on so many rows."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(rows / rows_per_step(args)))


def say_steps(args: TrainingArguments, rows: int) -> str:
    """Return the number of steps in words."""
    steps = count_steps(args, rows)
    return "1 step" if steps == 1 else f"{steps:,} steps"


def check_warmup(args: TrainingArguments, rows: int) -> None:
    """
    Warn where all of the `--max_steps` warm up, from a learning rate of 0.

    Raises:
        ValueError: All steps of `--num_train_epochs` do, which nobody asked for.
    """
    steps = count_steps(args, rows)
    if not 0 < steps <= args.get_warmup_steps(steps):
        return
    which = "the only step warms up: its learning rate is 0" if steps == 1 else f"all {steps} steps warm up"
    if args.max_steps > 0:
        print(f"WARNING: {which}. Give --warmup_steps 0, or more --max_steps.", flush=True)
        return
    raise ValueError(
        f"--num_train_epochs {args.num_train_epochs:g}: {which}. A step reads {rows_per_step(args)} of the {rows} "
        "training rows. Give --warmup_steps 0, more epochs, or fewer rows a step by --per_device_train_batch_size."
    )


def under_fsdp(args: TrainingArguments) -> bool:
    """Return whether FSDP is used. Upstream's `is_fsdp_enabled` also asks for weights that one
    process loads."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def defaults_of(options) -> dict:
    """Return the defaults of the fields of a dataclass that have one."""
    return {field.name: field.default for field in fields(options) if field.default is not MISSING}


def refuse_another_run(
    run: dict, folder: Path, checkpoint: str | None, is_main: bool, defaults: dict | None = None
) -> None:
    """
    Write `run.json`, what a run began with, or compare it with the one in the folder.

    Args:
        run: What makes a run this one and no other.
        checkpoint: A checkpoint or a result in the folder; None: there is nothing, and the run
            begins anew.
        is_main: Whether this process is the one that writes.
        defaults: The values of fields that an older `run.json` does not have.

    Raises:
        ValueError: The checkpoint is of another run.
    """
    path, run = folder / "run.json", json.loads(json.dumps(run))
    began = json.loads(path.read_text()) if path.exists() else {}
    if checkpoint and began:
        began = {**(defaults or {}), **began}
        if changed := [name for name in run if name in began and run[name] != began[name]]:
            differences = "; ".join(f"{name}: {began[name]} -> {run[name]}" for name in changed)
            raise ValueError(f"{folder} holds another run ({differences}). Choose another --output_dir, or delete it.")
    elif is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(run, indent=2))


def leave_report(trainer: Trainer, timer: StepTimer, options, extra: dict, history: list[dict] | None = None) -> None:
    """Write `results.json` and `training_log.json` of a model that has read plain text into the
    Trainer's folder.

    Args:
        options: The dataclass of the script's own options.
        extra: What the script found. `results.json` begins with it.
        history: The content of `training_log.json`; None: the Trainer's.
    """
    args, state = trainer.args, trainer.state
    report = {**extra, "tokens": state.num_input_tokens_seen, "steps": state.global_step, "seed": args.seed}
    report |= {"tokens_per_second": timer.tokens_per_second(state), "learning_rate": args.learning_rate}
    report |= {"batch_size": rows_per_step(args), "bf16": args.bf16, "torch_compile": args.torch_compile}
    report |= {"device": str(args.device), "options": asdict(options), **provenance()}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    write(Path(args.output_dir) / "results.json", json.dumps(report, indent=2))
    write(Path(args.output_dir) / "training_log.json", json.dumps(history or state.log_history, indent=1))


def mean_losses(history: list[dict]) -> list[tuple[dict, float]]:
    """Return training losses as means over equally many steps, each with the entry of the history
    where these end.

    The Trainer logs a mean over fewer steps after the first step, after a checkpoint and at the
    end. Such means are merged into means over one number of steps, the one that leaves out the
    fewest steps.
    """
    losses, before = [], 0
    for entry in history:
        if "loss" in entry:
            losses.append((entry, entry.get("loss_steps", entry["step"] - before)))
            before = entry["step"]
    merged = {size: _merge(losses, size) for size in sorted({steps for _, steps in losses})}
    return max(merged.items(), key=lambda item: item[0] * len(item[1]), default=(0, []))[1]


def _merge(losses: list[tuple[dict, int]], size: int) -> list[tuple[dict, float]]:
    """Return the means over `size` steps that successive losses add up to."""
    found, total, count = [], 0.0, 0
    for entry, steps in losses:
        if count + steps > size:
            total, count = 0.0, 0
        total, count = total + steps * entry["loss"], count + steps
        if count == size:
            found.append((entry, total / size))
            total, count = 0.0, 0
    return found


def plot_losses(
    history: list[dict],
    held_out: list[str],
    path: Path,
    levels: dict[str, dict[str, float]] | None = None,
    ylabel: str = "loss (nats a token)",
):
    """
    Plot the training loss, see `mean_losses`, and the losses of held-out texts over tokens.

    Args:
        held_out: The names of the held-out texts.
        levels: For each held-out text, losses to compare with, which are drawn as horizontal lines.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()

    def draw(entries: list[tuple[dict, float]], label: str, **style):
        points = [(entry["num_input_tokens_seen"], loss) for entry, loss in entries]
        if points:
            style.setdefault("marker", "." if len(points) < 20 else None)
            axes.plot(*zip(*points, strict=True), label=label, **style)

    draw(mean_losses(history), "training", color="silver")
    for number, name in enumerate(held_out):
        label = "held-out" if name == "held_out" else f"held-out {name}"
        key = f"eval_{name}_loss"
        draw([(entry, entry[key]) for entry in history if key in entry], label, color=f"C{number}", marker=".")
        for line, (label, loss) in zip(("--", ":"), (levels or {}).get(name, {}).items(), strict=False):
            axes.axhline(loss, color=f"C{number}", linestyle=line, label=f"{name}, {label}")
    axes.set(xlabel="tokens", ylabel=ylabel, title=path.parent.name)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend()
    figure.savefig(path, dpi=120)
