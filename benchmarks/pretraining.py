r"""Compare fine-tuning from a pretrained decoder with fine-tuning from random weights.

    python benchmarks/pretraining.py --data_dir path/to/glue --seeds 1 2 3
    python benchmarks/pretraining.py --models examples/nano my-up-trained-nano scratch \
        --tasks sst2 stsb

The tasks are SST-2 (accuracy) and STS-B (Spearman). Every model trains for the same number of
steps, at the better one of `--learning_rates`. The rate is chosen on a thousand rows that are set
aside from the official training set; the scores are those of the official validation set. The
default rates suit models of nano's size.

Without `--data_dir` the data is `nyu-mll/glue` from the Hub. With it, the files are
`sst2/train.jsonl` and so on, with the columns of the Hub. The flags of `TrainingArguments` work
too, except its learning rate and seed.

The script prints a table and writes `results.json`. Each finished fine-tuning leaves its score in
`cells/`, and the same one does not run again.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.finetuning.metrics import accuracy, pearson_and_spearman


class Task(NamedTuple):
    """Hold the template of a task's text, the outputs of its head, and its metric."""

    text: str
    num_labels: int
    metric: str


TASKS = {
    "sst2": Task("{sentence}", num_labels=2, metric="accuracy"),
    "stsb": Task("Sentence 1: {sentence1} Sentence 2: {sentence2}", num_labels=1, metric="spearman"),
}
SCRATCH = "scratch"
DEFAULTS = {
    "output_dir": "runs/pretraining",
    "max_steps": 400,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class BenchmarkArguments:
    """Hold the options of what is compared."""

    models: list[str] = field(
        default_factory=lambda: ["examples/nano", SCRATCH],
        metadata={"help": "Checkpoints; `scratch` is the first one's config with random weights."},
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Of " + ", ".join(TASKS) + "."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3])
    data_dir: str | None = None


@dataclass(frozen=True)
class Cell:
    """Hold what one fine-tuning is: where it starts, and what it trains and is evaluated on.

    `config_of` is the checkpoint whose config random weights are made of.
    """

    model: str
    config_of: str
    task: str
    split: str
    learning_rate: float
    seed: int

    def digest(self) -> str:
        """Return a digest of the weights, or of the config that random ones are made of."""
        path = Path(self.model) / "model.safetensors"
        if self.model == SCRATCH:
            path = Path(self.config_of) / "config.json"
        content = path.read_bytes() if path.exists() else self.model.encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def arguments(self, args: TrainingArguments) -> TrainingArguments:
        """Return the training options of the command line with this cell's rate and seed."""
        own = copy.copy(args)
        own.learning_rate, own.seed = self.learning_rate, self.seed
        own.output_dir = str(Path(args.output_dir) / "trainer")
        return own

    def path(self, args: TrainingArguments, data_dir: str | None) -> Path:
        """Return the file of the score. Its name has a digest of all options and of the weights."""
        settings = json.dumps(self.arguments(args).to_dict(), sort_keys=True, default=str)
        what = [self.digest(), self.task, self.split, str(data_dir), settings]
        digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
        start = f"{Path(self.model).name}-{self.task}-{self.split}"
        name = f"{start}-{self.learning_rate:g}-{self.seed}-{digest}.json"
        return Path(args.output_dir) / "cells" / name


def validate(options: BenchmarkArguments) -> None:
    """Raise ValueError for a task that does not exist, and for models without a config."""
    if unknown := [task for task in options.tasks if task not in TASKS]:
        raise ValueError(f"--tasks must be some of {', '.join(TASKS)}; got {', '.join(unknown)}.")
    if options.models[0] == SCRATCH:
        raise ValueError(
            f"The first of --models is {SCRATCH}, which takes its config from the first "
            "checkpoint. Name a checkpoint before it."
        )


def load_task(task: str, tokenizer, data_dir: str | None) -> dict:
    """Return the tokenized rows of `train`, `chosen_on` and `validation`.

    `chosen_on` has a thousand rows of the official training set, which `train` does not have.
    """
    if data_dir:
        folder, splits = Path(data_dir) / task, ("train", "validation")
        files = {split: str(folder / f"{split}.jsonl") for split in splits}
        rows = load_dataset("json", data_files=files)
    else:
        rows = load_dataset("nyu-mll/glue", task)

    def tokenize(row: dict) -> dict:
        encoding = tokenizer(TASKS[task].text.format(**row), truncation=True, max_length=128)
        return {**encoding, "labels": row["label"]}

    rows = rows.map(tokenize, remove_columns=rows["train"].column_names)
    split = rows["train"].train_test_split(1000, seed=0)
    return {"train": split["train"], "chosen_on": split["test"], "validation": rows["validation"]}


def compute_metrics(output) -> dict[str, float]:
    """Return the metrics of regression for one output, and of classification for more."""
    if output.predictions.shape[-1] == 1:
        return pearson_and_spearman(output.predictions[:, 0], output.label_ids)
    return accuracy(output.predictions.argmax(-1), output.label_ids)


def load_start(cell: Cell) -> GemmaEncoderForSequenceClassification:
    """Return the encoder that a fine-tuning starts from, with a new head."""
    num_labels = TASKS[cell.task].num_labels
    if cell.model == SCRATCH:
        config = GemmaEncoderConfig.from_pretrained(cell.config_of, num_labels=num_labels)
        return GemmaEncoderForSequenceClassification(config)
    return GemmaEncoderForSequenceClassification.from_pretrained(cell.model, num_labels=num_labels, dtype=torch.float32)


def fine_tune(cell: Cell, rows: dict, tokenizer, args: TrainingArguments) -> float:
    """Return the score of a cell after training it."""
    set_seed(args.seed)  # before the head is made
    trainer = Trainer(
        load_start(cell),
        args,
        train_dataset=rows["train"],
        eval_dataset=rows[cell.split],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer.evaluate()[f"eval_{TASKS[cell.task].metric}"]


@dataclass(frozen=True)
class Start:
    """Hold what all fine-tunings of a model on a task have in common."""

    model: str
    task: str
    rows: dict
    tokenizer: PreTrainedTokenizerBase
    options: BenchmarkArguments
    args: TrainingArguments

    def score(self, split: str, learning_rate: float, seed: int) -> float:
        """Return the score of a fine-tuning on a split. Run it unless its file is there."""
        config_of = self.options.models[0]
        cell = Cell(self.model, config_of, self.task, split, learning_rate, seed)
        path = cell.path(self.args, self.options.data_dir)
        if not path.exists():
            args = cell.arguments(self.args)
            score = fine_tune(cell, self.rows, self.tokenizer, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"score": score}))
            shutil.rmtree(args.output_dir, ignore_errors=True)
        return json.loads(path.read_text())["score"]

    def measure(self) -> dict:
        """Return the rate that is best for the model on the task, and the scores of all seeds."""
        options = self.options
        chosen_on = {rate: self.score("chosen_on", rate, 0) for rate in options.learning_rates}
        # A constant prediction has no rank correlation: its score, NaN, is the worst.
        rate = max(chosen_on, key=lambda rate: np.nan_to_num(chosen_on[rate], nan=-1))
        scores = [self.score("validation", rate, seed) for seed in options.seeds]
        return {"learning_rate": rate, "chosen_on": chosen_on, "scores": scores}


def compare(options: BenchmarkArguments, args: TrainingArguments) -> dict:
    """Return the results of each task and model, and print each as soon as it is there."""
    places = {model: options.models[0] if model == SCRATCH else model for model in options.models}
    tokenizers = {model: load_tokenizer(place) for model, place in places.items()}
    results = {task: {} for task in options.tasks}
    for task in options.tasks:
        for model in options.models:
            tokenizer = tokenizers[model]
            rows = load_task(task, tokenizer, options.data_dir)
            results[task][model] = Start(model, task, rows, tokenizer, options, args).measure()
            print(task, model, results[task][model], flush=True)
    return results


def markdown(results: dict, models: Iterable[str], title: str) -> str:
    """Return a table of means with the least and the greatest score, in percent."""
    lines = [f"| {title} | {' | '.join(results)} |", "| --- |" + " ---: |" * len(results)]
    for model in models:
        values = [np.array(of_task[model]["scores"]) * 100 for of_task in results.values()]
        shown = [f"{v.mean():.1f} ({v.min():.1f} to {v.max():.1f})" for v in values]
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main():
    parser = ScriptParser((BenchmarkArguments, TrainingArguments), __doc__)
    accelerated = torch.accelerator.is_available()
    parser.set_defaults(**DEFAULTS, use_cpu=not accelerated, dataloader_pin_memory=accelerated)
    options, args = parser.parse_args_into_dataclasses()
    with failing(parser):
        validate(options)
    results = compare(options, args)
    report = {
        "results": results,
        "seeds": options.seeds,
        "steps": args.max_steps,
        "bf16": args.bf16,
        "batch_size": args.per_device_train_batch_size,
        "torch": torch.__version__,
    }
    path = Path(args.output_dir) / "results.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    title = f"{args.max_steps} steps, {len(options.seeds)} seeds"
    print(f"\n{markdown(results, options.models, title)}")


if __name__ == "__main__":
    main()
