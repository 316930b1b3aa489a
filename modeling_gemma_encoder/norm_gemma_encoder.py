"""RMSNorm (arXiv 1910.07467) of Gemma 1, 2 and 3 in fewer passes over the states, for scoring on a
CPU.

A layer of Gemma 3 has six norms. Each is x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32.
Upstream's formula makes three tensors of the size of the states. Without a gradient one is enough:
the norms of the vectors are found first, and then the states are scaled, in place from then on.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

UPSTREAMS = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}  # one formula in all three


class ScoringRMSNorm(GemmaRMSNorm):
    """Compute upstream's norm in fewer passes if nothing needs a gradient: (..., dim) -> (...,
    dim)."""

    def __init__(self, norm: nn.Module):
        nn.Module.__init__(self)
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return scaled(states, self.weight, self.eps) if can_scale(self, states) else super().forward(states)


def with_scaling(module: nn.Module) -> None:
    """Replace upstream's norms within a module, under their own names and with their weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in UPSTREAMS:
                setattr(parent, name, ScoringRMSNorm(child))


def scaled(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the states scaled to a root mean square of one, times 1 + weight; it equals upstream's
    up to rounding."""
    in_fp32 = states.float()
    norms = torch.linalg.vector_norm(in_fp32, dim=-1, keepdim=True)
    factors = norms.square_().div_(states.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
    normalized = in_fp32 * factors if in_fp32 is states else in_fp32.mul_(factors)
    return normalized.mul_(1.0 + weight.float()).type_as(states)


def can_scale(norm: ScoringRMSNorm, states: torch.Tensor) -> bool:
    """Return whether nothing needs a gradient or upstream's own operations, and all is on a CPU."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and (states.requires_grad or norm.weight.requires_grad):
        return False
    plain = type(states) in (torch.Tensor, nn.Parameter) and type(norm.weight) is nn.Parameter
    return plain and states.device.type == norm.weight.device.type == "cpu"
