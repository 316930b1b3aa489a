"""Attention of an encoder: which tokens see which, unpadding, the attention function, and masks.

The default execution, `attn_implementation="gemma_encoder_unpadded"`, drops padding before the
embedding and runs the decoder's own layers on (1, total_tokens, hidden). Sequences have a batch
dimension only inside attention, in buckets of similar lengths, so the side, amount and ids of
padding cannot matter. Upstream's "eager", "sdpa" and "flex_attention" run on padded batches with
masks made here, for torch.compile, torch.export and comparison. Flash attention runs unpadded by
its own means.

A reach (left, right) says how many tokens before and after itself a token sees; None means no
limit. Every backend is given the same reach:

| layer                            | attention="causal" | attention="bidirectional" |
| -------------------------------- | ------------------ | ------------------------- |
| full                             | (None, 0)          | (None, None)              |
| sliding, the decoder's window W  | (W - 1, 0)         | (W, W)                    |
| any, with `attention_window` r   | at most (r, 0)     | at most (r, r)            |

(W, W) is what upstream's masks give a decoder whose `is_causal` is False. A decoder that was itself
trained bidirectionally (EmbeddingGemma's `use_bidirectional_attention`) counts its window
exclusively: (W - 1, W - 1).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

UNPADDED = "gemma_encoder_unpadded"
PADDED_ONLY = (
    "Shapes without padding depend on the data: torch.compile with fullgraph=True and torch.export need a backend that "
    'keeps padding, `model.set_attn_implementation("eager")`.'
)
Reach = tuple[int | None, int | None]


def layer_reach(config, layer_type: str) -> Reach:
    """Return the reach of a decoder layer of `layer_type` under a `GemmaEncoderConfig`, by the
    table above."""
    causal = config.attention == "causal"
    limits = [config.attention_window] if config.attention_window is not None else []
    if layer_type == "sliding_attention":
        window = config.text_config.sliding_window
        exclusive = causal or getattr(config.text_config, "use_bidirectional_attention", None) in (True, "all")
        limits.append(window - 1 if exclusive else window)
    limit = min(limits, default=None)
    return (limit, 0 if causal else limit)


def layer_type_of(attention: nn.Module) -> str:
    """Return the layer type of a decoder's attention module; "full_attention" if the module names
    none."""
    return getattr(attention, "layer_type", None) or "full_attention"


def has_one_type(decoder: nn.Module) -> bool:
    """Return whether all layers take the same mask, and not one for each layer type, as in Gemma 1
    and Llama."""
    return not hasattr(decoder.layers[0].self_attn, "layer_type")


def set_reach(attention: nn.Module, config) -> None:
    """Set the reach of a decoder's attention module, and the attributes that backends read in its
    place."""
    attention.reach = layer_reach(config, layer_type_of(attention))
    attention.is_causal = config.attention == "causal"
    # Flash attention takes windows from here and counts them exclusively; the others take masks.
    attention.sliding_window = None if attention.reach[0] is None else attention.reach[0] + 1


def within_reach(queries: torch.Tensor, keys: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Return whether tokens at positions `queries` see tokens at positions `keys`; shapes
    broadcast."""
    left, right = reach
    seen = torch.ones_like(queries - keys, dtype=torch.bool)
    if left is not None:
        seen = seen & (queries - keys <= left)
    if right is not None:
        seen = seen & (keys - queries <= right)
    return seen


class Bucket(NamedTuple):
    """Hold sequences of similar lengths, which attention sees as one padded batch."""

    tokens: int  # of them, one after the other
    batch: int
    length: int  # of the longest
    padded: torch.Tensor | None  # (tokens,) of the tokens in (batch * length); None: no padding at all
    masks: dict[Reach, torch.Tensor | None]  # (batch or 1, length or 1, length) of who is seen; None: all see all

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """Pad states (1, heads, tokens, head_dim) to (batch, length, heads, head_dim)."""
        states = states.squeeze(0).transpose(0, 1)  # (tokens, heads, head_dim)
        if self.padded is not None:
            zeros = states.new_zeros(self.batch * self.length, *states.shape[1:])
            states = zeros.index_copy_(0, self.padded, states)
        return states.unflatten(0, (self.batch, self.length))

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """Drop the padding of states (batch, length, heads, head_dim): (1, tokens, heads,
        head_dim)."""
        states = states.flatten(0, 1)
        return (states if self.padded is None else states[self.padded])[None]

    def attend(self, module, query, key, value, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention within each sequence: (1, tokens, heads, head_dim).

        Soft-capping and returned weights need `dense_attention`. Everything else runs in torch's
        fused function, except on a CPU for short sequences and in bf16, where that takes up to
        twice as long (torch 2.13).
        """
        query, key, value = self.pad(query), self.pad(key), self.pad(value)
        mask, softcap = self.masks[module.reach], kwargs.get("softcap")
        scaling, dropout = kwargs["scaling"], kwargs.get("dropout", 0.0)
        few = self.batch * query.shape[2] * self.length**2 <= 2**27  # the weights it holds: a few hundred megabytes
        short = value.dtype == torch.bfloat16 or self.length <= 256 or dropout > 0
        dense = query.device.type == "cpu" and short and few
        if softcap is not None or kwargs.get("output_attentions") or dense:
            output, weights = dense_attention(query, key, value, mask, scaling, softcap, dropout)
            return self.unpad(output), weights
        states = (x.transpose(1, 2) for x in (query, key, value))
        mask = mask if mask is None else mask[:, None].expand(-1, -1, self.length, -1)
        output, _ = sdpa_attention_forward(module, *states, mask, scaling=scaling, dropout=dropout, is_causal=False)
        return self.unpad(output), None


def dense_attention(query, key, value, mask, scaling: float, softcap: float | None = None, dropout: float = 0.0):
    """Compute softmax(cap(Q K^T * scaling) + mask) V with cap(x) = softcap * tanh(x / softcap)
    (Gemma 2, arXiv 2408.00118, section 2). The query heads of a key head are rows of one matrix, so
    that there are two matrix products.

    Args:
        query: (batch, length, heads, head_dim). Key and value may have fewer heads, each for
            several of the query.
        mask: (batch or 1, length or 1, length), True where a key is seen; None if all are seen.
        dropout: The share of weights that is dropped; 0 unless the model is training.

    Returns:
        (batch, length, heads, head_dim), and the weights (batch, heads, length, length).
    """
    batch, length, groups, _ = key.shape
    by_group = (x.transpose(1, 2).unflatten(1, (groups, -1)).flatten(0, 1).flatten(1, 2) for x in (query, key, value))
    query, key, value = by_group  # (batch * groups, heads / groups * length, head_dim)
    nothing, scale = query.new_zeros(()), scaling if softcap is None else scaling / softcap
    scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=scale).view(batch, -1, length, length)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, lowest)[:, None]
    if softcap is not None:
        scores = scores.tanh_().mul(softcap) if mask is None else torch.add(mask, scores.tanh_(), alpha=softcap)
    elif mask is not None:
        scores = scores.add_(mask)
    weights = nn.functional.dropout(scores.softmax(-1), p=dropout)
    output = weights.view(batch * groups, -1, length).bmm(value)
    return output.view(batch, -1, length, value.shape[-1]).transpose(1, 2), weights


class Unpadding(NamedTuple):
    """Hold where the real tokens of a padded batch are. Upstream's layers pass it on to attention."""

    indices: torch.Tensor  # (total_tokens,) of the real tokens in the flattened (batch * seq_len)
    offsets: torch.Tensor  # (batch + 1,) of the sequences among the real tokens
    positions: torch.Tensor  # (total_tokens,) of each token in its sequence
    lengths: list[int]  # of the sequences
    buckets: list[Bucket] | None = None  # of the tokens in their order

    def attend(self, module, query, key, value, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention by bucket: (1, heads, total_tokens, head_dim) -> (1, total_tokens,
        heads, head_dim)."""
        if len(self.buckets) == 1:
            return self.buckets[0].attend(module, query, key, value, **kwargs)
        sizes = [bucket.tokens for bucket in self.buckets]
        parts = zip(self.buckets, *(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
        return torch.cat([bucket.attend(module, *part, **kwargs)[0] for bucket, *part in parts], dim=1), None


def unpadded_attention(module, query, key, value, attention_mask, unpadding: Unpadding | None = None, **kwargs):
    """Compute attention for `AttentionInterface`.

    The method of the batch does the work, so that two versions of this file can be loaded in one
    process.
    """
    if unpadding is None:
        raise ValueError(
            f"attn_implementation={UNPADDED!r} runs inside a Gemma Encoder only: call the encoder, not its decoder, or "
            'choose an upstream backend with `set_attn_implementation("eager")`. ShadowPEFT calls the decoder, and is '
            "not supported with any backend."
        )
    return unpadding.attend(module, query, key, value, **kwargs)


AttentionInterface.register(UNPADDED, unpadded_attention)


@torch.compiler.disable(reason=PADDED_ONLY)
def unpad(mask: torch.Tensor, longest_first: bool = False) -> Unpadding:
    """Find the real tokens of a boolean mask (batch, seq_len).

    With `longest_first`, the sequences are put in descending order of their lengths. The lengths
    are read back from the device.
    """
    counts = mask.sum(-1)
    lengths, positions = counts.tolist(), mask.cumsum(-1) - 1
    if longest_first and any(first < second for first, second in pairwise(lengths)):
        order = counts.argsort(descending=True, stable=True)
        sequences, places = mask[order].nonzero().unbind(-1)
        indices = order[sequences] * mask.shape[1] + places
        counts, lengths = counts[order], sorted(lengths, reverse=True)
    else:
        indices = mask.flatten().nonzero()[:, 0]
    offsets = nn.functional.pad(counts.cumsum(0), (1, 0))
    return Unpadding(indices, offsets, positions.flatten()[indices], lengths)


def split_by_length(lengths: list[int]) -> list[int]:
    """Return how many sequences attention takes at a time; `lengths` are in descending order.

    A bucket holds the sequences at least three quarters as long as its first, and more if another
    call would cost more than it saves. Padding within a bucket costs its square in attention. The
    numbers are our choice.
    """
    sizes, first = [], 0
    for number, length in enumerate(lengths):
        saved = (len(lengths) - number) * (lengths[first] ** 2 - length**2)
        if length < 0.75 * lengths[first] and saved >= 2**16:
            sizes.append(number - first)
            first = number
    return [*sizes, len(lengths) - first]


@torch.compiler.disable(reason=PADDED_ONLY)
def with_buckets(unpadding: Unpadding, reaches: set[Reach], split: bool) -> Unpadding:
    """Add the buckets that `Unpadding.attend` needs for layers of these reaches: several if
    `split`, else one."""
    lengths = [length for length in unpadding.lengths if length or not split]
    buckets, first = [], 0
    for size in split_by_length(lengths) if split else [len(lengths)]:
        buckets.append(_bucket(lengths[first : first + size], reaches, unpadding.indices.device))
        first += size
    return unpadding._replace(buckets=buckets)


def _bucket(lengths: list[int], reaches: set[Reach], device: torch.device) -> Bucket:
    """Make the bucket of sequences of these lengths, with a mask for each reach."""
    batch, length, tokens = len(lengths), max(lengths), sum(lengths)
    steps = torch.arange(length, device=device)
    real = steps < torch.tensor(lengths, device=device)[:, None]  # (batch, length)
    masks = {}
    for reach in reaches:
        if all(limit is None or limit >= length - 1 for limit in reach):
            # Only padding is hidden. A sequence of none but padding sees it all: a row that sees
            # nothing is NaN.
            mask = None if tokens == batch * length else (real | ~real[:, :1])[:, None]
        else:
            mask = within_reach(steps[:, None], steps[None, :], reach)[None]
            if tokens < batch * length:  # what rows of padding see is never read
                mask = mask & real[:, None, :] | ~real[:, :, None]
        masks[reach] = mask
    padded = real.flatten().nonzero()[:, 0] if tokens < batch * length else None
    return Bucket(tokens, batch, length, padded, masks)


def padded_mask(mask: torch.Tensor, positions: torch.Tensor, reach: Reach, config, dtype: torch.dtype):
    """Return the mask of a padded batch in the form that `config._attn_implementation` takes.

    Distances are those of `positions` (batch, seq_len), which count real tokens only, so padding
    cannot shift a window.
    """
    # Padding takes the position of its neighbor, and rows of padding see one another: no row sees
    # nothing (NaN).
    keys = mask | ~mask.any(-1, keepdim=True)

    def seen(batch, head, query, key):
        return within_reach(positions[batch, query], positions[batch, key], reach) & keys[batch, key]

    batch, seq_len = mask.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=seq_len,
        kv_length=seq_len,
        mask_function=seen,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=mask.device,
        config=config,
    )
