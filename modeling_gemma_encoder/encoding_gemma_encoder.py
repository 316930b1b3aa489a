"""How a batch runs: checked, through the decoder's layers with or without padding, and back in its own shape.

`run_unpadded` is the default and what flash attention uses; `run_padded` is for upstream's backends that take masks.
Both give the same `Encoded`, which is all that poolers and heads see.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention_gemma_encoder import (
    PADDED_ONLY,
    UNPADDED,
    has_one_type,
    layer_type_of,
    padded_mask,
    unpad,
    with_buckets,
)
from .fused_gemma_encoder import FUSED, find_sequences
from .losses_gemma_encoder import IGNORE
from .outputs_gemma_encoder import arranged, attentions_to_padded, pairs, states_to_padded, zero_elsewhere


class Encoded(NamedTuple):
    """What a head needs of a batch: its tokens, padding apart, and where they came from."""

    token_states: torch.Tensor  # (tokens, hidden): the real tokens first, in order
    offsets: torch.Tensor  # (batch + 1,)
    indices: torch.Tensor  # (tokens,) of the token states in (batch * seq_len)
    mask: torch.Tensor  # (batch, seq_len)
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


def check_inputs(config, input_ids, attention_mask, inputs_embeds) -> torch.Tensor:
    """The boolean mask (batch, seq_len) of the real tokens of well-formed inputs.

    Raises:
        TypeError, ValueError: names the argument, its value and what to do. Values are not looked at in torch.compile.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    for name, value in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds), ("attention_mask", attention_mask)):
        if isinstance(value, Mapping):
            raise TypeError(f"`{name}` must be a tensor, got a {type(value).__name__}: unpack it, model(**inputs).")
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(value).__name__}. Tokenize with return_tensors='pt'."
            )
    name, inputs = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    expected = ["batch", "seq_len"] + [config.hidden_size] * (inputs_embeds is not None)
    shape = tuple(inputs.shape)
    if inputs.dim() != len(expected) or (inputs_embeds is not None and shape[-1] != config.hidden_size):
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, expected))}), got {shape}.")
    if 0 in shape:
        raise ValueError(
            f"`{name}` is empty: its shape is {shape}. Pass at least one text of one token: a tokenizer that adds no "
            "token of its own makes none of an empty text."
        )
    if attention_mask is None:
        attention_mask = torch.ones(shape[:2], device=inputs.device)
    if attention_mask.shape != shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be {shape[:2]} as `{name}` has, "
            "one for real tokens and zero for padding."
        )
    mask = attention_mask.to(device=inputs.device, dtype=torch.bool)
    if torch.compiler.is_compiling():
        return mask
    if attention_mask.dtype != torch.bool and (attention_mask < 0).any():
        raise ValueError(
            "`attention_mask` has negative values. It must be one for real tokens and zero for padding; additive masks "
            "(zero and minus infinity) are not supported."
        )
    if input_ids is not None:
        if input_ids.is_floating_point():
            raise ValueError(f"`input_ids` must be integers, got {input_ids.dtype}; pass vectors as `inputs_embeds`.")
        lowest, highest = input_ids.where(mask, 0).aminmax()  # padding ids may be anything
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"`input_ids` has ids from {lowest} to {highest}, but the model's vocabulary has {config.vocab_size} "
                "tokens. Is this the model's tokenizer? Call `resize_token_embeddings` after adding tokens to it."
            )
    if (longest := mask.sum(-1).max()) > config.max_position_embeddings:
        raise ValueError(
            f"`{name}` has a sequence of {longest} tokens, more than `max_position_embeddings` "
            f"({config.max_position_embeddings}). Pass `truncation=True` and `max_length` to the tokenizer or pipeline."
            f" A model whose positions reach that far can be loaded with `max_position_embeddings={longest}`."
        )
    return mask


def refuse_rows_without_tokens(mask: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """Raise ValueError where a row of the mask (batch, seq_len) has no token, and no label (batch, ...) of it is
    ignored: a text to be scored, and not one that fills a batch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or mask.is_meta:
        return
    empty = ~mask.bool().any(-1)
    if labels is not None and labels.shape[:1] == empty.shape:
        empty = empty & (labels.to(empty.device) != IGNORE).view(len(empty), -1).any(-1)
    if not empty.any():
        return
    rows = ", ".join(map(str, empty.nonzero()[:, 0].tolist()))
    raise ValueError(
        f"`attention_mask` has no token in row {rows} of the batch, counted from 0: a tokenizer that adds no token of "
        "its own makes none of an empty text. Leave such texts out, let the tokenizer add a `bos_token`, or label rows "
        f"that only fill a batch {IGNORE}."
    )


def refuse_dropout(implementation: str, dropout: float, softcap: float | None = None) -> None:
    """Raises ValueError where training would drop attention weights, and this kernel cannot."""
    flash = "flash" in implementation and (softcap or implementation != "flash_attention_2")
    if dropout and (flash or implementation == "flex_attention"):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot drop attention weights here: train with {UNPADDED!r}, or "
            "load the model with attention_dropout=0."
        )


def run_unpadded(encoder, input_ids, inputs_embeds, mask, **kwargs) -> Encoded:
    """Every layer sees (1, total_tokens, hidden)."""
    implementation = encoder.model.config._attn_implementation
    if torch.compiler.is_exporting():
        raise ValueError(PADDED_ONLY)
    if encoder.training and hasattr(encoder.get_input_embeddings(), "neftune_noise_alpha"):
        raise ValueError(
            "NEFTune scales its noise by the length of padded rows, and would take an unpadded batch for one: pass "
            'attn_implementation="eager", or no `neftune_noise_alpha`.'
        )
    # Returned weights are of one batch, and each number of buckets would be compiled anew.
    split = implementation == UNPADDED and not kwargs["output_attentions"] and not torch.compiler.is_compiling()
    unpadding = unpad(mask, longest_first=split)
    if max(unpadding.lengths) == 0:
        # Nothing but padding: run one token of no sequence, so that hooks, gradients and collectives happen as ever.
        unpadding = unpad(torch.arange(mask.numel(), device=mask.device).view_as(mask) == 0)
        input_ids, inputs_embeds = (None if x is None else torch.zeros_like(x) for x in (input_ids, inputs_embeds))
    if input_ids is not None:
        input_ids = input_ids.flatten()[unpadding.indices][None]
    else:
        inputs_embeds = inputs_embeds.flatten(0, 1)[unpadding.indices][None]
    reaches = {layer.self_attn.reach for layer in encoder.model.layers}
    if implementation == UNPADDED:
        kwargs["unpadding"] = with_buckets(unpadding, reaches, split)
    elif implementation == FUSED:
        kwargs["sequences"] = find_sequences(unpadding, reaches)
    else:  # flash attention keeps sequences apart by their lengths
        softcap = getattr(encoder.config.text_config, "attn_logit_softcapping", None)
        if encoder.training:
            refuse_dropout(implementation, encoder.model.layers[0].self_attn.attention_dropout, softcap)
        offsets = unpadding.offsets.int()
        kwargs.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
        kwargs.update(max_length_q=max(unpadding.lengths), max_length_k=max(unpadding.lengths))
        if has_one_type(encoder.model) and encoder.config.attention_window is not None:
            kwargs["sliding_window"] = encoder.config.attention_window + 1  # these layers do not pass their own
    outputs = encoder.model(
        input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=unpadding.positions[None], **kwargs
    )
    hidden_states, attentions = outputs.hidden_states, outputs.attentions
    if hidden_states is not None:
        place = partial(states_to_padded, indices=unpadding.indices, mask=mask)
        hidden_states = tuple(arranged(states, place) for states in hidden_states)
    if attentions is not None:
        place = partial(attentions_to_padded, unpadding=unpadding, mask=mask)
        attentions = tuple(arranged(weights, place) for weights in attentions)
    states, indices = outputs.last_hidden_state[0], unpadding.indices
    if split:  # the sequences in their own order again
        order = indices.argsort()
        states, indices = states.index_select(0, order.to(states.device)), indices[order]
    offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
    return Encoded(states, offsets, indices, mask, hidden_states, attentions)


def run_padded(encoder, input_ids, inputs_embeds, mask, **kwargs) -> Encoded:
    """Every layer sees (batch, seq_len, hidden), with masks of ours; shapes do not depend on the data."""
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
    hidden_states, attentions = outputs.hidden_states, outputs.attentions
    if hidden_states is not None:
        place = partial(zero_elsewhere, kept=mask[..., None])
        hidden_states = tuple(arranged(states, place) for states in hidden_states)
    if attentions is not None:
        place = partial(zero_elsewhere, kept=pairs(mask))
        attentions = tuple(arranged(weights, place) for weights in attentions)
    indices = real_first(mask.flatten())
    offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
    states = outputs.last_hidden_state.flatten(0, 1)[indices]
    return Encoded(states, offsets, indices, mask, hidden_states, attentions)


def real_first(mask: torch.Tensor) -> torch.Tensor:
    """Places (n,) of a flat mask's real tokens in order, then those of padding: a stable sort, which ONNX lacks."""
    ranks = torch.where(mask, mask.cumsum(0), mask.sum() + (~mask).cumsum(0)) - 1
    return torch.zeros_like(ranks).scatter(0, ranks, torch.arange(ranks.shape[0], device=ranks.device))


def in_chunks(score: Callable[..., torch.Tensor], size: int, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`score(*inputs)` of (n, ...), at most `size` rows at a time.

    Where there are gradients, each chunk is computed again in the backward pass, with the same dropout: the memory of
    one chunk is held at a time, and the gradients are those of the chunks, exactly (gradient checkpointing, arXiv
    1604.06174; the idea for lists of documents: GradCache, arXiv 2101.06983).
    """
    run = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
    parts = [itertools.repeat(None) if x is None else x.split(size) for x in inputs]
    return torch.cat([run(*part) for part in zip(*parts, strict=False)])


def previous_states(states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """For each token the state of the token before it in its sequence, (tokens, hidden); zeros for first tokens."""
    first = torch.zeros(len(states) + 1, dtype=torch.bool, device=states.device)
    first[offsets.to(states.device)] = True
    return states.roll(1, 0).masked_fill(first[:-1, None], 0)
