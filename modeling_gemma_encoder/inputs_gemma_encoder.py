"""Checking a batch before it runs: each error names the argument, its value, and what to do.

Shapes: `input_ids` and `attention_mask` are (batch, seq_len), `inputs_embeds` is (batch, seq_len,
hidden). Shapes and types are always checked. Values are not looked at under torch.compile.
"""

from collections.abc import Mapping

import torch

from .losses_gemma_encoder import IGNORE


def check_inputs(config, input_ids, attention_mask, inputs_embeds) -> torch.Tensor:
    """
    Return the boolean mask (batch, seq_len) of the real tokens of a batch.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape or wrong values.
    """
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    for name, value in given.items():
        check_type(name, value)
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    inputs = given[name]
    check_shape(name, inputs, [] if inputs_embeds is None else [config.hidden_size])
    if attention_mask is None:
        attention_mask = torch.ones(inputs.shape[:2], device=inputs.device)
    if attention_mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be {tuple(inputs.shape[:2])} as "
            f"`{name}` has, one for real tokens and zero for padding."
        )
    mask = attention_mask.to(device=inputs.device, dtype=torch.bool)
    if not torch.compiler.is_compiling():
        check_mask_values(attention_mask)
        if input_ids is not None:
            check_ids(config, input_ids, mask)
        check_lengths(config, name, mask)
    return mask


def check_type(name: str, value) -> None:
    """Raise TypeError if an argument is neither None nor a tensor."""
    if isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a tensor, got a {type(value).__name__}: unpack it, model(**inputs).")
    if value is not None and not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}. Tokenize with return_tensors='pt'.")


def check_shape(name: str, inputs: torch.Tensor, features: list[int]) -> None:
    """Raise ValueError if `inputs` are empty or not of shape (batch, seq_len, *features)."""
    shape = tuple(inputs.shape)
    if inputs.dim() != 2 + len(features) or list(shape[2:]) != features:
        expected = ", ".join(["batch", "seq_len", *map(str, features)])
        raise ValueError(f"`{name}` must have shape ({expected}), got {shape}.")
    if 0 in shape:
        raise ValueError(
            f"`{name}` is empty: its shape is {shape}. Pass at least one text of one token. A tokenizer that adds no "
            "token of its own makes none of an empty text."
        )


def check_mask_values(attention_mask: torch.Tensor) -> None:
    """Raise ValueError if a mask is additive, with zeros for real tokens and large negative numbers
    for padding."""
    if attention_mask.dtype != torch.bool and (attention_mask < 0).any():
        raise ValueError(
            "`attention_mask` has negative values. It must be one for real tokens and zero for padding; additive masks "
            "(zero and minus infinity) are not supported."
        )


def check_ids(config, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise ValueError if the ids of real tokens are not in the vocabulary. Padding may have any
    id."""
    if input_ids.is_floating_point():
        raise ValueError(f"`input_ids` must be integers, got {input_ids.dtype}; pass vectors as `inputs_embeds`.")
    lowest, highest = input_ids.where(mask, 0).aminmax()
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"`input_ids` has ids from {lowest} to {highest}, but the model's vocabulary has {config.vocab_size} "
            "tokens. Use the model's own tokenizer, and call `resize_token_embeddings` after adding tokens to it."
        )


def check_lengths(config, name: str, mask: torch.Tensor) -> None:
    """Raise ValueError if a sequence has more tokens than the model has positions."""
    if (longest := mask.sum(-1).max()) > config.max_position_embeddings:
        raise ValueError(
            f"`{name}` has a sequence of {longest} tokens, more than `max_position_embeddings` "
            f"({config.max_position_embeddings}). Pass `truncation=True` and `max_length` to the tokenizer or pipeline."
            f" A model whose positions reach that far can be loaded with `max_position_embeddings={longest}`."
        )


def refuse_rows_without_tokens(mask: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """
    Raise ValueError if a text that is to be scored has no token.

    Args:
        mask: (batch, seq_len), nonzero for real tokens.
        labels: (batch, ...). A row whose labels are all -100 only fills the batch, and is not to be
            scored.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or mask.is_meta:
        return
    empty = ~mask.bool().any(-1)  # (batch,)
    if labels is not None and labels.shape[:1] == empty.shape:
        empty = empty & (labels.to(empty.device) != IGNORE).view(len(empty), -1).any(-1)
    if not empty.any():
        return
    rows = ", ".join(map(str, empty.nonzero()[:, 0].tolist()))
    raise ValueError(
        f"`attention_mask` has no token in row {rows} of the batch, counted from 0. A tokenizer that adds no token of "
        "its own makes none of an empty text. Leave such texts out, let the tokenizer add a `bos_token`, or give rows "
        f"that only fill a batch the label {IGNORE}."
    )


def check_labels(labels) -> None:
    """Raise TypeError if labels are not a tensor of at least one dimension. Each head checks their
    shape itself."""
    if not isinstance(labels, torch.Tensor) or labels.dim() == 0:
        raise TypeError(f"`labels` must be a tensor with a label or a row of labels for each text, got {labels!r}.")
