"""A run of fine-tuning: a task, a seed and a folder. It resumes where it stopped, and is never run
twice.

The folder ends with the model, the predictions of every split that was evaluated or predicted,
plots, and `results.json`. The last is written at the end: where it exists, the run is finished.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import transformers
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments, set_seed

from .._scripts.files import read
from .._scripts.training import (
    check_warmup,
    checkpoint_to_resume,
    defaults_of,
    refuse_another_run,
    replacing_weights,
    resumable,
    rows_per_step,
    say_steps,
    train_from,
    under_fsdp,
)
from ..callbacks import KeepMemory, StepTimer
from ..ranking.data import collate_lists
from ..verification_gemma_encoder import verify_attention
from .arguments import FineTuningArguments
from .data import Data
from .model import build, weighted_loss
from .results import Evaluation, describe, evaluate, write_results
from .tasks import Task, most_frequent, predictions_of

# A folder holds another run if one of these arguments of the Trainer differs,
IDENTIFYING_ARGUMENTS = (
    *("do_train", "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("train_sampling_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# or one of these fields of the task,
IDENTIFYING_FIELDS = (
    *("texts", "template", "label", "label_columns", "labels", "problem", "class_weights", "standardize"),
)
# or any option of `FineTuningArguments` but these: they change how fast it is, or what is
# evaluated.
FREE_OPTIONS = (
    *("total_batch_size", "max_length", "max_eval_samples", "preprocessing_num_workers", "attn_implementation"),
)


class TrainerInOrder(Trainer):
    """Evaluate rows in their order, also where training groups them by length: metrics and
    predictions need it."""

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


@dataclass(frozen=True)
class Run:
    """A run of fine-tuning, whose folder is `args.output_dir`.

    Args:
        name: The name of the task.
        trained: The folder of a finished run, whose model is evaluated here without further
            training.
        make: A function that makes another model than `build`, to compare with.
    """

    name: str
    task: Task
    data: Data
    options: FineTuningArguments
    args: TrainingArguments
    trained: Path | None = None
    make: Callable[[Task, FineTuningArguments], PreTrainedModel] | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.args.output_dir)

    @property
    def results(self) -> Path:
        """Return the file that is written last, when the run is finished."""
        return self.folder / "results.json"

    @property
    def trains(self) -> bool:
        """Return whether a model is trained, and not only evaluated."""
        return self.trained is None and self.args.do_train


def fine_tune(run: Run) -> dict:
    """
    Train, evaluate and predict, and return what `results.json` in the run's folder then holds.

    A run that was interrupted continues from its last checkpoint, and ends with the same weights.
    Of a finished run only what is missing is done: splits to evaluate or predict that it was not
    asked for before.

    Raises:
        ValueError: The folder holds another run, or the Trainer cannot do what the arguments ask of
            this task.
    """
    checkpoint, report = claim(run), read(run.results)
    evaluated = report.get("evaluated", {})
    if report and all(evaluated.get(split) == rows for split, rows in wanted(run.data).items()):
        return report
    if report and run.make is None and any(run.folder.glob("*model*.safetensors")):
        run = Run(run.name, run.task, run.data, run.options, run.args, trained=run.folder)
    if under_fsdp(run.args) and not run.trains:
        raise ValueError(
            "FSDP2 shards a model together with its optimizer: evaluate and predict after training in the same run, or "
            "run this command again in one process."
        )
    try:
        with resumable(run.args, run.results):
            return _train_and_evaluate(run, checkpoint, report)
    finally:  # the Trainer and its model hold each other, and the next run needs the memory
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def claim(run: Run) -> str | None:
    """Write `run.json` in the run's folder: the task, its training rows, the options and the
    Trainer's arguments.

    Returns:
        The checkpoint to continue from, or None.

    Raises:
        ValueError: The folder holds another run, there is no such checkpoint or metric as the
            Trainer is told, or all steps would warm up.
    """
    check_best_metric(run)
    checkpoint = checkpoint_to_resume(run.args)
    began_with = str(run.results) if run.results.exists() else checkpoint
    if run.trains and not began_with:
        check_warmup(run.args, len(run.data.train))
    # A run.json that was written before there were these fields means their defaults.
    defaults = {"class_weights": None, "standardize": False, **defaults_of(run.options)}
    refuse_another_run(identity(run), run.folder, began_with, run.args.process_index == 0, defaults)
    return checkpoint


def check_best_metric(run: Run) -> None:
    """Raise ValueError where `--metric_for_best_model` is not a metric of the task."""
    best, first = run.args.metric_for_best_model, next(iter(run.data.validation.values()), None)
    if best is None or first is None or run.data.train is None:
        return
    known = ["loss", *run.task.metric(most_frequent(run.task, run.data.train, first), first)]
    if best.removeprefix("eval_") not in known:
        raise ValueError(f"--metric_for_best_model must be one of {', '.join(known)}; got {best}.")


def identity(run: Run) -> dict:
    """Return what makes a run this one and no other, as `run.json` has it."""
    options = {key: value for key, value in asdict(run.options).items() if key not in FREE_OPTIONS}
    return {
        "task": run.name,
        **{key: getattr(run.task, key) for key in IDENTIFYING_FIELDS},
        **options,
        **{key: getattr(run.args, key) for key in IDENTIFYING_ARGUMENTS},
        "batch_size": rows_per_step(run.args),
        "max_length": run.data.max_length,
        "rows": run.data.digests.get("train"),
        "trained": run.trained and str(run.trained),
    }


def wanted(data: Data) -> dict[str, str]:
    """Return the digests of the splits to evaluate and predict."""
    return {split: data.digests[split] for split in (*data.validation, *data.test)}


def _train_and_evaluate(run: Run, checkpoint: str | None, report: dict) -> dict:
    set_seed(run.args.seed)
    timer = StepTimer()
    model = load_model(run, checkpoint)
    trainer = make_trainer(run, model, timer)
    if run.trains:
        if run.args.process_index == 0:
            say_how_long(run)
        train_from(trainer, checkpoint)
        trainer.save_model()
    if run.make is None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        verify_attention(trainer.model)
    evaluation = evaluate(run.task, run.data, trainer)
    if not trainer.is_world_process_zero():
        return report
    if run.trains:
        report = describe(run.data, trainer, model, timer)
    report = update_report(report, run, evaluation)
    write_results(run.task, run.data, report, evaluation, run.folder)
    return report


def load_model(run: Run, checkpoint: str | None) -> PreTrainedModel:
    """Load the model of a finished run, or make the one that is trained."""
    with replacing_weights(checkpoint if run.trains else None):
        if run.trained:
            return run.task.head.from_pretrained(run.trained, attn_implementation=run.options.attn_implementation)
        return run.make(run.task, run.options) if run.make else build(run.task, run.options, run.data.train)


def make_trainer(run: Run, model: PreTrainedModel, timer: StepTimer) -> TrainerInOrder:
    """Return the Trainer of a run, which evaluates the first validation split."""
    task, data, args = run.task, run.data, run.args
    first, pad = next(iter(data.validation), None), DataCollatorWithPadding(data.tokenizer)

    def collate(rows: list[dict]) -> dict:
        return collate_lists(rows, data.tokenizer) if task.problem == "choice" else pad(rows)

    def score(output: EvalPrediction) -> dict[str, float]:
        return task.metric(predictions_of(task, output.predictions, output.label_ids), data.validation[first])

    args.include_num_input_tokens_seen = "non_padding"
    if first is None:
        args.eval_strategy = "no"
    return TrainerInOrder(
        model,
        args,
        train_dataset=data.encoded["train"] if run.trains else None,
        eval_dataset=data.encoded.get(first),
        data_collator=collate,
        processing_class=data.tokenizer,
        compute_loss_func=weighted_loss(task, data.train) if task.class_weights and run.trains else None,
        compute_metrics=score if first else None,
        callbacks=[timer, KeepMemory()],
    )


def say_how_long(run: Run) -> None:
    """Print how much a run reads, and how fast it learns."""
    args, rows = run.args, len(run.data.train)
    steps = say_steps(args, rows)
    if args.max_steps <= 0:
        steps += f" in {args.num_train_epochs:g} epochs"
    rate = f"learning rate {args.learning_rate:g}, up to {run.data.max_length} tokens"
    batch = f"{rows_per_step(args)} rows a step"
    print(f"{run.name}, seed {args.seed}: {rows:,} rows, {steps}, {batch}, {rate}", flush=True)


def update_report(report: dict, run: Run, evaluation: Evaluation) -> dict:
    """Return a report with what was evaluated now, in place of what was found of the same splits
    before."""
    data = run.data

    def merge(key: str, found: dict[str, dict]) -> dict[str, dict]:
        # A split may now be of other rows without labels, so that its scores of before are not kept
        # either.
        kept = {split: of for split, of in report.get(key, {}).items() if split not in evaluation.predictions}
        return kept | found

    report = {
        "task": run.name,
        "seed": run.args.seed,
        **report,
        "scores": merge("scores", evaluation.scores),
        "majority": merge("majority", evaluation.majority),
        "evaluated": {**report.get("evaluated", {}), **wanted(data)},
    }
    report.setdefault("model", str(run.trained or run.options.model))
    report["rows"] = {**report.get("rows", {}), **{split: len(rows) for split, rows in data.encoded.items()}}
    report["sources"] = {**report.get("sources", {}), **data.sources}
    report["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    return report
