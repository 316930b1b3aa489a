"""Who sees whom, and how it runs: windows, unpadding, the attention function, and masks.

The default execution, `attn_implementation="gemma_encoder_unpadded"`, drops padding before the embedding and runs the
decoder's own layers on (1, total_tokens, hidden). Only inside attention do sequences regain a batch dimension, so
padding side, amount and ids cannot matter. Upstream's "eager", "sdpa" and "flex_attention" run on padded batches with
masks made here, for torch.compile, torch.export and comparison; flash attention runs unpadded by its own means.

A reach (left, right) says how many tokens before and after itself a token sees; None is no limit. It is the one
description of attention that every backend is given:

| layer                            | attention="causal" | attention="bidirectional" |
| -------------------------------- | ------------------ | ------------------------- |
| full                             | (None, 0)          | (None, None)              |
| sliding, the decoder's window W  | (W - 1, 0)         | (W, W)                    |
| any, with `attention_window` r   | at most (r, 0)     | at most (r, r)            |

(W, W) is what upstream's masks give a decoder whose `is_causal` is False. A decoder that was itself trained
bidirectionally (EmbeddingGemma's `use_bidirectional_attention`) counts its window exclusively: (W - 1, W - 1).
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

UNPADDED = "gemma_encoder_unpadded"
Reach = tuple[int | None, int | None]


def layer_reach(config, layer_type: str) -> Reach:
    """The reach of a decoder layer of `layer_type` under a `GemmaEncoderConfig`; the table above."""
    causal = config.attention == "causal"
    limits = [config.attention_window] if config.attention_window is not None else []
    if layer_type == "sliding_attention":
        window = config.text_config.sliding_window
        exclusive = causal or config.text_config.use_bidirectional_attention in (True, "all")
        limits.append(window - 1 if exclusive else window)
    limit = min(limits, default=None)
    return (limit, 0 if causal else limit)


def layer_type_of(attention: nn.Module) -> str:
    """The layer type of a decoder's attention module; Gemma 1 has full attention only and does not name it."""
    return getattr(attention, "layer_type", None) or "full_attention"


def set_reach(attention: nn.Module, config) -> None:
    """Tells a decoder's attention module who sees whom, in the terms of every backend."""
    attention.reach = layer_reach(config, layer_type_of(attention))
    attention.is_causal = config.attention == "causal"
    # Flash attention takes windows from here and counts them exclusively; the others take masks.
    attention.sliding_window = None if attention.reach[0] is None else attention.reach[0] + 1


def within_reach(queries: torch.Tensor, keys: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Whether a token at position `queries` sees one at position `keys`; shapes broadcast."""
    left, right = reach
    seen = torch.ones_like(queries - keys, dtype=torch.bool)
    if left is not None:
        seen = seen & (queries - keys <= left)
    if right is not None:
        seen = seen & (keys - queries <= right)
    return seen


class Unpadding(NamedTuple):
    """Where the real tokens of a padded batch are, and what its attention sees; travels through upstream's layers."""

    indices: torch.Tensor  # (total_tokens,) of the real tokens in the flattened (batch * seq_len)
    offsets: torch.Tensor  # (batch + 1,) of the sequences among the real tokens
    positions: torch.Tensor  # (total_tokens,) of each token in its sequence
    max_length: int  # tokens of the longest sequence
    padded: torch.Tensor | None = None  # (total_tokens,) of the tokens in (batch * max_length); None: no padding at all
    masks: dict[Reach, torch.Tensor | None] | None = None  # (batch or 1, 1, max_length, max_length); None: all see all

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """(1, heads, total_tokens, head_dim) -> (batch, heads, max_length, head_dim)."""
        states = states[0].transpose(0, 1)  # (total_tokens, heads, head_dim)
        batch = self.offsets.shape[0] - 1
        if self.padded is not None:
            zeros = states.new_zeros(batch * self.max_length, *states.shape[1:])
            states = zeros.index_copy(0, self.padded, states)
        return states.unflatten(0, (batch, self.max_length)).transpose(1, 2)

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, max_length, heads, head_dim) -> (1, total_tokens, heads, head_dim)."""
        states = states.flatten(0, 1)
        return (states if self.padded is None else states[self.padded])[None]

    def attend(self, module, query, key, value, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each sequence, by upstream's own functions on a batch made for this call only.

        Soft-capping and returned weights need upstream's eager function; everything else runs in torch's fused one.
        """
        query, key, value = self.pad(query), self.pad(key), self.pad(value)
        mask = self.masks[module.reach]
        if kwargs.get("softcap") is None and not kwargs.get("output_attentions"):
            output, weights = sdpa_attention_forward(module, query, key, value, mask, **{**kwargs, "is_causal": False})
        else:
            if mask is not None:
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            output, weights = eager_attention_forward(module, query, key, value, mask, **kwargs)
        return self.unpad(output), weights


def unpadded_attention(module, query, key, value, attention_mask, unpadding: Unpadding | None = None, **kwargs):
    """What `AttentionInterface` calls; the work is the batch's own, so two versions of this file can live together."""
    if unpadding is None:
        raise ValueError(
            f"attn_implementation={UNPADDED!r} runs inside a Gemma Encoder only: call the encoder, not its decoder, or "
            'choose an upstream backend with `set_attn_implementation("eager")`.'
        )
    return unpadding.attend(module, query, key, value, **kwargs)


AttentionInterface.register(UNPADDED, unpadded_attention)


@torch.compiler.disable
def unpad(mask: torch.Tensor) -> Unpadding:
    """Finds the real tokens of a boolean mask (batch, seq_len). Reads two numbers back from the device."""
    lengths = mask.sum(-1)
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    indices = mask.flatten().nonzero()[:, 0]
    positions = (mask.cumsum(-1) - 1).flatten()[indices]
    return Unpadding(indices, offsets, positions, int(lengths.max()))


@torch.compiler.disable
def with_dense_masks(unpadding: Unpadding, reaches: set[Reach]) -> Unpadding:
    """Adds what `Unpadding.attend` needs for layers of these reaches."""
    offsets, length = unpadding.offsets, unpadding.max_length
    batch, total = offsets.shape[0] - 1, unpadding.indices.shape[0]
    steps = torch.arange(length, device=offsets.device)
    real = steps < offsets.diff()[:, None]  # (batch, max_length)
    masks = {}
    for reach in reaches:
        mask = None
        if total < batch * length or reach != (None, None):
            mask = within_reach(steps[:, None], steps[None, :], reach)[None, None]
        if total < batch * length:
            # Rows of padding see everything: what they see is never read, but a row that sees nothing is NaN.
            mask = mask & real[:, None, None, :] | ~real[:, None, :, None]
        masks[reach] = mask
    padded = real.flatten().nonzero()[:, 0] if total < batch * length else None
    return unpadding._replace(padded=padded, masks=masks)


def restore_attentions(weights: torch.Tensor, unpadding: Unpadding, seq_len: int) -> torch.Tensor:
    """Attention weights (batch, heads, max_length, max_length) where the tokens came from, (..., seq_len, seq_len)."""
    batch, _, length, _ = weights.shape
    indices, positions = unpadding.indices.to(weights.device), unpadding.positions.to(weights.device)
    source = torch.full((batch * seq_len,), length, device=weights.device)
    source = source.index_copy(0, indices, positions).view(batch, seq_len)
    weights = nn.functional.pad(weights, (0, 1, 0, 1))  # the row and column that padding reads
    rows = torch.arange(batch, device=weights.device)[:, None, None]
    return weights[rows, :, source[:, :, None], source[:, None, :]].permute(0, 3, 1, 2)


def padded_mask(mask: torch.Tensor, positions: torch.Tensor, reach: Reach, config, dtype: torch.dtype):
    """The mask of a padded batch in the form that `config._attn_implementation` takes, by upstream's mask functions.

    Distances are those of `positions` (batch, seq_len), which count real tokens only, so padding cannot shift a window.
    """
    # Padding takes the position of its neighbour, and rows of padding see one another: no row sees nothing (NaN).
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
