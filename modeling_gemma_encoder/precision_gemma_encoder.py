"""In which dtype a device computes fast and soundly: a warning where bf16 is slow, an error where
fp16 is NaN.

A processor without bf16 instructions (AVX2 alone, most laptops and many clouds) converts every
number by itself: torch multiplies matrices in bf16 there about a hundred times more slowly than in
fp32, which looks like a hang.

fp16 ends at 65504, which the residual stream of Gemma 2 and 3 exceeds: infinite states, and scores
that are NaN.
"""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Instructions that multiply in bf16, as `torch.cpu.get_capabilities` calls them, on x86 and on ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def computes_in_bf16(device: torch.device | str) -> bool:
    """Return whether a device has instructions of its own for bf16; True for accelerators that
    cannot be asked."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.10
        return torch.cpu._is_avx512_bf16_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)


def warn_of_slow_bf16(weight: torch.Tensor) -> None:
    """Say once what to do where a model with this weight computes in bf16 on a processor that is
    slow in it."""
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        return
    cast = dtype_of_autocast("cpu") == torch.bfloat16
    if (cast or weight.dtype == torch.bfloat16) and not computes_in_bf16("cpu"):
        instead = "train with bf16=False" if cast else "pass dtype=torch.float32 to from_pretrained, or model.float()"
        logger.warning_once(f"This processor has no bf16 instructions: bf16 is many times slower than fp32. {instead}.")


def refuse_non_finite(name: str, values: torch.Tensor, weight: torch.Tensor, training: bool) -> None:
    """Check what a model with this weight returns as `name`; in training only under fp16, where no
    step mends it.

    Raises:
        ValueError: a value is infinite or NaN; the message says what to do.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or values.is_meta:
        return
    short = torch.float16 in (weight.dtype, dtype_of_autocast(values.device.type))
    if (training and not short) or values.isfinite().all():
        return
    if short:
        raise ValueError(
            f"`{name}` has values that are infinite or NaN: float16 ends at 65504, which states of this decoder "
            "exceed. Load it with dtype=torch.bfloat16 or dtype=torch.float32, and train with bf16=True in the place "
            "of fp16=True."
        )
    raise ValueError(
        f"`{name}` has values that are infinite or NaN, of weights in {str(weight.dtype).removeprefix('torch.')}. They "
        "are not sound, or a part computes in float16 (`bnb_4bit_compute_dtype`). Did training diverge? Train with a "
        "lower learning rate, or go back to an earlier checkpoint."
    )


def dtype_of_autocast(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a device; None without autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
