"""In the last layer, only what is pooled: where a pooler takes a few tokens of a sequence, others need no more there
than keys and values.

Queries, attention's output projection and the feed-forward block of the last layer, for Gemma 3 270M 16 of 17 of its
weights, then run on the taken tokens alone; the others' last states are whatever is left. Taken states, their gradients
and dropout are those of the whole layer (an adapter's own dropout is another draw). It saves a layer's time at most, of
Gemma 3 270M one eighteenth.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

OWN_HOOKS = 8  # of a last layer: seven from here and one that drops feed-forward outputs


class Taken(NamedTuple):
    """The tokens that a pooler takes; travels through upstream's layers, to the attention of the last."""

    tokens: torch.Tensor  # their places
    total: int  # of how many
    attention: nn.Module


# From attention to feed-forward block, in the thread that runs them: threads can share a model.
_taken: ContextVar[Taken | None] = ContextVar("taken", default=None)


def take_in_last_layer(layer: nn.Module) -> None:
    """Makes a decoder's last layer heed the keyword argument `taken` of the decoder."""
    # Attention comes first and is told `taken`; checkpointing repeats a layer without calling the layer's own hooks.
    layer.self_attn.register_forward_pre_hook(_enter, with_kwargs=True)
    for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        module.register_forward_pre_hook(_take if module is not layer.mlp else _take_and_leave)
        module.register_forward_hook(_put_back)


def taken_tokens(encoder: nn.Module, offsets: torch.Tensor, total: int) -> Taken | None:
    """What the encoder's pooler takes of sequences at these offsets (batch + 1,) among `total` tokens; None: all of
    them, or somebody else looks at the last layer."""
    takes = getattr(encoder.pooler, "takes", None)  # a pooler of one's own need not say
    if takes is None or (taken := takes(offsets, total)) is None:
        return None
    last = encoder.model.layers[: encoder.model.config.num_hidden_layers][-1]
    looked_at = (*last.modules(), encoder.model.norm)
    if sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in looked_at) > OWN_HOOKS:
        return None
    tokens = taken.nonzero()[:, 0]
    return Taken(tokens, total, last.self_attn) if 0 < len(tokens) < total else None


def _enter(attention, args, kwargs):
    if not torch.compiler.is_compiling():
        taken = kwargs.get("taken")
        _taken.set(taken if taken is not None and taken.attention is attention else None)


def _take(module, args):
    if torch.compiler.is_compiling() or (taken := _taken.get()) is None or args[0].shape[:2] != (1, taken.total):
        return None
    states = args[0].index_select(1, taken.tokens.to(args[0].device))
    states.taken = taken  # for `_put_back`
    return (states, *args[1:])


def _take_and_leave(module, args):
    args = _take(module, args)
    if not torch.compiler.is_compiling():
        _taken.set(None)
    return args


def _put_back(module, args, output):
    if torch.compiler.is_compiling() or (taken := getattr(args[0], "taken", None)) is None:
        return None
    zeros = output.new_zeros(1, taken.total, output.shape[-1])
    return zeros.index_copy(1, taken.tokens.to(output.device), output)
