"""In which dtype a device computes fast, and a warning where bf16 would be many times slower than fp32.

A processor without bf16 instructions (AVX2 alone, most laptops and many clouds) converts every number by itself: torch
multiplies matrices in bf16 there about a hundred times more slowly than in fp32, which looks like a hang.
"""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Instructions that multiply in bf16, as `torch.cpu.get_capabilities` calls them, on x86 and on ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def computes_in_bf16(device: torch.device | str) -> bool:
    """Return whether a device has instructions of its own for bf16; True for accelerators that cannot be asked."""
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
    """Say once what to do where a model with this weight computes in bf16 on a processor that is slow in it."""
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        return
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if (cast or weight.dtype == torch.bfloat16) and not computes_in_bf16("cpu"):
        instead = "train with bf16=False" if cast else "pass dtype=torch.float32 to from_pretrained, or model.float()"
        logger.warning_once(f"This processor has no bf16 instructions: bf16 is many times slower than fp32. {instead}.")
