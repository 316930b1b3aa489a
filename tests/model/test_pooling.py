"""Laws of the poolers: values worked out by hand, torch's own attention, and no dependence on the neighbours."""

import pytest
import torch
from helpers import encoder_config
from torch.nn import functional as F

from modeling_gemma_encoder import POOLERS

# Two sequences of one-dimensional-looking states: 1, 2, 6 and 10; the value repeats over the hidden size.
STATES = torch.tensor([1.0, 2.0, 6.0, 10.0])[:, None].expand(-1, 32)
OFFSETS = torch.tensor([0, 3, 4])


def make(pooling: str, **fields):
    torch.manual_seed(0)
    pooler = POOLERS[pooling](encoder_config(pooling=pooling, **fields))
    for parameter in pooler.parameters():
        parameter.data.normal_()
    return pooler


@pytest.mark.parametrize(
    ("pooling", "k", "expected"),
    [
        ("mean", 1, [3.0, 10.0]),
        ("first_k", 1, [1.0, 10.0]),
        ("first_k", 2, [1.5, 10.0]),
        ("first_k", 5, [3.0, 10.0]),
        ("last_k", 1, [6.0, 10.0]),
        ("last_k", 2, [4.0, 10.0]),
        ("last_k", 5, [3.0, 10.0]),
    ],
)
def test_values_by_hand(pooling, k, expected):
    pooled = make(pooling, pooling_k=k)(STATES, OFFSETS)
    torch.testing.assert_close(pooled, torch.tensor(expected)[:, None].expand(-1, 32))


@pytest.mark.parametrize("pooling", ["mean", "first_k", "last_k"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_averages_are_what_their_weights_make_of_the_tokens(pooling, k):
    pooler = make(pooling, pooling_k=k)
    weights = pooler.weights(STATES, OFFSETS)
    assert weights.shape == (4,) and weights[:3].sum() == pytest.approx(1) and weights[3] == 1
    pooled = torch.stack([weights[:3] @ STATES[:3], weights[3:] @ STATES[3:]])
    torch.testing.assert_close(pooled, pooler(STATES, OFFSETS))


def test_weights_of_probes_are_torchs():
    states, offsets = torch.randn(8, 32), torch.tensor([0, 5, 7])  # the last token is of no sequence
    pooler = make("query_probe")
    keys = F.rms_norm(states, (32,), pooler.norm.weight, eps=1e-6)
    reference = torch.nn.MultiheadAttention(32, pooler.num_heads, bias=False, batch_first=True)
    reference.in_proj_weight.data = torch.cat([pooler.query.weight, pooler.key.weight, pooler.value.weight])
    weights = pooler.weights(states, offsets)
    for tokens in (slice(0, 5), slice(5, 7)):
        theirs = reference(pooler.probes[None], keys[None, tokens], keys[None, tokens])[1][0].mean(0)
        torch.testing.assert_close(weights[tokens], theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(make("kv_probe").weights(states, offsets)[:7], torch.tensor([0.2] * 5 + [0.5] * 2))


def attention_by_torch(pooler, queries, keys_values):
    """torch.nn.MultiheadAttention with the pooler's projections: an independent multi-head attention."""
    reference = torch.nn.MultiheadAttention(32, pooler.num_heads, bias=False, batch_first=True)
    reference.in_proj_weight.data = torch.cat([pooler.query.weight, pooler.key.weight, pooler.value.weight])
    reference.out_proj.weight.data = pooler.output.weight
    return reference(queries[None], keys_values[None], keys_values[None], need_weights=False)[0][0].mean(0)


@pytest.mark.parametrize("num_probes", [2, 5])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_probes_attend_as_torch_does(num_probes, num_heads):
    states, offsets = torch.randn(7, 32), torch.tensor([0, 5, 7])
    for pooling in ("query_probe", "kv_probe"):
        pooler = make(pooling, pooling_num_probes=num_probes, pooling_num_heads=num_heads)
        pooled = pooler(states, offsets)
        for row, sequence in enumerate((states[:5], states[5:])):
            sequence = F.rms_norm(sequence, (32,), pooler.norm.weight, eps=1e-6)
            pair = (pooler.probes, sequence) if pooling == "query_probe" else (sequence, pooler.probes)
            torch.testing.assert_close(pooled[row], attention_by_torch(pooler, *pair), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLERS)
def test_tokens_of_no_sequence_do_not_count(pooling):
    pooler, states, offsets = make(pooling, pooling_k=2), torch.randn(9, 32), torch.tensor([0, 4, 6])
    torch.testing.assert_close(pooler(states, offsets), pooler(states[:6], offsets), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLERS)
def test_a_sequence_without_tokens_is_zeros_and_finite_in_gradient(pooling):
    states = torch.randn(3, 32, requires_grad=True)
    pooled = make(pooling)(states, torch.tensor([0, 2, 2, 3]))
    assert pooled[1].abs().max() == 0 and pooled.isfinite().all()
    pooled.square().sum().backward()
    assert states.grad.isfinite().all() and states.grad.abs().sum() > 0


@pytest.mark.parametrize("pooling", ["query_probe", "kv_probe"])
def test_large_states_stay_tame(pooling):
    states, offsets = torch.randn(7, 32), torch.tensor([0, 5, 7])
    pooler = make(pooling)
    torch.testing.assert_close(pooler(states * 1e4, offsets), pooler(states, offsets), atol=1e-4, rtol=1e-4)
    assert pooler.bfloat16()(states.bfloat16() * 1e4, offsets).dtype == torch.float32
