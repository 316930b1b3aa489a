"""Laws of the norm: upstream's own, with fewer tensors or not."""

import copy

import pytest
import torch
from helpers import build, decoder_config, encoder_config, pad, texts
from transformers import AutoModel

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.norm_gemma_encoder import FewPassRMSNorm, Scaling, can_scale

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
    ours = FewPassRMSNorm(norm)
    for given in (states, states.transpose(0, 1), torch.zeros(1, 3, 32), states[:, :0]):
        with torch.no_grad():
            assert can_scale(ours, given)
            torch.testing.assert_close(ours(given), norm(given), atol=1e-6, rtol=1e-5)


def test_by_hand():
    norm = upstreams_norm()
    norm.weight.data = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        found = FewPassRMSNorm(norm)(torch.tensor([[3.0, 4.0]]))  # the root of the mean square is 5 / sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]) * 2**0.5 / 5)


def test_states_of_bf16_are_rounded_once():
    norm, states = upstreams_norm().bfloat16(), 20 * torch.randn(1, 500, 32).bfloat16()
    with torch.no_grad():
        ours, upstreams, truth = (
            FewPassRMSNorm(norm)(states),
            norm(states),
            copy.deepcopy(norm).double()(states.double()),
        )
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().mean() <= 1.01 * (upstreams - truth).abs().mean()


def test_every_norm_of_the_decoder_scales_and_learns(monkeypatch):
    model, calls = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text")), []
    apply = Scaling.apply
    monkeypatch.setattr(Scaling, "apply", lambda *args: calls.append(1) or apply(*args))
    norms = 6 * len(model.model.layers) + 1
    with torch.no_grad():
        model(**BATCH)
    assert len(calls) == norms
    model(**BATCH, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert len(calls) == 2 * norms
    found = [module for module in model.model.modules() if isinstance(module, FewPassRMSNorm)]
    assert len(found) == norms and all(module.weight.grad.abs().sum() > 0 for module in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
def test_gradients_are_those_of_upstreams_formula(layout, dtype):
    """Of states that lie in another order too, as queries and keys do, with a gradient in a third."""
    norm = upstreams_norm().to(dtype)
    ours, leaves = FewPassRMSNorm(copy.deepcopy(norm)), [(3 * torch.randn(2, 5, 7, 32)).to(dtype) for _ in range(2)]
    leaves[1].data.copy_(leaves[0])
    reorder = {
        "plain": lambda x: x,
        "transposed": lambda x: x.transpose(1, 2),
        "expanded": lambda x: x[:1].expand_as(x),
    }
    gradient = torch.randn(2, 32, 5, 7).movedim(1, -1).to(dtype)
    for module, leaf in zip((norm, ours), leaves, strict=True):
        output = module(reorder[layout](leaf.requires_grad_()))
        output.backward(gradient if layout != "transposed" else gradient.transpose(1, 2))
    close = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}[dtype]
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **close)
    torch.testing.assert_close(
        ours.weight.grad, norm.weight.grad, **close if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    )


def test_a_gradient_has_a_gradient():
    """As penalties on gradients need it; and autocast around `backward` rounds nothing."""
    norm, states = upstreams_norm(), torch.randn(4, 32)
    found = []
    for module in (norm, FewPassRMSNorm(copy.deepcopy(norm))):
        leaf = states.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (first,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        first.square().sum().backward()
        found.append((first.detach(), leaf.grad, module.weight.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)


def test_the_backward_pass_keeps_the_input_only():
    kept = []
    norm, states = FewPassRMSNorm(upstreams_norm()), torch.randn(1, 64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        norm(states)
    assert set(kept) == {states.data_ptr(), norm.weight.data_ptr()}


def test_whatever_needs_a_gradient_gets_it():
    """Forward: the derivative along a direction, by finite differences. Of frozen weights, the states' alone."""
    norm, states, direction = FewPassRMSNorm(upstreams_norm()), *torch.randn(2, 1, 3, 32).double()
    norm.requires_grad_(False)
    _, derivative = torch.func.jvp(norm, (states.float(),), (direction.float(),))
    with torch.no_grad():
        after, before = (norm((states + step * direction).float()).double() for step in (1e-2, -1e-2))
    torch.testing.assert_close(derivative.double(), (after - before) / 2e-2, atol=1e-2, rtol=1e-2)
    leaf = states.float().requires_grad_()
    norm(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_a_trace_has_upstreams_operations():
    norm, states = FewPassRMSNorm(upstreams_norm()).requires_grad_(False), torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.jit.trace(norm, states)(states), norm(states), atol=1e-6, rtol=1e-5)
    assert "vector_norm" not in str(torch.jit.trace(norm, states).graph)


@pytest.mark.parametrize("family", ["gemma4_text", "llama", "qwen3"])
def test_norms_of_another_formula_are_left_alone(family):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family))
    assert not [module for module in model.modules() if isinstance(module, FewPassRMSNorm)]
