"""The feed-forward block down(act(gate(x)) * up(x)) (GeGLU, arXiv 2002.05202), fused for scoring on
a CPU.

The block has upstream's layers under their own names, and maps (..., hidden) to (..., hidden).
Computed by themselves, activation and product read and write (tokens, intermediate_size), which
costs up to a fifth of the block's time on a CPU. oneDNN, which torch is built with, applies both to
the output of a matrix product while it is in the caches.

These products have no gradient. Upstream's formula runs if a gradient is needed, and if a layer is
not a plain linear one: adapted, quantized, sharded, offloaded, or with hooks. torch's
`FlopCounterMode` does not count these products.
"""

from platform import machine

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

LAYERS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# oneDNN's names for the activations of Gemma, and of Llama and Qwen.
FUSED_ACTIVATIONS = {type(ACT2FN["gelu_pytorch_tanh"]): ("gelu", "tanh"), type(ACT2FN["silu"]): ("swish", "")}


class FeedForward(nn.Module):
    """Run the layers of upstream's block, fused if that is possible: (..., hidden) -> (...,
    hidden)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if can_fuse(self, states):
            return fused(self, states)
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


def with_fusing(block: nn.Module) -> nn.Module:
    """Return a decoder's block as a `FeedForward`, or the block itself if its layers are others."""
    return FeedForward(block) if {name for name, _ in block.named_children()} == LAYERS else block


def fused(block: FeedForward, states: torch.Tensor) -> torch.Tensor:
    """Return the output of the block by fused products.

    It equals upstream's up to rounding: in bf16, activation and product are rounded once, not
    twice.
    """
    gate, up, down = block.gate_proj, block.up_proj, block.down_proj
    linear, (activation, algorithm) = torch.ops.mkldnn._linear_pointwise, FUSED_ACTIVATIONS[type(block.act_fn)]
    gated = linear(states, gate.weight, gate.bias, activation, [], algorithm)
    gated = linear.binary(states, gated, up.weight, up.bias, "mul")
    return linear(gated, down.weight, down.bias, "none", [], "")


def can_fuse(block: FeedForward, states: torch.Tensor) -> bool:
    """Return whether fused products exist for this block and these states, and compute the same."""
    # Compiling, tracing and forward-mode gradients must see upstream's formula.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if type(states) not in (torch.Tensor, nn.Parameter) or not states.numel() or states.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or not runs_here(states.dtype) or type(block.act_fn) not in FUSED_ACTIVATIONS:
        return False
    if torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in block.parameters())):
        return False
    linear = (block.gate_proj, block.up_proj, block.down_proj)
    return has_no_hooks(block.act_fn) and all(is_plain(layer, states.dtype) and has_no_hooks(layer) for layer in linear)


def runs_here(dtype: torch.dtype) -> bool:
    """Return whether this torch and this processor have the fused products in `dtype`."""
    if dtype not in (torch.float32, torch.bfloat16) or machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None or "binary" not in product.overloads():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a layer is torch's `nn.Linear`, with ordinary parameters of this dtype on a
    CPU."""

    def is_ordinary(p: nn.Parameter) -> bool:
        return type(p) is nn.Parameter and p.layout == torch.strided and p.device.type == "cpu" and p.numel() > 0

    return type(layer) is nn.Linear and all(is_ordinary(p) and p.dtype == dtype for p in layer.parameters())


def has_no_hooks(module: nn.Module) -> bool:
    """Return whether a module has no hooks and its own `forward`, so that it need not be called."""
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return not (everywhere or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
