"""A run of fine-tuning: a task, a seed and a folder; resumed where it stopped, and never run twice.

The folder ends with the model, `results.json` (written last: a run is finished when it is there), the predictions of
every split that was evaluated or predicted, and plots.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .._scripts.files import write
from .._scripts.provenance import provenance
from .._scripts.training import (
    checkpoint_to_resume,
    count_steps,
    defaults_of,
    refuse_another_run,
    replacing_weights,
    resumable,
    rows_per_step,
    train_from,
    under_fsdp,
)
from ..callbacks import StepTimer
from ..checkpoints import load_tokenizer
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..ranking.data import collate_lists
from ..verification_gemma_encoder import verify_attention
from .arguments import FineTuningArguments
from .model import build, weighted_loss
from .reports import plot_run
from .tasks import Source, Task, most_frequent, predictions_of, say_empty

# What of TrainingArguments makes a run another one.
RECIPE = (
    *("do_train", "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("train_sampling_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# And of the task.
LEARNED = ("texts", "template", "label", "label_columns", "labels", "problem", "class_weights", "standardize")
# Options that do not.
SAME_RUN = ("total_batch_size", "max_length", "max_eval_samples", "preprocessing_num_workers", "attn_implementation")


class TrainerInOrder(Trainer):
    """Evaluates rows in their order, also where training groups them by length: metrics and predictions need it."""

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


@dataclass
class Data:
    """The splits of a task, checked and encoded; `sources` says of a split what a card tells of its origin."""

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
        """Raises ValueError where a split, a column, a label, or a text's length is not what the task needs."""
        train = {"train": task.load(source, "train")} if args.do_train and not task.train_on else {}
        validation = {split: task.load(source, split) for split in task.validation} if args.do_eval else {}
        predicted = args.do_predict or task.train_on  # a task without training rows is there for its test set
        test = {split: task.load(source, split, labelled=False) for split in task.test} if predicted else {}
        for split, rows in {**train, **validation, **test}.items() if args.process_index == 0 else ():
            say_empty(name, source, split, rows, task.texts)
        numbers = {}  # of the rows of a split, where they are not all, or in another order
        if train and options.max_train_samples and options.max_train_samples < len(train["train"]):
            order = Dataset.from_dict({"row": range(len(train["train"]))}).shuffle(seed=args.seed)
            numbers["train"] = order["row"][: options.max_train_samples]
            train["train"] = train["train"].select(numbers["train"])
        if train and task.class_weights:
            weighted_loss(task, train["train"])  # says now where a class has no row
        if limit := options.max_eval_samples:
            validation = {split: rows.select(range(min(limit, len(rows)))) for split, rows in validation.items()}

        tokenizer = task.set_template(load_tokenizer(options.model))
        positions = GemmaEncoderConfig.from_pretrained(options.model).max_position_embeddings
        known = tokenizer.model_max_length  # of a model that is not trained here: as it was, where it says so
        as_trained = known if not args.do_train and known <= positions else None
        max_length = min(options.max_length or as_trained or task.max_length, positions)
        template = tokenizer.num_special_tokens_to_add(pair=True)
        if max_length < template + 2:
            raise ValueError(f"--max_length {max_length} leaves no room beside the template's {template} tokens.")
        tokenizer.model_max_length = max_length  # saved with the model: it is read as it was trained
        encoded = {}
        for split, rows in {**train, **validation, **test}.items():
            with args.main_process_first():
                encoded[split] = rows.map(
                    encode_row,
                    with_indices=True,
                    fn_kwargs={"task": task, "of": (tokenizer, max_length), "at": (source, split, numbers.get(split))},
                    remove_columns=rows.column_names,
                    new_fingerprint=task.fingerprint(rows, tokenizer, max_length),
                    num_proc=options.preprocessing_num_workers,
                    desc=f"{name}, {split}",
                )
            if args.process_index == 0 and (cut := np.mean(encoded[split]["cut"])):
                print(f"{name}, {split}: {cut:.1%} of the rows are cut to {max_length} tokens", flush=True)
        digests = {split: digest(rows) for split, rows in {**train, **validation, **test}.items()}
        return cls(train.get("train"), validation, test, encoded, digests, tokenizer, max_length)


def encode_row(row: dict, number: int, task: Task, of: tuple, at: tuple[Source, str, list[int] | None]) -> dict:
    """`Task.encode` by a tokenizer and a length, whose ValueErrors say which row of a source's split it is."""
    source, split, numbers = at
    try:
        return task.encode(row, *of)
    except ValueError as error:
        where = source.where(split, number if numbers is None else numbers[number])
        raise ValueError(f"{where}: {error}") from error


def fine_tune(
    name: str,
    task: Task,
    data: Data,
    options: FineTuningArguments,
    args: TrainingArguments,
    trained: Path | None = None,
    make: Callable[[Task, FineTuningArguments], PreTrainedModel] | None = None,
) -> dict:
    """
    One run in `args.output_dir`: trains, evaluates, predicts, and leaves the model and `results.json` there.

    A run that was interrupted goes on from its last checkpoint, to the same weights; of a finished one only what is
    missing is done: splits to evaluate or predict that it was not asked for before.

    Args:
        trained: Folder of a finished run, whose model is evaluated here without further training.
        make: Makes another model than ours, to compare with.

    Raises:
        ValueError: the folder holds another run, or the Trainer cannot do what `args` say with this task.
    """
    checkpoint = claim(name, task, data, options, args, trained)
    folder, finished = Path(args.output_dir), Path(args.output_dir) / "results.json"
    report = json.loads(finished.read_text()) if finished.exists() else {}
    wanted = {split: data.digests[split] for split in (*data.validation, *data.test)}
    if report and all(report["evaluated"].get(split) == rows for split, rows in wanted.items()):
        return report
    if report and make is None and any(folder.glob("*model*.safetensors")):
        trained = folder
    if under_fsdp(args) and (trained or not args.do_train):
        raise ValueError(
            "FSDP2 shards a model together with its optimizer: evaluate and predict after training in the same run, or "
            "run this command again in one process."
        )
    try:
        with resumable(args, finished):
            return _run(name, task, data, options, args, trained, make, checkpoint, report, wanted)
    finally:  # the Trainer and its model hold each other: the next run needs the memory
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def claim(
    name: str, task: Task, data: Data, options: FineTuningArguments, args: TrainingArguments, trained: Path | None
) -> str | None:
    """
    Writes down in the run's folder which run it is: the task, its training rows, the options and the recipe.

    Returns:
        The checkpoint to go on from.

    Raises:
        ValueError: it holds another run, or the Trainer was told of a checkpoint or a metric that is not there.
    """
    best, first = args.metric_for_best_model, next(iter(data.validation.values()), None)
    if best is not None and first is not None and data.train is not None:
        known = ["loss", *task.metric(most_frequent(task, data.train, first), first)]
        if best.removeprefix("eval_") not in known:
            raise ValueError(f"--metric_for_best_model {best} is none of {', '.join(known)}")
    folder, checkpoint = Path(args.output_dir), checkpoint_to_resume(args)
    finished = folder / "results.json"
    recipe = {key: getattr(args, key) for key in RECIPE}
    recipe["batch_size"] = rows_per_step(args)
    what = {key: getattr(task, key) for key in LEARNED}
    chosen = {key: value for key, value in asdict(options).items() if key not in SAME_RUN}
    run = {"task": name, **what, **chosen, **recipe, "max_length": data.max_length}
    run |= {"rows": data.digests.get("train"), "trained": trained and str(trained)}
    began_with = str(finished) if finished.exists() else checkpoint
    defaults = {"class_weights": None, "standardize": False, **defaults_of(options)}
    refuse_another_run(run, folder, began_with, args.process_index == 0, defaults)
    return checkpoint


def digest(rows: Dataset) -> str:
    """Of the rows' content."""
    found = sha256()
    for part in rows.with_format("arrow").iter(1000):
        found.update(json.dumps(part.to_pydict(), default=str).encode())
    return found.hexdigest()[:16]


def _run(name, task, data, options, args, trained, make, checkpoint, report, wanted) -> dict:
    set_seed(args.seed)
    folder = Path(args.output_dir)
    train = trained is None and args.do_train
    attention = {"attn_implementation": options.attn_implementation}
    with replacing_weights(checkpoint if train else None):
        if trained:
            model = task.head.from_pretrained(trained, **attention)
        else:
            model = make(task, options) if make else build(task, options, data.train)
    tokenizer, first = data.tokenizer, next(iter(data.validation), None)
    pad, timer = DataCollatorWithPadding(tokenizer), StepTimer()

    def collate(rows: list[dict]) -> dict:
        return collate_lists(rows, tokenizer) if task.problem == "choice" else pad(rows)

    def score(output: EvalPrediction) -> dict[str, float]:
        return task.metric(predictions_of(task, output.predictions, output.label_ids), data.validation[first])

    args.include_num_input_tokens_seen = "non_padding"
    if first is None:
        args.eval_strategy = "no"
    trainer = TrainerInOrder(
        model,
        args,
        train_dataset=data.encoded["train"] if train else None,
        eval_dataset=data.encoded.get(first),
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=weighted_loss(task, data.train) if task.class_weights and train else None,
        compute_metrics=score if first else None,
        callbacks=[timer],
    )
    if train and args.process_index == 0:
        batch = rows_per_step(args)
        long = f"{count_steps(args, len(data.train)):,} steps"
        long += f" in {args.num_train_epochs:g} epochs" if args.max_steps <= 0 else ""
        rate = f"learning rate {args.learning_rate:g}, up to {data.max_length} tokens"
        print(f"{name}, seed {args.seed}: {len(data.train):,} rows, {long}, {batch} rows a step, {rate}", flush=True)
    if train:
        train_from(trainer, checkpoint)
        trainer.save_model()
    if make is None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        verify_attention(trainer.model)

    trainer.compute_metrics, scores, majority, predicted, logits = None, {}, {}, {}, {}
    for split, rows in {**data.validation, **data.test}.items():
        output = trainer.predict(data.encoded[split], metric_key_prefix=split)
        predicted[split], logits[split] = predictions_of(task, output.predictions, output.label_ids), output.predictions
        if "label" in task.read(rows[0]):
            scores[split] = task.metric(predicted[split], rows)
            if data.train:
                majority[split] = task.metric(most_frequent(task, data.train, rows), rows)
    if not trainer.is_world_process_zero():
        return report
    if train:
        report = describe(task, data, trainer, model, timer)
    evaluated = {**report.get("evaluated", {}), **wanted}
    # Of splits that were predicted before on other rows nothing is kept, if these have no labels.
    kept = {
        key: {split: found for split, found in report.get(key, {}).items() if split not in predicted}
        for key in ("scores", "majority")
    }
    scores, majority = kept["scores"] | scores, kept["majority"] | majority
    report = {"task": name, "seed": args.seed, **report, "scores": scores, "majority": majority, "evaluated": evaluated}
    report.setdefault("model", str(trained or options.model))
    report["rows"] = {**report.get("rows", {}), **{split: len(rows) for split, rows in data.encoded.items()}}
    report["sources"] = {**report.get("sources", {}), **data.sources}
    report["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    folder.mkdir(parents=True, exist_ok=True)
    for split in predicted:
        found = {"predictions": predicted[split].tolist(), "logits": logits[split].tolist()}
        write(folder / f"predictions-{split}.json", json.dumps(found))
    plot_run(task, report, {split: (predicted[split], rows) for split, rows in data.validation.items()}, folder)
    write(folder / "results.json", json.dumps(report, indent=2))
    return report


def describe(task: Task, data: Data, trainer: Trainer, model: PreTrainedModel, timer: StepTimer) -> dict:
    """What is known of a training: its size, speed and course."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # whole under DeepSpeed
    return {
        "rows": {split: len(rows) for split, rows in data.encoded.items()},
        "cut": {split: float(np.mean(rows["cut"])) for split, rows in data.encoded.items()},
        "max_length": data.max_length,
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "real_tokens_per_second": timer.real_tokens_per_second(),
        "parameters": {"all": sum(size for size, _ in sizes), "trained": sum(size for size, free in sizes if free)},
        "history": trainer.state.log_history,
        **provenance(),
    }


def predictions(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and logits of a split that a finished run evaluated or predicted, in the order of its rows."""
    found = json.loads((folder / f"predictions-{split}.json").read_text())
    return np.array(found["predictions"]), np.array(found["logits"])
