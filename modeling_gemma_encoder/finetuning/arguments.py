"""What is fine-tuned and how: options of the command line, defaults by size, and the model they make."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from ..checkpoints import parameters_of
from ..configuration_gemma_encoder import Attention, GemmaEncoderConfig, Pooling, RankingLoss
from ..pretrained_gemma_encoder import find_adapter
from .tasks import Task

# Our choice, by the decoder's parameters, at most: learning rates of full fine-tuning and of adapters. A tenth of
# the steps to warm up, then down to zero in a line; batches and passes over the data are the task's.
LEARNING_RATES = ((100e6, 5e-4, 1e-3), (500e6, 5e-5, 5e-4), (1.5e9, 2e-5, 2e-4), (float("inf"), 1e-5, 1e-4))


@dataclass
class FineTuningArguments:
    """What is fine-tuned, and how; the first ones are options of `GemmaEncoderConfig`."""

    model: str = field(metadata={"help": "A checkpoint of Gemma, Llama or Qwen: raw, up-trained or fine-tuned."})
    attention: Attention | None = field(
        default=None,
        metadata={"help": "This and the following: default as --model has it, or the config's."},
    )
    attention_window: int | None = field(default=None, metadata={"help": "Radius in tokens."})
    pooling: Pooling | None = None
    pooling_k: int | None = field(default=None, metadata={"help": "Of first_k and last_k."})
    pooling_num_probes: int | None = field(default=None, metadata={"help": "Of query_probe and kv_probe."})
    pooling_num_heads: int | None = field(default=None, metadata={"help": "Of query_probe and kv_probe."})
    attention_dropout: float | None = field(default=None, metadata={"help": "On attention weights."})
    feedforward_dropout: float | None = field(default=None, metadata={"help": "On what feed-forward blocks add."})
    classifier_hidden_sizes: list[int] | None = field(default=None, metadata={"help": "Hidden layers of the head."})
    classifier_activation: str | None = field(default=None, metadata={"help": "Between them, as `ACT2FN` has it."})
    classifier_dropout: float | None = field(default=None, metadata={"help": "Within the head."})
    ranking_loss: RankingLoss | None = field(default=None, metadata={"help": "Of rankers."})
    list_chunk_size: int | None = field(
        default=None, metadata={"help": "Candidates encoded at a time, to save memory."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a fresh head where --model has one for other classes."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "What computes attention, see the README; default: gemma_encoder_unpadded."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens that are read; default: the task's."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Training rows, at most, chosen by --seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The first rows of each validation split."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the weights; bfloat16 only where adapters are trained."}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of a step on all devices; sets --gradient_accumulation_steps, however many there are."},
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Leave the embedding as it is: a quarter of Gemma 2 2B, most of Gemma 3 270M."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Train adapters of this rank instead of all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Default: twice the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "On what enters an adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Default: every linear layer of the decoder."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Adapters over 4-bit weights (bitsandbytes)."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def problem(self, args: TrainingArguments) -> str | None:
        """What cannot be, in the words of the command line."""
        if args.do_train and find_adapter(self.model, {}):
            return f"--model {self.model} is an adapter, which is not trained further: merge it first, see the README"
        if args.prediction_loss_only or args.batch_eval_metrics:
            return "--prediction_loss_only and --batch_eval_metrics leave no predictions to score"
        if self.load_in_4bit and self.lora_r is None:
            return "--load_in_4bit needs --lora_r: 4-bit weights cannot be trained themselves"
        if self.dtype == "bfloat16" and self.lora_r is None:
            return "--dtype bfloat16 needs --lora_r: small updates are lost in bf16 weights; use --bf16 instead"
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_target_modules):
            return "--lora_alpha and --lora_target_modules need --lora_r"
        for name in ("max_length", "max_train_samples", "max_eval_samples", "lora_r"):
            if (value := getattr(self, name)) is not None and value < 1:
                return f"--{name} must be at least 1, got {value}"
        return None


ENCODER_OPTIONS = FineTuningArguments.__dataclass_fields__.keys() & (
    GemmaEncoderConfig.__dataclass_fields__.keys() - {"dtype"}
)


# Whatever the decoder's size; our choice.
COMMON = {
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 10,
    "logging_first_step": True,
    "report_to": "none",
    "use_cpu": not torch.accelerator.is_available(),
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def training_defaults(model: str, adapters: bool, task: Task) -> dict:
    """Defaults of `TrainingArguments` for a decoder of this size and a task; our choice."""
    parameters = parameters_of(model)
    row = next(row for row in LEARNING_RATES if parameters <= row[0])
    return {
        "learning_rate": row[2] if adapters else row[1],
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch_size,
        "per_device_eval_batch_size": 2 * task.batch_size,
    }


def encoder_options(options: FineTuningArguments) -> dict:
    """The config's fields that the command line names."""
    return {name: value for name in ENCODER_OPTIONS if (value := getattr(options, name)) is not None}
