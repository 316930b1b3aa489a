"""The feed-forward block down(act(gate(x)) * up(x)) (GeGLU, arXiv 2002.05202), in fewer passes where a CPU scores.

The layers are upstream's own, under their own names. Activation and product cost up to a fifth of the block on a CPU
when they are passes of their own over (tokens, intermediate_size); oneDNN, which torch is built with, applies both to
the outputs of a matrix product before they leave the caches. It has no gradient, so whatever needs one runs upstream's
formula, and so does every layer that is more than a plain linear one: adapted, quantised, sharded, offloaded, or with
hooks. torch's `FlopCounterMode` does not count these products.
"""

from platform import machine

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

LAYERS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# What oneDNN calls the activations of Gemma, and of Llama and Qwen.
FUSED_ACTIVATIONS = {type(ACT2FN["gelu_pytorch_tanh"]): ("gelu", "tanh"), type(ACT2FN["silu"]): ("swish", "")}


class FeedForward(nn.Module):
    """Upstream's layers of such a block, (..., hidden) -> (..., hidden)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if can_fuse(self, states):
            return fused(self, states)
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


def with_fusing(block: nn.Module) -> nn.Module:
    """A decoder's block as a `FeedForward`, or as it is where it has other layers than that."""
    return FeedForward(block) if {name for name, _ in block.named_children()} == LAYERS else block


def fused(block: FeedForward, states: torch.Tensor) -> torch.Tensor:
    """What `FeedForward.forward` returns, to rounding: in bf16, activation and product are rounded once, not twice."""
    gate, up, down = block.gate_proj, block.up_proj, block.down_proj
    linear, (activation, algorithm) = torch.ops.mkldnn._linear_pointwise, FUSED_ACTIVATIONS[type(block.act_fn)]
    gated = linear(states, gate.weight, gate.bias, activation, [], algorithm)
    gated = linear.binary(states, gated, up.weight, up.bias, "mul")
    return linear(gated, down.weight, down.bias, "none", [], "")


def can_fuse(block: FeedForward, states: torch.Tensor) -> bool:
    """Whether that is possible here, and the same."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if type(states) not in (torch.Tensor, nn.Parameter) or not states.numel() or states.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or not runs_here(states.dtype) or type(block.act_fn) not in FUSED_ACTIVATIONS:
        return False
    if torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in block.parameters())):
        return False
    linear = (block.gate_proj, block.up_proj, block.down_proj)
    return is_unheard(block.act_fn) and all(is_plain(layer, states.dtype) and is_unheard(layer) for layer in linear)


def runs_here(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have these products in `dtype`."""
    if dtype not in (torch.float32, torch.bfloat16) or machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None or "binary" not in product.overloads():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is torch's own, with ordinary parameters of this dtype on a CPU."""

    def is_ordinary(p: nn.Parameter) -> bool:
        return type(p) is nn.Parameter and p.layout == torch.strided and p.device.type == "cpu" and p.numel() > 0

    return type(layer) is nn.Linear and all(is_ordinary(p) and p.dtype == dtype for p in layer.parameters())


def is_unheard(module: nn.Module) -> bool:
    """Whether nobody waits for a module's call."""
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return not (everywhere or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
