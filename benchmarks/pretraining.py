"""What reading English first is worth: fine-tuning from a decoder against the same decoder with random weights.

    python benchmarks/pretraining.py --data_dir path/to/glue --seeds 1 2 3
    python benchmarks/pretraining.py --models examples/nano my-up-trained-nano scratch --tasks sst2 stsb

SST-2 (accuracy) and STS-B (Spearman), trained for the same number of steps from every start. Each start has the better
of `--learning_rates` (for models of nano's size), as judged on a thousand rows of the official training set that are
set aside; scores are of the official validation sets. Without `--data_dir` the data is `nyu-mll/glue` on the Hub; with
it, `sst2/train.jsonl` and so on, in the Hub's columns. A fine-tuning that has finished (`cells/`) is not run again.
Flags of `TrainingArguments` work, but for the rates and seeds above. Prints a table and writes `results.json`.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder._scripts.command_line import ScriptParser
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.finetuning.metrics import accuracy, pearson_and_spearman


class Task(NamedTuple):
    text: str
    num_labels: int
    metric: str


TASKS = {
    "sst2": Task("{sentence}", num_labels=2, metric="accuracy"),
    "stsb": Task("Sentence 1: {sentence1} Sentence 2: {sentence2}", num_labels=1, metric="spearman"),
}
SCRATCH = "scratch"


@dataclass
class BenchmarkArguments:
    models: list[str] = field(
        default_factory=lambda: ["examples/nano", SCRATCH],
        metadata={"help": "Checkpoints; `scratch` is the first one's config with random weights."},
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Of " + ", ".join(TASKS) + "."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3])
    data_dir: str | None = None


def load_task(task: str, tokenizer, data_dir: str | None) -> dict:
    """Tokenized rows: `train`, `chosen_on` (a thousand rows of the official training set) and `validation`."""
    if data_dir:
        files = {split: str(Path(data_dir) / task / f"{split}.jsonl") for split in ("train", "validation")}
        rows = load_dataset("json", data_files=files)
    else:
        rows = load_dataset("nyu-mll/glue", task)
    form = TASKS[task].text
    rows = rows.map(
        lambda row: {**tokenizer(form.format(**row), truncation=True, max_length=128), "labels": row["label"]},
        remove_columns=rows["train"].column_names,
    )
    split = rows["train"].train_test_split(1000, seed=0)
    return {"train": split["train"], "chosen_on": split["test"], "validation": rows["validation"]}


def digest(model: str, config_of: str) -> str:
    """What a start is: its weights, or the config that random ones are made of."""
    path = Path(config_of) / "config.json" if model == SCRATCH else Path(model) / "model.safetensors"
    return hashlib.sha256(path.read_bytes() if path.exists() else model.encode()).hexdigest()[:12]


def metrics(output) -> dict[str, float]:
    if output.predictions.shape[-1] == 1:
        return pearson_and_spearman(output.predictions[:, 0], output.label_ids)
    return accuracy(output.predictions.argmax(-1), output.label_ids)


def fine_tune(
    model: str, task: str, rows: dict, split: str, tokenizer, config_of: str, args: TrainingArguments
) -> float:
    set_seed(args.seed)
    num_labels = TASKS[task].num_labels
    if model == SCRATCH:
        config = GemmaEncoderConfig.from_pretrained(config_of, num_labels=num_labels)
        encoder = GemmaEncoderForSequenceClassification(config)
    else:
        encoder = GemmaEncoderForSequenceClassification.from_pretrained(
            model, num_labels=num_labels, dtype=torch.float32
        )
    trainer = Trainer(
        encoder,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows[split],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    trainer.train()
    return trainer.evaluate()[f"eval_{TASKS[task].metric}"]


def main():
    parser = ScriptParser((BenchmarkArguments, TrainingArguments), __doc__)
    parser.set_defaults(  # our choice
        output_dir="runs/pretraining",
        max_steps=400,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    options, args = parser.parse_args_into_dataclasses()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"--tasks knows {', '.join(TASKS)}, not {', '.join(unknown)}")
    if options.models[0] == SCRATCH:
        parser.error(f"--models must begin with a checkpoint: {SCRATCH} takes its config")
    config_of, folder = options.models[0], Path(args.output_dir)
    tokenizers = {model: load_tokenizer(config_of if model == SCRATCH else model) for model in options.models}

    def cell(model, task, rows, split, learning_rate, seed) -> float:
        """One fine-tuning, or its score if the same one has been run."""
        args.learning_rate, args.seed, args.output_dir = learning_rate, seed, str(folder / "trainer")
        options_of_training = json.dumps(args.to_dict(), sort_keys=True, default=str)
        what = [digest(model, config_of), task, split, str(options.data_dir), options_of_training]
        name = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
        path = folder / "cells" / f"{Path(model).name}-{task}-{split}-{learning_rate:g}-{seed}-{name}.json"
        if not path.exists():
            value = fine_tune(model, task, rows, split, tokenizers[model], config_of, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"score": value}))
            shutil.rmtree(folder / "trainer", ignore_errors=True)
        return json.loads(path.read_text())["score"]

    results = {}
    for task in options.tasks:
        for model in options.models:
            rows = load_task(task, tokenizers[model], options.data_dir)
            chosen_on = {rate: cell(model, task, rows, "chosen_on", rate, 0) for rate in options.learning_rates}
            rate = max(chosen_on, key=lambda rate: np.nan_to_num(chosen_on[rate], nan=-1))
            scores = [cell(model, task, rows, "validation", rate, seed) for seed in options.seeds]
            results.setdefault(task, {})[model] = {"learning_rate": rate, "chosen_on": chosen_on, "scores": scores}
            print(task, model, results[task][model], flush=True)
    report = {"results": results, "seeds": options.seeds, "steps": args.max_steps, "bf16": args.bf16}
    report |= {"batch_size": args.per_device_train_batch_size, "torch": torch.__version__}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n| {args.max_steps} steps, {len(options.seeds)} seeds | {' | '.join(results)} |")
    print("| --- |" + " ---: |" * len(results))
    for model in options.models:
        values = [np.array(results[task][model]["scores"]) * 100 for task in results]
        print(f"| {model} | {' | '.join(f'{v.mean():.1f} ({v.min():.1f} to {v.max():.1f})' for v in values)} |")


if __name__ == "__main__":
    main()
