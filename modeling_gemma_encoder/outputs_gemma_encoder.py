"""Outputs for the caller: states and attention weights in the shape of the input, with zeros at
padding.

Shapes: token states (tokens, hidden) become (batch, seq_len, hidden), weights (batch, heads,
seq_len, seq_len).
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .attention_gemma_encoder import Unpadding


def to_padded(states: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put token states (tokens, hidden) back into (batch, seq_len, hidden), with zeros at padding."""
    indices, mask = indices.to(states.device), mask.to(states.device)  # layers may be spread over devices
    padded = states.new_zeros(mask.numel(), states.shape[-1]).index_copy(0, indices, states)
    return padded.view(*mask.shape, -1).where(mask[..., None], 0)


def pairs(mask: torch.Tensor) -> torch.Tensor:
    """Return which pairs of tokens are both real, (batch, 1, seq_len, seq_len)."""
    return mask[:, None, :, None] & mask[:, None, None, :]


def zero_elsewhere(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return `values` with zeros where `kept` is False."""
    return values.where(kept.to(values.device), 0)  # layers may be spread over devices


def states_to_padded(states: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put a layer's states (1, tokens, hidden) back into (batch, seq_len, hidden)."""
    return to_padded(states[0], indices, mask)


def attentions_to_padded(weights: torch.Tensor, unpadding: Unpadding, mask: torch.Tensor) -> torch.Tensor:
    """Put a layer's attention weights back into (batch, heads, seq_len, seq_len), with zeros at
    padding."""
    return zero_elsewhere(restore_attentions(weights, unpadding, mask.shape[1]), pairs(mask))


class RetainGrad:
    """Keep the gradient of the states that the layers used, in the `grad` of a copy; called as its
    `retain_grad`."""

    def __init__(self, copied: torch.Tensor, used: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor]):
        self.copied, self.used, self.arrange = weakref.ref(copied), used, arrange  # a copy holds its `RetainGrad`
        self.total, self.is_kept = None, False

    def __call__(self) -> None:
        if not self.is_kept:
            torch.Tensor.retain_grad(self.copied())  # says that there will be one; `keep` comes after it
            self.used.register_hook(self.keep)
            self.is_kept = True

    def keep(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the original to the `grad` of the copy, in the copy's shape."""
        gradient = self.arrange(gradient.detach())
        self.total = gradient if self.total is None else self.total + gradient
        if (copied := self.copied()) is not None:
            copied.grad = self.total

    def __reduce__(self):
        return partial, (bool,)  # a copy that was saved leads nowhere, and its `retain_grad` does nothing


def arranged(used: torch.Tensor | None, arrange: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """Return `arrange(used)`, a copy for the caller, whose `retain_grad` keeps the gradient of the
    original.

    No score depends on the copy, so its own gradient would be None. `arrange` only moves values, or
    sets zeros.
    """
    if used is None:  # a layer that was not asked for
        return None
    copied = arrange(used)
    if copied.requires_grad and not torch.compiler.is_compiling():
        earlier = vars(used).get("retain_grad")  # of a copy of a copy
        if earlier is not None:
            used, arrange = earlier.used, partial(_in_turn, earlier.arrange, arrange)
        copied.retain_grad = RetainGrad(copied, used, arrange)
    return copied


def _in_turn(first: Callable, second: Callable, values: torch.Tensor) -> torch.Tensor:
    return second(first(values))


def restore_attentions(weights: torch.Tensor, unpadding: Unpadding, seq_len: int) -> torch.Tensor:
    """Move attention weights (batch, heads, max_length, max_length) to the tokens' places, (...,
    seq_len, seq_len)."""
    batch, _, length, _ = weights.shape
    indices, positions = unpadding.indices.to(weights.device), unpadding.positions.to(weights.device)
    source = torch.full((batch * seq_len,), length, device=weights.device)
    source = source.index_copy(0, indices, positions).view(batch, seq_len)
    weights = nn.functional.pad(weights, (0, 1, 0, 1))  # the row and column that padding reads
    rows = torch.arange(batch, device=weights.device)[:, None, None]
    return weights[rows, :, source[:, :, None], source[:, None, :]].permute(0, 3, 1, 2)
