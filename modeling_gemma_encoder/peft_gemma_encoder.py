"""Checks of what PEFT does to an encoder, so that no adapter loads with random weights or causal
attention.

PEFT recognizes a classifier's head by the names "classifier" and "score". It trains and saves the
head, and nothing else beside the adapter. It saves no config of the model, and its folders load on
any class that the decoder's own config names.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

# Modules whose weights a task trains from scratch, by the names that `modules_to_save` has for
# them.
PARTS = ("pooler", "classifier")
# The prefix that a `PeftModel` gives to the names of the model it adapts.
WITHIN_PEFT = "base_model.model."
# With these files sentence-transformers calls `MergeFirst` to load a model. Without them it would
# read the base model's config alone, and look for its weights in the adapter's folder.
CROSS_ENCODER_FILES = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "peft_gemma_encoder.MergeFirst"}],
    "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
}


class StockHeadGuard(nn.Module):
    """Keep the adapter of an encoder from loading on a stock Gemma classifier.

    If no encoder's config lies beside an adapter, `AutoModelForSequenceClassification` loads it on
    the causal class, whose head `score` would be random, and only warns. PEFT copies this module
    and saves it under that name. The copy saves an empty weight, which does not fit the stock head,
    so that loading raises. Nothing else uses that weight.
    """

    was_given = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Save the weight in the way that PEFT asks for it.

        When PEFT saves, it asks for an adapted model's weights, and then once for this module's.
        When it loads, it asks for this module's alone, and is given none. Sharded models cannot
        hold the weight.
        """
        within = f"{WITHIN_PEFT}score.modules_to_save." in prefix
        asked = within or (not prefix and self.was_given)
        if asked and not is_fsdp_enabled() and not is_deepspeed_zero3_enabled():
            destination[f"{prefix}weight"] = torch.empty(0)
            self.was_given = within

    def _load_from_state_dict(self, *unused):
        pass


class MergeFirst:
    """Tell a user who loads an adapter with `CrossEncoder` to merge it first."""

    @classmethod
    def load(cls, path, **kwargs):
        """Raise ValueError, which says how to merge the adapter at `path`."""
        raise ValueError(
            f"{path} is an adapter, which `CrossEncoder` does not load. Merge it first, with "
            f'`modeling_gemma_encoder.adapters.merge({str(path)!r}, "merged")`, and load the folder that is written.'
        )


def write_cross_encoder_files(folder: Path) -> None:
    """Write the files into an adapter's folder that make `CrossEncoder` raise the error of
    `MergeFirst`."""
    for name, content in CROSS_ENCODER_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def parts_with_weights(model: nn.Module) -> list[str]:
    """Return the names of the parts of a model that have parameters."""
    return [name for name in PARTS if any(True for _ in getattr(model, name, nn.Identity()).parameters())]


def is_wrapped(part: nn.Module) -> bool:
    """Return whether PEFT trains and saves a copy of the part, by `modules_to_save`."""
    return hasattr(part, "modules_to_save")


def was_drawn(part: nn.Module) -> bool:
    """Return whether a part has weights that were not in the checkpoint, which `_init_weights`
    marks."""
    return any(getattr(module, "was_drawn", False) for module in part.modules())


def is_adapted(model: nn.Module) -> bool:
    """Return whether PEFT has wrapped a module of the model."""
    return any(hasattr(module, "get_base_layer") or is_wrapped(module) for module in model.modules())


def refuse_lost_parts(model: nn.Module, frozen_alone: bool = False) -> None:
    """
    Check that new weights of a head or pooler are saved with an adapter.

    Args:
        frozen_alone: Check only parts without a trainable weight, which PEFT has frozen.

    Raises:
        ValueError: the adapter's folder would lack such weights.
    """
    parts = {name: getattr(model, name) for name in parts_with_weights(model)}
    if frozen_alone:
        parts = {name: part for name, part in parts.items() if not any(p.requires_grad for p in part.parameters())}
    lost = [name for name, part in parts.items() if was_drawn(part) and not is_wrapped(part)]
    if lost and is_adapted(model):
        names = " and ".join(f"`{name}`" for name in lost)
        raise ValueError(
            f"The weights of {names} are not in the checkpoint, and this adapter would not save them. Adapt with "
            '`add_lora(model)` of `modeling_gemma_encoder.adapters`, or pass task_type="SEQ_CLS" and '
            f"modules_to_save={parts_with_weights(model)} to PEFT's config."
        )


def refuse_unguarded(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Check a `PeftModel` before PEFT saves it, as a hook that runs before `state_dict` of the
    model in it.

    Raises:
        ValueError: the folder would lack new weights, or load on the stock causal class.
    """
    if not prefix.endswith(WITHIN_PEFT):
        return
    refuse_lost_parts(model)
    head, guard = getattr(model, "classifier", None), getattr(model, "score", None)
    if isinstance(guard, StockHeadGuard) and is_wrapped(head) and was_drawn(head):
        raise ValueError(
            "This adapter has no task type, and would load on the stock causal class with a random head. Pass "
            'task_type="SEQ_CLS" to PEFT\'s config, or adapt with `add_lora(model)`. `merge_and_unload()` keeps what '
            "was trained."
        )


def refuse_shadow(model: nn.Module) -> None:
    """Raise ValueError for layers of ShadowPEFT, which runs a causal decoder of its own beside the
    encoder."""
    if type(model.model.layers[0]).__module__.startswith("peft.tuners.shadow"):
        raise ValueError(
            "ShadowPEFT is not supported: it runs a decoder of its own beside the encoder, which is causal and sees "
            "padding. Use another adapter, such as LoRA."
        )
