"""Running a batch: through the decoder's layers with or without padding, and back to the shape of
the batch.

`run_unpadded` is the default, and flash attention uses it. `run_padded` is for upstream's backends
that take masks. Both return `Encoded`, which is all that poolers and heads see.

Shapes: inputs are (batch, seq_len); layers run on (1, total_tokens, hidden) unpadded and (batch,
seq_len, hidden) padded; token states are (tokens, hidden).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention_gemma_encoder import (
    PADDED_ONLY,
    UNPADDED,
    Unpadding,
    has_one_type,
    layer_type_of,
    padded_mask,
    unpad,
    with_buckets,
)
from .fused_gemma_encoder import FUSED, find_sequences
from .outputs_gemma_encoder import arranged, attentions_to_padded, pairs, states_to_padded, zero_elsewhere


class Encoded(NamedTuple):
    """Hold the token states of a batch without its padding, and where they came from."""

    token_states: torch.Tensor  # (tokens, hidden): the real tokens first, in order
    offsets: torch.Tensor  # (batch + 1,)
    indices: torch.Tensor  # (tokens,) of the token states in (batch * seq_len)
    mask: torch.Tensor  # (batch, seq_len)
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


def refuse_dropout(implementation: str, dropout: float, softcap: float | None = None) -> None:
    """Raise ValueError if attention weights are to be dropped and this kernel cannot drop them."""
    flash = "flash" in implementation and (softcap or implementation != "flash_attention_2")
    if dropout and (flash or implementation == "flex_attention"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot drop attention weights here, where attention_dropout is "
            f"{dropout}. Train with {UNPADDED!r}, or load the model with attention_dropout=0."
        )


def refuse_neftune(encoder) -> None:
    """Raise ValueError if NEFTune adds noise to the embeddings of an unpadded batch.

    NEFTune scales its noise by the length of padded rows, and would take the whole unpadded batch
    for one row.
    """
    if encoder.training and hasattr(encoder.get_input_embeddings(), "neftune_noise_alpha"):
        raise ValueError(
            "NEFTune scales its noise by the length of padded rows, and an unpadded batch has none. Load the model "
            'with attn_implementation="eager", or no `neftune_noise_alpha`.'
        )


def run_unpadded(encoder, input_ids, inputs_embeds, mask: torch.Tensor, **kwargs) -> Encoded:
    """
    Run every layer on the real tokens alone, (1, total_tokens, hidden).

    Args:
        encoder: A `GemmaEncoderModel`.
        mask: (batch, seq_len), True for real tokens.
        kwargs: Arguments of the decoder, `output_attentions` and `output_hidden_states` among them.
    """
    if torch.compiler.is_exporting():
        raise ValueError(PADDED_ONLY)
    refuse_neftune(encoder)
    implementation = encoder.model.config._attn_implementation
    # Returned weights are of one batch, and each number of buckets would be compiled anew.
    split = implementation == UNPADDED and not kwargs["output_attentions"] and not torch.compiler.is_compiling()
    unpadding = unpad(mask, longest_first=split)
    if max(unpadding.lengths) == 0:
        # All is padding. One token of no sequence runs, so that hooks, gradients and collectives
        # happen as ever.
        unpadding = unpad(torch.arange(mask.numel(), device=mask.device).view_as(mask) == 0)
        input_ids, inputs_embeds = (None if x is None else torch.zeros_like(x) for x in (input_ids, inputs_embeds))
    if input_ids is not None:
        input_ids = input_ids.flatten()[unpadding.indices][None]  # (1, total_tokens)
    else:
        inputs_embeds = inputs_embeds.flatten(0, 1)[unpadding.indices][None]  # (1, total_tokens, hidden)
    outputs = encoder.model(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        position_ids=unpadding.positions[None],
        **arguments_of_attention(encoder, unpadding, split),
        **kwargs,
    )
    states, indices = outputs.last_hidden_state[0], unpadding.indices  # (total_tokens, hidden)
    if split:  # the sequences in their own order again
        order = indices.argsort()
        states, indices = states.index_select(0, order.to(states.device)), indices[order]
    hidden_states = for_caller(outputs.hidden_states, states_to_padded, indices=unpadding.indices, mask=mask)
    attentions = for_caller(outputs.attentions, attentions_to_padded, unpadding=unpadding, mask=mask)
    return Encoded(states, offsets_of(mask), indices, mask, hidden_states, attentions)


def arguments_of_attention(encoder, unpadding: Unpadding, split: bool) -> dict[str, Any]:
    """Return the keyword arguments by which a backend keeps the sequences of an unpadded batch
    apart."""
    implementation = encoder.model.config._attn_implementation
    reaches = {layer.self_attn.reach for layer in encoder.model.layers}
    if implementation == UNPADDED:
        return {"unpadding": with_buckets(unpadding, reaches, split)}
    if implementation == FUSED:
        return {"sequences": find_sequences(unpadding, reaches)}
    if encoder.training:
        softcap = getattr(encoder.config.text_config, "attn_logit_softcapping", None)
        refuse_dropout(implementation, encoder.model.layers[0].self_attn.attention_dropout, softcap)
    # Flash attention takes the offsets and lengths of the sequences.
    offsets, longest = unpadding.offsets.int(), max(unpadding.lengths)
    arguments = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    if has_one_type(encoder.model) and encoder.config.attention_window is not None:
        arguments["sliding_window"] = encoder.config.attention_window + 1  # these layers do not pass their own
    return arguments


def run_padded(encoder, input_ids, inputs_embeds, mask: torch.Tensor, **kwargs) -> Encoded:
    """Run every layer on (batch, seq_len, hidden), with masks made here. Shapes do not depend on
    the data.

    Args: as `run_unpadded`.
    """
    if input_ids is not None:
        input_ids = input_ids.where(mask, 0)
    else:
        inputs_embeds = inputs_embeds.where(mask[..., None], 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = encoder.model.config
    if encoder.training:
        refuse_dropout(decoder._attn_implementation, encoder.model.layers[0].self_attn.attention_dropout)
    reaches = {layer_type_of(layer.self_attn): layer.self_attn.reach for layer in encoder.model.layers}
    dtype = encoder.get_input_embeddings().weight.dtype
    masks = {kind: padded_mask(mask, positions, reach, decoder, dtype) for kind, reach in reaches.items()}
    outputs = encoder.model(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=masks["full_attention"] if has_one_type(encoder.model) else masks,
        position_ids=positions,
        **kwargs,
    )
    hidden_states = for_caller(outputs.hidden_states, zero_elsewhere, kept=mask[..., None])
    attentions = for_caller(outputs.attentions, zero_elsewhere, kept=pairs(mask))
    indices = real_first(mask.flatten())
    states = outputs.last_hidden_state.flatten(0, 1)[indices]  # (batch * seq_len, hidden)
    return Encoded(states, offsets_of(mask), indices, mask, hidden_states, attentions)


def for_caller(values: tuple | None, arrange: Callable[..., torch.Tensor], **kwargs) -> tuple | None:
    """Return `arrange(value, **kwargs)` of each of the values that every layer returned; see
    `arranged`."""
    if values is None:
        return None
    return tuple(arranged(value, partial(arrange, **kwargs)) for value in values)


def offsets_of(mask: torch.Tensor) -> torch.Tensor:
    """Return where each sequence of a mask (batch, seq_len) begins among the real tokens, and the
    end, (batch + 1,)."""
    return F.pad(mask.sum(-1).cumsum(0), (1, 0))


def real_first(mask: torch.Tensor) -> torch.Tensor:
    """Return the places (n,) of the real tokens of a flat mask in order, then those of padding.

    It is a stable sort, which ONNX lacks.
    """
    ranks = torch.where(mask, mask.cumsum(0), mask.sum() + (~mask).cumsum(0)) - 1
    return torch.zeros_like(ranks).scatter(0, ranks, torch.arange(ranks.shape[0], device=ranks.device))


def in_chunks(score: Callable[..., torch.Tensor], size: int, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Return `score(*inputs)` of inputs (n, ...), computed on at most `size` rows at a time.

    If there are gradients, each chunk is computed again in the backward pass, with the same
    dropout. The memory of one chunk is held at a time, and the gradients are those of the chunks,
    exactly (gradient checkpointing, arXiv 1604.06174; the idea for lists of documents: GradCache,
    arXiv 2101.06983).
    """
    run = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
    parts = [itertools.repeat(None) if x is None else x.split(size) for x in inputs]
    return torch.cat([run(*part) for part in zip(*parts, strict=False)])


def previous_states(states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return for each token the state of the token before it, (tokens, hidden); zeros for the first
    of a sequence."""
    first = torch.zeros(len(states) + 1, dtype=torch.bool, device=states.device)
    first[offsets.to(states.device)] = True
    return states.roll(1, 0).masked_fill(first[:-1, None], 0)
