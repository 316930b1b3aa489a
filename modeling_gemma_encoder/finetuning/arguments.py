"""The options of fine-tuning on the command line, and the Trainer's defaults by the size of the
decoder."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from ..adapter_gemma_encoder import find_adapter
from ..checkpoints import parameters_of
from ..configuration_gemma_encoder import Attention, GemmaEncoderConfig, Pooling, RankingLoss
from .tasks import Task

# Our choice. A row has the largest number of the decoder's parameters that it is for, the learning
# rate of full fine-tuning, and that of adapters. The rate rises for a tenth of the steps and then
# falls linearly to zero. Batch sizes and numbers of epochs are the task's.
LEARNING_RATES = ((100e6, 5e-4, 1e-3), (500e6, 5e-5, 5e-4), (1.5e9, 2e-5, 2e-4), (float("inf"), 1e-5, 1e-4))


@dataclass
class FineTuningArguments:
    """The options of what is fine-tuned, and how. None leaves a field of the config as the
    checkpoint has it."""

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
        default=None, metadata={"help": "Computes attention, see docs/options.md; default: gemma_encoder_unpadded."}
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

    def validate(self, args: TrainingArguments) -> None:
        """Raise ValueError for options that contradict each other or the Trainer's."""
        if args.do_train and find_adapter(self.model, {}):
            raise ValueError(
                f"--model {self.model} is an adapter, which is not trained further. Merge it, see docs/adapters.md."
            )
        if args.prediction_loss_only or args.batch_eval_metrics:
            raise ValueError("--prediction_loss_only and --batch_eval_metrics leave no predictions to score.")
        self._validate_adapters()
        for name in ("max_length", "max_train_samples", "max_eval_samples", "lora_r"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")

    def _validate_adapters(self) -> None:
        if self.lora_r is not None:
            return
        if self.load_in_4bit:
            raise ValueError("--load_in_4bit needs --lora_r: 4-bit weights cannot be trained themselves.")
        if self.dtype == "bfloat16":
            raise ValueError(
                "--dtype bfloat16 needs --lora_r: small updates are lost in bf16 weights; use --bf16 instead."
            )
        if self.lora_alpha is not None or self.lora_target_modules:
            raise ValueError("--lora_alpha and --lora_target_modules need --lora_r.")


@dataclass
class TableArguments:
    """The options of a user's own table: its files, its columns, and what is learned of them."""

    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    dataset: str | None = field(default=None, metadata={"help": "On the Hub, as `name` or `name:config`, instead."})
    train_split: str = field(default="train", metadata={"help": "Of --dataset."})
    validation_split: str | None = field(default=None, metadata={"help": "Of --dataset."})
    test_split: str = field(default="test", metadata={"help": "Of --dataset, for --do_predict."})
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs. Default: text; with --do_train false as --model was trained."},
    )
    label_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "One column, several of 0 and 1, or several of numbers with --problem regression. Default: label; "
            "with --do_train false as --model was trained."
        },
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Of the classes, where labels are lists of 0 and 1. Default: 0, 1, 2, ..."}
    )
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "Default: by the training labels; numbers with a fraction are regression."}
    )
    template: str | None = field(
        default=None,
        metadata={"help": "How two texts are read as one. Default: {first}\n{second}, or as a trained --model does."},
    )
    class_weights: Literal["balanced"] | None = field(
        default=None,
        metadata={"help": "What a row counts in the loss; balanced: training rows / (classes x rows of its class)."},
    )
    standardize_labels: bool = field(
        default=True,
        metadata={
            "help": "A regression learns labels less their mean, over their deviation, and predicts them as read."
        },
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "A run for each. Default: --seed alone."})

    @property
    def lacks_training(self) -> bool:
        """Return whether there are no rows to train on."""
        return self.train_file is None and self.dataset is None

    def validate(self, do_train: bool, do_eval: bool, do_predict: bool) -> None:
        """Raise ValueError for flags that contradict each other, or lack a file."""
        self._validate_files(do_train, do_eval, do_predict)
        if self.text_column and len(self.text_column) > 2:
            raise ValueError(f"--text_column takes one or two columns, got {', '.join(self.text_column)}.")
        several = len(self.label_column or ()) > 1
        if self.class_names and (self.lacks_training or several):
            raise ValueError("--class_names is for training on one column of lists of 0 and 1.")
        if self.problem == "single_label_classification" and several:
            raise ValueError(f"--problem {self.problem} takes one --label_column, got {', '.join(self.label_column)}.")
        if self.class_weights and not do_train:
            raise ValueError(f"--class_weights {self.class_weights} is for training.")

    def _validate_files(self, do_train: bool, do_eval: bool, do_predict: bool) -> None:
        if (do_train and self.lacks_training) or (self.train_file and self.dataset):
            raise ValueError("give either --train_file or --dataset.")
        if self.lacks_training and do_eval and not self.validation_file:
            raise ValueError("--do_eval needs --validation_file; or give --do_eval false.")
        if do_predict and not (self.test_file or self.dataset):
            raise ValueError("--do_predict needs --test_file.")
        if not (do_train or do_eval or do_predict):
            raise ValueError("there is nothing to do without --do_train, --do_eval and --do_predict.")


ENCODER_OPTIONS = FineTuningArguments.__dataclass_fields__.keys() & (
    GemmaEncoderConfig.__dataclass_fields__.keys() - {"dtype"}
)

# Our choice of the Trainer's defaults for decoders of any size.
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
    """Return the defaults of `TrainingArguments` for a decoder of this size and a task."""
    parameters = parameters_of(model)
    row = next(row for row in LEARNING_RATES if parameters <= row[0])
    return {
        "learning_rate": row[2] if adapters else row[1],
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch_size,
        "per_device_eval_batch_size": 2 * task.batch_size,
    }


def encoder_options(options: FineTuningArguments) -> dict:
    """Return the fields of `GemmaEncoderConfig` that the command line gives."""
    return {name: value for name in ENCODER_OPTIONS if (value := getattr(options, name)) is not None}
