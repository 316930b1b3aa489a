"""Laws of the norm: upstream's own, with fewer tensors or not."""

import copy

import pytest
import torch
from helpers import build, decoder_config, encoder_config, pad, texts
from transformers import AutoModel

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, norm_gemma_encoder
from modeling_gemma_encoder.norm_gemma_encoder import ScoringRMSNorm, can_scale

BATCH = pad(texts((9, 4, 12)))
WITH_ITS_FORMULA = ("gemma", "gemma2", "gemma3_text")


def upstreams_norm(family: str = "gemma3_text"):
    norm = AutoModel.from_config(decoder_config(family)).norm
    norm.weight.data.normal_(0, 0.4)
    return norm


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])  # Gemma's states grow from layer to layer
@pytest.mark.parametrize("family", WITH_ITS_FORMULA)
def test_it_is_upstreams_norm(family, size):
    norm, states = upstreams_norm(family), size * torch.randn(2, 37, 32)
    ours = ScoringRMSNorm(norm)
    for given in (states, states.transpose(0, 1), torch.zeros(1, 3, 32), states[:, :0]):
        with torch.no_grad():
            assert can_scale(ours, given)
            torch.testing.assert_close(ours(given), norm(given), atol=1e-6, rtol=1e-5)


def test_by_hand():
    norm = upstreams_norm()
    norm.weight.data = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        found = ScoringRMSNorm(norm)(torch.tensor([[3.0, 4.0]]))  # the root of the mean square is 5 / sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]) * 2**0.5 / 5)


def test_states_of_bf16_are_rounded_once():
    norm, states = upstreams_norm().bfloat16(), 20 * torch.randn(1, 500, 32).bfloat16()
    with torch.no_grad():
        ours, upstreams, truth = (
            ScoringRMSNorm(norm)(states),
            norm(states),
            copy.deepcopy(norm).double()(states.double()),
        )
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().mean() <= 1.01 * (upstreams - truth).abs().mean()


def test_scoring_scales_in_every_norm_and_training_in_none(monkeypatch):
    model, calls = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text")), []
    scaled = norm_gemma_encoder.scaled
    monkeypatch.setattr(norm_gemma_encoder, "scaled", lambda *args: calls.append(1) or scaled(*args))
    norms = 6 * len(model.model.layers) + 1
    with torch.no_grad():
        model(**BATCH)
    assert len(calls) == norms
    model(**BATCH, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert len(calls) == norms
    found = [module for module in model.model.modules() if isinstance(module, ScoringRMSNorm)]
    assert len(found) == norms and all(module.weight.grad.abs().sum() > 0 for module in found)


def test_whatever_needs_a_gradient_gets_it():
    """Forward: the derivative along a direction, by finite differences. Of frozen weights, the states' alone."""
    norm, states, direction = ScoringRMSNorm(upstreams_norm()), *torch.randn(2, 1, 3, 32).double()
    norm.requires_grad_(False)
    _, derivative = torch.func.jvp(norm, (states.float(),), (direction.float(),))
    with torch.no_grad():
        after, before = (norm((states + step * direction).float()).double() for step in (1e-2, -1e-2))
    torch.testing.assert_close(derivative.double(), (after - before) / 2e-2, atol=1e-2, rtol=1e-2)
    leaf = states.float().requires_grad_()
    norm(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_a_trace_has_upstreams_operations():
    norm, states = ScoringRMSNorm(upstreams_norm()).requires_grad_(False), torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.jit.trace(norm, states)(states), norm(states), atol=1e-6, rtol=1e-5)
    assert "vector_norm" not in str(torch.jit.trace(norm, states).graph)


@pytest.mark.parametrize("family", ["gemma4_text", "llama", "qwen3"])
def test_norms_of_another_formula_are_left_alone(family):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family))
    assert not [module for module in model.modules() if isinstance(module, ScoringRMSNorm)]
