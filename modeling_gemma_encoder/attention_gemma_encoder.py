"""Who sees whom, and how it runs: windows, unpadding, the attention function, masks, and a probe that it is true.

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
    dense: torch.Tensor | None = None  # (total_tokens,) of the tokens in (batch * max_length); None: no padding at all
    masks: tuple = ()  # (reach, mask (batch or 1, 1, max_length, max_length) or None: everyone sees everyone) pairs

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """(1, heads, total_tokens, head_dim) -> (batch, heads, max_length, head_dim)."""
        states = states[0].transpose(0, 1)  # (total_tokens, heads, head_dim)
        batch = self.offsets.shape[0] - 1
        if self.dense is not None:
            padded = states.new_zeros(batch * self.max_length, *states.shape[1:])
            states = padded.index_copy(0, self.dense, states)
        return states.unflatten(0, (batch, self.max_length)).transpose(1, 2)

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, max_length, heads, head_dim) -> (1, total_tokens, heads, head_dim)."""
        states = states.flatten(0, 1)
        return (states if self.dense is None else states[self.dense])[None]

    def attend(self, module, query, key, value, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each sequence, by upstream's own functions on a batch made for this call only.

        Soft-capping and returned weights need upstream's eager function; everything else runs in torch's fused one.
        """
        query, key, value = self.pad(query), self.pad(key), self.pad(value)
        mask = dict(self.masks)[module.reach]
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
    masks = []
    for reach in reaches:
        mask = None
        if total < batch * length or reach != (None, None):
            mask = within_reach(steps[:, None], steps[None, :], reach)[None, None]
        if total < batch * length:
            # Rows of padding see everything: what they see is never read, but a row that sees nothing is NaN.
            mask = mask & real[:, None, None, :] | ~real[:, None, :, None]
        masks.append((reach, mask))
    dense = real.flatten().nonzero()[:, 0] if total < batch * length else None
    return unpadding._replace(dense=dense, masks=tuple(masks))


def restore_attentions(weights: torch.Tensor, unpadding: Unpadding, seq_len: int) -> torch.Tensor:
    """Attention weights (batch, heads, max_length, max_length) where the tokens came from, (..., seq_len, seq_len)."""
    batch, _, length, _ = weights.shape
    source = torch.full((batch * seq_len,), length, device=weights.device)
    source = source.index_copy(0, unpadding.indices, unpadding.positions).view(batch, seq_len)
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


@torch.no_grad()
def verify_attention(model: nn.Module, trials: int = 4) -> None:
    """Checks by behaviour that every layer of a Gemma Encoder attends as `model.config` says.

    Each layer's attention is given sequences of two random tokens, (a, b), (a, c) and (c, b): its output at the first
    token differs between the first two if, and only if, the last token reaches the first; its output at the last
    token differs between the first and third if, and only if, the first reaches the last.

    It runs when called, not on load: loading must work where a model cannot run yet (meta device, sharded, offloaded).
    The cost is one forward pass of `6 * trials` tokens. Works through PEFT and other wrappers.

    Raises:
        RuntimeError: `model` is not a Gemma Encoder, or some layers do not attend as the config says.
    """
    layers = [module for module in model.modules() if hasattr(module, "reach")]
    if not layers:
        raise RuntimeError(f"{type(model).__name__} is not a Gemma Encoder: none of its attention layers is ours.")
    seen = {}

    def give_probe(module, args, kwargs):
        states = kwargs["hidden_states"]
        a, b, c = torch.randn(3, trials, states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states)
        sequences = torch.stack([a, b, a, c, c, b], dim=1)  # (trials, 6, hidden): three sequences of two tokens
        return args, {**kwargs, "hidden_states": sequences.view(states.shape)}

    def compare(module, args, output):
        states = output[0].reshape(trials, 6, -1).float()
        tolerance = 1e-4 + 2 * torch.finfo(output[0].dtype).eps
        last_reaches_first = (states[:, 0] - states[:, 2]).norm() > tolerance * states[:, 0].norm()
        first_reaches_last = (states[:, 1] - states[:, 5]).norm() > tolerance * states[:, 1].norm()
        seen[module.layer_idx] = (bool(first_reaches_last), bool(last_reaches_first))

    handles = [layer.register_forward_pre_hook(give_probe, with_kwargs=True, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(compare) for layer in layers]
    training = [module for module in model.modules() if module.training]
    ids = torch.zeros(3 * trials, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        model.eval()
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()

    wrong = []
    for layer in layers:
        expected = tuple(limit != 0 for limit in layer_reach(model.config, layer_type_of(layer)))
        if seen[layer.layer_idx] != expected:
            wrong.append(
                f"layer {layer.layer_idx}: sees (earlier, later) tokens {seen[layer.layer_idx]}, not {expected}"
            )
    if wrong:
        raise RuntimeError(
            f"The model does not run attention={model.config.attention!r}, "
            f"attention_window={model.config.attention_window} as its config says:\n" + "\n".join(wrong)
        )
