"""What PEFT may do to an encoder: nothing that comes back from an adapter's folder may be random or causal.

PEFT knows a classifier's head by the names "classifier" and "score", trains and saves it, and nothing else beside the
adapter. It keeps no config of the model, and its folders load on whatever class the decoder's own config names.
"""

import torch
from torch import nn
from transformers.integrations import is_fsdp_enabled

# Modules whose weights a task trains from scratch, by the names that `modules_to_save` has for them.
PARTS = ("pooler", "classifier")


class StockHeadGuard(nn.Module):
    """Keep an adapter of ours from loading on a stock Gemma classifier.

    Where no config of ours lies beside an adapter, `AutoModelForSequenceClassification` puts it on the causal class,
    whose head `score` would be random, with a warning only. PEFT saves this module under that name, with an empty
    weight: it does not fit there, and raises. A model that PEFT has not wrapped has no such weight.
    """

    def __deepcopy__(self, memo) -> "StockHeadGuard":
        copied = type(self)()
        # Copied by itself, as PEFT copies modules that it saves, and not as a part of a model. accelerate's FSDP2 takes
        # no buffers (1.15: every entry of the state dict must be sharded); there `add_lora` alone guards its folders.
        if not memo and not is_fsdp_enabled():
            copied.register_buffer("weight", torch.empty(0))
        return copied


def parts_with_weights(model: nn.Module) -> list[str]:
    """Return the names of the parts of a model that have parameters."""
    return [name for name in PARTS if any(True for _ in getattr(model, name, nn.Identity()).parameters())]


def is_adapted(model: nn.Module) -> bool:
    """Return whether PEFT has wrapped a module of the model."""
    return any(hasattr(module, "get_base_layer") or hasattr(module, "modules_to_save") for module in model.modules())


def refuse_lost_parts(model: nn.Module, *unused) -> None:
    """
    Check that new weights of a head or pooler are trained and saved with an adapter. Also a hook before `state_dict`.

    Raises:
        ValueError: PEFT would leave them as they were drawn, and the adapter's folder would not hold them.
    """
    lost = [name for name in model.new_parts if not hasattr(getattr(model, name), "modules_to_save")]
    if lost and is_adapted(model):
        names = " and ".join(f"`{name}`" for name in lost)
        raise ValueError(
            f"The weights of {names} are new, and this adapter would neither train nor save them. Adapt with "
            "`add_lora(model)` of `modeling_gemma_encoder.adapters`, or pass "
            f"modules_to_save={parts_with_weights(model)} to PEFT's config."
        )


def refuse_shadow(model: nn.Module) -> None:
    """Raise ValueError for layers of ShadowPEFT, which runs a causal decoder of its own beside the encoder."""
    if type(model.model.layers[0]).__module__.startswith("peft.tuners.shadow"):
        raise ValueError(
            "ShadowPEFT is not supported: it runs a decoder of its own beside the encoder, with padding and causally. "
            "Use another adapter, such as LoRA."
        )
