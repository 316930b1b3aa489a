"""Attention on unpadded tokens in fused kernels, for GPUs:
`attn_implementation="gemma_encoder_fused"`.

The tokens of a batch lie one after the other, and the kernel keeps its sequences apart: nothing is
padded, and no attention weights are ever held. Every layer runs the first of these kernels that is
exact for it:

| soft-capping | dropout | kernel |
| --- | --- | --- |
| no | no | flash attention of variable lengths, `torch.nn.attention.varlen`: CUDA, half precision |
| any | no | flex attention (arXiv 2412.05496), with the sequences as its mask and the soft-cap as its score function |
| any | yes | flex attention twice |

Flex attention has no dropout. Dropping scores instead of weights is not the same: the weights that
are kept would sum to one again. But that sum is known. With s the scores of a query, Z = sum_j
exp(s_j) over all keys it sees and Z' the same sum over the kept ones, attention of the kept ones is
o' = sum_kept exp(s_j) v_j / Z', and attention with dropout is sum_kept exp(s_j) v_j / (Z (1 - p)) =
o' Z' / (Z (1 - p)). One call gives log Z, another o' and log Z'.

On a CPU flex attention is a plain function that holds all tokens' weights, for comparison only; it
has no gradient.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs

from .attention_gemma_encoder import Reach, Unpadding, within_reach

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: flex attention does all
    varlen_attn = None

FUSED = "gemma_encoder_fused"
BITS = 0x7FFFFFFF
DROPPED = -1e9  # a finite score: where all is dropped, the output is zero and not NaN


class Sequences(NamedTuple):
    """Hold where the sequences are among the tokens, for the kernels. Upstream's layers pass it on
    to attention."""

    offsets: torch.Tensor  # (batch + 1,) int32
    longest: int
    masks: dict[Reach, BlockMask] | None  # for flex attention


def runs_varlen(query: torch.Tensor, softcap: float | None, dropout: float) -> bool:
    """Return whether flash attention of variable lengths is exact for these queries, soft-cap and
    dropout."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if softcap is not None or dropout or not half or query.shape[-1] > 256 or not query.is_cuda:
        return False
    return can_varlen() and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def can_varlen() -> bool:
    """Return whether `varlen_attn` of this torch takes windows and shared keys."""
    return varlen_attn is not None and {"window_size", "enable_gqa"} <= set(signature(varlen_attn).parameters)


def find_sequences(unpadding: Unpadding, reaches: set[Reach]) -> Sequences:
    """Return where the sequences of an unpadded batch are, with a mask for each reach."""
    counts, device = torch.tensor(unpadding.lengths), unpadding.indices.device
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)  # of each token
    positions, tokens = unpadding.positions, len(owner)

    def mask_of(reach: Reach) -> BlockMask:
        def seen(batch, head, query, key):
            same = owner[query] == owner[key]
            return same & within_reach(positions[query], positions[key], reach)

        return create_block_mask(seen, None, None, tokens, tokens, device, _compile=device.type != "cpu")

    return Sequences(unpadding.offsets.int(), max(unpadding.lengths), {reach: mask_of(reach) for reach in reaches})


def mix(x):
    """Scramble 31 bits by two rounds of multiply and shift; products keep their low bits in any
    integer type."""
    x = x & BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & BITS
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & BITS
    return x ^ (x >> 16)


def is_kept(draw: tuple[torch.Tensor, torch.Tensor], head, query, key):
    """Return which attention weights dropout keeps; a draw's seed and threshold always give the
    same ones."""
    seed, threshold = draw
    return mix(mix(mix(seed + head) + query) + key) >= threshold


def new_draw(dropout: float, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random seed and the threshold below which a share `dropout` of 31-bit numbers lies,
    both int32."""
    seed = torch.randint(BITS, (), device=device, dtype=torch.int32)
    return seed, torch.tensor(int(dropout * 2**31), device=device, dtype=torch.int32)


def score_function(softcap: float | None, draw: tuple[torch.Tensor, torch.Tensor] | None = None) -> Callable:
    """Return flex attention's score function, which soft-caps scores and drops those of a `draw`."""

    def score_of(score, batch, head, query, key):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if draw is None else torch.where(is_kept(draw, head, query, key), score, DROPPED)

    return score_of


def flex(query, key, value, mask: BlockMask, scaling: float, score_of: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute flex attention (1, heads, tokens, head_dim) and the logarithms of its sums (1, heads,
    tokens)."""
    run = flex_attention if query.device.type == "cpu" else compile_friendly_flex_attention
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # its kernel shares keys among 1, 2, 4, ... query heads
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    kwargs = {"block_mask": mask, "scale": scaling, "enable_gqa": True, **get_flex_attention_lse_kwargs(True)}
    output, sums = run(query, key, value, score_mod=score_of, **kwargs)
    return output, getattr(sums, "lse", sums)


@torch.compiler.disable(recursive=False)  # compiled layers leave attention to its own kernels
def fused_attention(module, query, key, value, attention_mask, sequences: Sequences | None = None, **kwargs):
    """Compute attention for `AttentionInterface`: (1, heads, tokens, head_dim) -> (1, tokens,
    heads, head_dim)."""
    if sequences is None:
        raise ValueError(
            f"attn_implementation={FUSED!r} runs inside a Gemma Encoder only: call the encoder, not its decoder, or "
            'choose an upstream backend with `set_attn_implementation("eager")`.'
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary leaves queries and keys in fp32, and values not
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    scaling, softcap, dropout = kwargs["scaling"], kwargs.get("softcap"), kwargs.get("dropout", 0.0)
    if runs_varlen(query, softcap, dropout):
        window = tuple(-1 if limit is None else limit for limit in module.reach)
        states, offsets = (x[0].transpose(0, 1) for x in (query, key, value)), sequences.offsets
        sizes = (offsets, offsets, sequences.longest, sequences.longest)
        return varlen_attn(*states, *sizes, scale=scaling, window_size=window, enable_gqa=True)[None], None
    mask = sequences.masks[module.reach]
    if not dropout:
        output, _ = flex(query, key, value, mask, scaling, score_function(softcap))
    else:
        draw = new_draw(dropout, query.device)
        # Of the first call only the sums are used, so its values are few.
        _, whole = flex(query, key, value[..., :16], mask, scaling, score_function(softcap))
        output, kept = flex(query, key, value, mask, scaling, score_function(softcap, draw))
        output = output * ((kept - whole).exp() / (1 - dropout))[..., None].to(output.dtype)
    return output.transpose(1, 2), None


AttentionInterface.register(FUSED, fused_attention)
