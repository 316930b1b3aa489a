"""Laws of fused attention: what the kernels are told means the same, and dropout by two calls is dropout, exactly."""

from itertools import pairwise

import pytest
import torch
from helpers import FUSED, build, encoder_config, pad, set_backend, texts
from torch.nn.attention import flex_attention

from modeling_gemma_encoder import GemmaEncoderModel, fused_gemma_encoder
from modeling_gemma_encoder.attention_gemma_encoder import dense_attention, unpad, within_reach
from modeling_gemma_encoder.fused_gemma_encoder import find_sequences, fused_attention, is_kept, new_draw, runs_varlen

LENGTHS = (9, 1, 5, 1, 1)


@pytest.fixture
def module():
    module = torch.nn.Module()
    module.reach, module.training = (3, 2), True
    return module


def make_states(heads: int = 4, keys: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    tokens = sum(LENGTHS)
    return tuple(torch.randn(1, n, tokens, size, requires_grad=True) for n in (heads, keys, keys))


def make_sequences(reach):
    return find_sequences(unpad(pad(texts(LENGTHS))["attention_mask"].bool()), {reach})


def seen(reach) -> torch.Tensor:
    """(tokens, tokens), made from the lengths alone."""
    owner = torch.tensor([n for n, length in enumerate(LENGTHS) for _ in range(length)])
    place = torch.tensor([n for length in LENGTHS for n in range(length)])
    return (owner[:, None] == owner) & within_reach(place[:, None], place, reach)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("heads", [4, 6])
def test_dropout_by_two_calls_is_dropout(module, monkeypatch, softcap, heads):
    """Output and gradients are those of weights that are computed whole and then dropped. Torch refuses gradients of
    flex attention on a CPU, where it only lacks a kernel: its plain implementation has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *states: None)
    query, key, value = make_states(heads)
    tokens, rate = query.shape[2], 0.4
    torch.manual_seed(7)
    draw, places = new_draw(rate, "cpu"), torch.arange(tokens)
    kept = is_kept(draw, torch.arange(heads)[:, None, None], places[:, None], places)
    assert not (kept & seen(module.reach)).any(-1).all()  # some tokens lose all they see
    keys, values = (x.repeat_interleave(heads // 2, 1) for x in (key, value))
    scores = query @ keys.mT * 0.25
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen(module.reach), -torch.inf).softmax(-1) * kept / (1 - rate)
    expected = (weights @ values).transpose(1, 2)
    torch.manual_seed(7)
    kwargs = {"scaling": 0.25, "softcap": softcap, "dropout": rate, "sequences": make_sequences(module.reach)}
    output, _ = fused_attention(module, query, key, value, None, **kwargs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    for gradient, of_reference in zip(
        torch.autograd.grad(output, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, of_reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2])
def test_what_is_dropped_looks_random(seed):
    """The share is right, in every row and column, and neighbours, layers and integer types know nothing of it."""
    heads, tokens = 8, 400
    places = torch.arange(tokens, dtype=torch.int32)
    head = torch.arange(heads, dtype=torch.int32)[:, None, None]
    threshold = int(0.1 * 2**31)
    kept = is_kept((seed, threshold), head, places[:, None], places)
    assert torch.equal(kept, is_kept((seed, threshold), head.long(), places.long()[:, None], places.long()))
    centred = kept.double() - 0.9
    assert abs(centred.mean()) < 4 * (0.09 / centred.numel()) ** 0.5
    for mean in (centred.mean((0, 1)), centred.mean((0, 2))):
        assert mean.std() == pytest.approx((0.09 / heads / tokens) ** 0.5, rel=0.15)
    next_layer = is_kept((seed + 1, threshold), head, places[:, None], places).double() - 0.9
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.mT, next_layer):
        off_diagonal = ~torch.eye(tokens, dtype=torch.bool)
        correlation = (centred * other)[:, off_diagonal].mean() / 0.09
        assert abs(correlation) < 5 / (heads * tokens * (tokens - 1)) ** 0.5 * 2


def test_varlen_attention_is_told_the_same(module, monkeypatch):
    """The kernel needs a GPU; what it is told does not. Its windows (left, right) are inclusive, -1 is no limit."""

    def reference(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
        assert starts.dtype == torch.int32 and torch.equal(starts, key_starts) and enable_gqa
        assert longest == longest_key == starts.diff().max()
        parts = []
        for start, end in pairwise(starts.tolist()):
            q, k, v = (x[None, start:end] for x in (query, key, value))
            place = torch.arange(end - start)
            left, right = (None if limit == -1 else limit for limit in window_size)
            mask = within_reach(place[:, None], place, (left, right))[None]
            parts.append(dense_attention(q, k, v, mask, scale)[0][0])
        return torch.cat(parts)

    monkeypatch.setattr(fused_gemma_encoder, "varlen_attn", reference)
    query, key, value = (x.detach() for x in make_states())
    for reach in ((None, None), (None, 0), (2, 2), (0, 3)):
        module.reach = reach
        kwargs = {"scaling": 0.25, "sequences": make_sequences(reach)}
        monkeypatch.setattr(fused_gemma_encoder, "runs_varlen", lambda *args: False)
        expected, _ = fused_attention(module, query, key, value, None, **kwargs)
        monkeypatch.setattr(fused_gemma_encoder, "runs_varlen", lambda *args: True)
        output, _ = fused_attention(module, query, key, value, None, **kwargs)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_flash_attention_runs_only_where_it_is_exact(monkeypatch):
    class OnGpu:
        is_cuda, device, dtype, shape = True, "cuda", torch.bfloat16, (1, 4, 10, 256)

    query = OnGpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not runs_varlen(query, None, 0.0)  # a T4 has no such kernel
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert runs_varlen(query, None, 0.0)
    assert not runs_varlen(query, 50.0, 0.0) and not runs_varlen(query, None, 0.1)
    query.dtype = torch.float32
    assert not runs_varlen(query, None, 0.0)
    query.dtype, query.shape = torch.float16, (1, 4, 10, 512)
    assert not runs_varlen(query, None, 0.0)


def test_a_training_step_runs_fused(monkeypatch):
    """In a whole model: gradients arrive everywhere, and every pass draws anew, again the same from the same state."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *states: None)
    model = build(GemmaEncoderModel, encoder_config("gemma2", attention_dropout=0.2, feedforward_dropout=0)).train()
    set_backend(model, FUSED)
    batch, drawn = pad(texts((7, 3))), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(model(**batch).pooler_output)
    assert torch.equal(drawn[0], drawn[2]) and (drawn[0] - drawn[1]).abs().max() > 1e-2
    drawn[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.parameters())


def test_under_autocast_all_are_of_its_dtype(module, monkeypatch):
    """Rotary embeddings leave queries and keys in fp32 there, and values in bf16."""
    query, key, value = (x.detach() for x in make_states())
    given = []
    monkeypatch.setattr(fused_gemma_encoder, "flex", lambda *states: (given.append(states[:3]), (states[0], None))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kwargs = {"scaling": 0.25, "sequences": make_sequences(module.reach)}
        fused_attention(module, query, key, value.bfloat16(), None, **kwargs)
    assert {x.dtype for x in given[0]} == {torch.bfloat16}
