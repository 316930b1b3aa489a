"""The model that is fine-tuned, the checks before it is loaded, and the loss of weighted classes."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from .._scripts.training import under_fsdp
from ..checkpoints import decoder_of
from ..configuration_gemma_encoder import TASK_HEADS, GemmaEncoderConfig
from ..encoding_gemma_encoder import refuse_dropout
from ..fused_gemma_encoder import FUSED
from ..losses_gemma_encoder import IGNORE, mean_over
from ..modeling_gemma_encoder import GemmaEncoderHead
from .arguments import FineTuningArguments, encoder_options
from .tasks import Task


def refuse_training(implementation: str | None, dropout: float, softcap: float | None, args: TrainingArguments) -> None:
    """Raise ValueError where an attention implementation cannot be trained with these options, or
    on this device.

    Args:
        dropout: The dropout of attention weights.
        softcap: The bound of attention scores, as Gemma 2 has it.
    """
    refuse_dropout(implementation or "", dropout, softcap)
    if args.neftune_noise_alpha and implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError("--neftune_noise_alpha needs padded rows: add --attn_implementation eager.")
    if implementation in (FUSED, "flex_attention") and args.device.type == "cpu":
        raise ValueError(
            f"attn_implementation={implementation!r} trains on a GPU only: flex attention has no gradient on a CPU."
        )


def refuse_smoothing(problem: str, args: TrainingArguments) -> None:
    """Raise ValueError where label smoothing, which is of a cross-entropy over classes, does not
    fit the problem."""
    if args.label_smoothing_factor and problem != "single_label_classification":
        other = {"choice": "ranking", "multi_label_classification": "several labels a row"}.get(problem, problem)
        given = f"--label_smoothing_factor {args.label_smoothing_factor:g}"
        raise ValueError(f"{given} is for tasks with one class a row, and this is {other}: leave it out.")


def check_model(task: Task, options: FineTuningArguments, args: TrainingArguments) -> None:
    """Raise ValueError where the options do not go with the checkpoint, before anything is loaded."""
    config = GemmaEncoderConfig.from_pretrained(options.model, **encoder_options(options))
    refuse_smoothing(task.problem, args)
    check_head(config, task, options, args)
    with torch.device("meta"):  # attention that is not supported is an error when a model is made
        task.head._from_config(config, attn_implementation=options.attn_implementation)
    if args.do_train:
        check_training(config, task, options, args)
    if options.classifier_activation and not config.classifier_hidden_sizes:
        raise ValueError("--classifier_activation is of --classifier_hidden_sizes, and there are none.")
    layers = {name.rpartition(".")[2] for name, _ in decoder_of(options.model).named_modules()}
    if unknown := [name for name in options.lora_target_modules or () if name not in layers]:
        raise ValueError(f"--lora_target_modules: the decoder has no layers named {', '.join(unknown)}.")


def check_head(config: GemmaEncoderConfig, task: Task, options: FineTuningArguments, args: TrainingArguments) -> None:
    """Raise ValueError where a checkpoint has a head for other classes, unless a fresh one is
    trained."""
    if has_head(config) and config.num_labels != task.outputs and not options.ignore_mismatched_sizes:
        raise ValueError(
            f"--model {options.model} has a head with {config.num_labels} outputs, the task needs {task.outputs}. "
            "--ignore_mismatched_sizes begins with a fresh one."
        )
    if other_classes(config, task) and not (args.do_train and options.ignore_mismatched_sizes):
        how = "If they are the same, write them alike, in the data or in `id2label` and `label2id` of its config.json"
        how += "; --ignore_mismatched_sizes begins with a fresh head." if args.do_train else "."
        raise ValueError(
            f"--model {options.model} has a head for the {'classes' if task.labels else 'columns'} "
            f"{', '.join(config.id2label.values())}, the data has {', '.join(task.labels or task.label_columns)}. {how}"
        )


def check_training(
    config: GemmaEncoderConfig, task: Task, options: FineTuningArguments, args: TrainingArguments
) -> None:
    """Raise ValueError where a model cannot be trained on these devices, or with this attention."""
    in_parts = task.problem == "choice" and config.list_chunk_size is not None
    if in_parts and (under_fsdp(args) or is_deepspeed_zero3_enabled()):
        raise ValueError(
            f"list_chunk_size={config.list_chunk_size}, of the flag or of --model's config.json, encodes a list in as "
            "many parts as it needs, and FSDP and DeepSpeed ZeRO-3 need as many on every device: set it to None."
        )
    softcap = getattr(config.text_config, "attn_logit_softcapping", None)
    refuse_training(options.attn_implementation, config.attention_dropout, softcap, args)


def has_head(config: GemmaEncoderConfig) -> bool:
    """Return whether a checkpoint has the head of a task."""
    return bool(set(config.architectures) & set(TASK_HEADS))


def other_classes(config: GemmaEncoderConfig, task: Task) -> bool:
    """Return whether a checkpoint has a head for as many classes with other names."""
    named = has_head(config) and config.id2label.get(0) != "LABEL_0"
    names = list(task.labels or task.label_columns)
    return named and config.num_labels == len(names) > 1 and list(config.id2label.values()) != names


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Exclude the embeddings from training: in Gemma 3 270M they are 168 of 268 million parameters."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.requires_grad_(False)


def scale_of(train: Dataset) -> dict[str, list[float]]:
    """Return `label_mean` and `label_std` of a regression's training rows; a column of one value
    has a std of 1."""
    labels = np.array(train["label"], dtype=float).reshape(len(train), -1)
    std = labels.std(0)
    return {"label_mean": labels.mean(0).tolist(), "label_std": np.where(std > 0, std, 1.0).tolist()}


def build(task: Task, options: FineTuningArguments, train: Dataset | None = None) -> PreTrainedModel:
    """
    Return the encoder with the task's head, and with adapters where they are asked for.

    Args:
        train: The training rows. A fresh head is given the scale of their labels where the task
            says so.
    """
    saved = GemmaEncoderConfig.from_pretrained(options.model)
    fresh_head = options.ignore_mismatched_sizes or not has_head(saved)
    rows = train if fresh_head and task.standardize else None
    model = task.head.from_pretrained(options.model, **loading_options(task, options, fresh_head, rows))
    if options.ignore_mismatched_sizes and other_classes(saved, task):
        model.classifier = GemmaEncoderHead(model.config, model.config.num_labels).to(model.device)
        model.classifier.apply(model._init_weights)
    if options.freeze_embeddings:
        freeze_embeddings(model)
    if options.lora_r is not None:
        from ..adapters import add_lora

        model = add_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules)
    return model


def loading_options(task: Task, options: FineTuningArguments, fresh_head: bool, rows: Dataset | None) -> dict:
    """Return the arguments of `from_pretrained`: fields of the config, and how weights are loaded.

    Args:
        rows: Training rows, whose labels' scale a fresh head is given; None for no scale.
    """
    found = {**encoder_options(options), "dtype": getattr(torch, options.dtype)}
    found["attn_implementation"] = options.attn_implementation
    found |= {"calibration_temperature": None, "calibration_bias": 0.0}  # those of the checkpoint fit other weights
    if task.problem != "choice":
        names = task.labels or task.label_columns or (task.label,)
        found |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
        found["problem_type"] = task.problem
        if fresh_head:
            found |= {"label_mean": None, "label_std": None} if rows is None else scale_of(rows)
    if options.load_in_4bit:
        from ..adapters import four_bit

        found["quantization_config"] = four_bit()
    if options.ignore_mismatched_sizes:
        found["ignore_mismatched_sizes"] = True
    return found


def weighted_loss(task: Task, train: Dataset) -> Callable:
    """Return the Trainer's `compute_loss_func` of cross-entropy with a weight for each class,
    `task.class_weights`.

    The weighted sum is divided by the number of rows, which the Trainer counts over all accumulated
    batches and devices, so that neither changes a gradient. The mean weight of the training rows is
    1, so that the loss is as large as without weights. The weighted mean of `torch` divides by the
    sum of a batch's weights instead, which differs between batches.

    Raises:
        ValueError: A class has no training row.
    """
    labels, classes = np.array(train["label"]), np.arange(len(task.labels))
    if absent := [task.labels[number] for number in np.setdiff1d(classes, labels)]:
        raise ValueError(f"--class_weights {task.class_weights}: no training row is {', '.join(absent)}.")
    weights = torch.tensor(compute_class_weight(task.class_weights, classes=classes, y=labels), dtype=torch.float32)

    def loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        options = {"weight": weights.to(logits.device), "ignore_index": IGNORE, "reduction": "sum"}
        return mean_over(F.cross_entropy(logits, labels.reshape(-1).long(), **options), labels, num_items_in_batch)

    return loss
