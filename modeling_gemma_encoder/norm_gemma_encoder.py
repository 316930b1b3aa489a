"""RMSNorm (arXiv 1910.07467) of Gemma 1, 2 and 3 in fewer passes over the states, on a CPU.

A layer of Gemma 3 has six norms. Each is x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32.
Upstream's formula makes three tensors of the size of the states, keeps two for the backward pass,
and makes eight more there. Here the forward pass makes one and keeps none but its input, and the
backward pass makes two, by the derivative written out.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

UPSTREAMS = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}  # one formula in all three


class FewPassRMSNorm(GemmaRMSNorm):
    """Compute upstream's norm in fewer passes where that is possible: (..., dim) -> (..., dim)."""

    def __init__(self, norm: nn.Module):
        nn.Module.__init__(self)
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if can_scale(self, states):
            return Scaling.apply(states, self.weight, self.eps)
        return super().forward(states)


def with_scaling(module: nn.Module) -> None:
    """Replace upstream's norms within a module, under their own names and with their weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in UPSTREAMS:
                setattr(parent, name, FewPassRMSNorm(child))


class Scaling(torch.autograd.Function):
    """Scale states to a root mean square of one, times 1 + weight; it equals upstream's up to
    rounding.

    With x the states, f = 1 / sqrt(mean(x^2) + eps) and g the gradient times 1 + weight, the
    gradient of the states is f * g - x * f^3 * mean(g * x). Autograd can derive it once more.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.eps = eps
        in_fp32 = states.float()
        factors = factors_of(in_fp32, eps)
        normalized = in_fp32 * factors if in_fp32 is states else in_fp32.mul_(factors)
        return normalized.mul_(1.0 + weight.float()).type_as(states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        states, weight = ctx.saved_tensors
        # Vectors as rows, in the order in which they lie in memory: queries and keys come transposed.
        order = [*sorted(range(states.dim() - 1), key=states.stride, reverse=True), states.dim() - 1]
        ordered = states.permute(order)
        x, g = (part.reshape(-1, part.shape[-1]).float() for part in (ordered, gradient.permute(order)))
        factors, scale, products = factors_of(x, ctx.eps), 1.0 + weight.float(), g * x
        with torch.autocast(x.device.type, enabled=False):  # `backward` may be called within one
            means = (products @ scale)[:, None] / x.shape[-1]
            of_weight = (factors[:, 0] @ products).type_as(weight) if ctx.needs_input_grad[1] else None
        of_states = (g * scale).mul_(factors).addcmul_(x, factors**3 * means, value=-1).type_as(states)
        back = [order.index(dim) for dim in range(len(order))]
        return of_states.view(ordered.shape).permute(back), of_weight, None


def factors_of(states: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) of each vector of the states, (..., 1)."""
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return (norms.square() / states.shape[-1] + eps).rsqrt()


def can_scale(norm: FewPassRMSNorm, states: torch.Tensor) -> bool:
    """Return whether all is on a CPU, and nothing needs upstream's own operations."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    plain = type(states) in (torch.Tensor, nn.Parameter) and type(norm.weight) is nn.Parameter
    return plain and states.device.type == norm.weight.device.type == "cpu"
