"""Laws of the feed-forward block: upstream's own, fused or not."""

import copy

import pytest
import torch
from helpers import FAMILIES, OTHERS, build, decoder_config, encoder_config, pad, texts
from transformers import AutoModel

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, feedforward_gemma_encoder
from modeling_gemma_encoder.feedforward_gemma_encoder import FeedForward, can_fuse, runs_here, with_fusing

fuses = pytest.mark.skipif(not runs_here(torch.float32), reason="this torch or processor has no such products")
BATCH = pad(texts((9, 4, 12)))


def upstreams_block(family: str, **fields):
    """A block of upstream's with weights of every size."""
    block = AutoModel.from_config(decoder_config(family, **fields)).layers[-1].mlp
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.4)
    return block


@fuses
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_fused_is_upstreams_block(family):
    block, states = upstreams_block(family), torch.randn(1, 37, 32)
    ours = with_fusing(block)
    with torch.no_grad():
        assert can_fuse(ours, states)
        torch.testing.assert_close(ours(states), block(states), atol=1e-5, rtol=1e-5)


@fuses
def test_fused_adds_biases():
    block, states = upstreams_block("llama", mlp_bias=True), torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(with_fusing(block)(states), block(states), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not runs_here(torch.bfloat16), reason="this processor has no such products in bf16")
def test_in_bf16_fused_is_no_further_from_the_truth():
    block, states = upstreams_block("gemma2").bfloat16(), torch.randn(1, 500, 32).bfloat16()
    with torch.no_grad():
        truth = copy.deepcopy(block).double()(states.double())
        ours, upstreams = ((module(states) - truth).abs().mean() for module in (with_fusing(block), block))
    assert 0 < ours <= upstreams


@fuses
def test_scoring_fuses_every_layer_and_training_none(monkeypatch):
    model, calls = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text")), []
    fused = feedforward_gemma_encoder.fused
    monkeypatch.setattr(feedforward_gemma_encoder, "fused", lambda *args: calls.append(1) or fused(*args))
    with torch.no_grad():
        model(**BATCH)
    assert len(calls) == len(model.model.layers)
    model(**BATCH, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert len(calls) == len(model.model.layers)
    assert all(layer.mlp.gate_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)


@fuses
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_a_layer_that_is_more_than_itself_is_called(name):
    block, states = with_fusing(upstreams_block("gemma2")), torch.randn(1, 3, 32)
    with torch.no_grad():
        assert can_fuse(block, states)
        handle = getattr(block, name).register_forward_hook(lambda module, args, output: output * 2)
        assert not can_fuse(block, states)
        handle.remove()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        assert not can_fuse(block, states)
        handle.remove()
        assert can_fuse(block, states)
        setattr(block, name, torch.nn.Sequential(getattr(block, name)))
        assert not can_fuse(block, states)


@fuses
def test_whatever_needs_a_gradient_gets_it():
    """Of a bias alone, and forward: the derivative along a direction, by finite differences."""
    block, states, direction = with_fusing(upstreams_block("llama", mlp_bias=True)), *torch.randn(2, 1, 3, 32).double()
    block = block.requires_grad_(False).float()
    block.up_proj.bias.requires_grad_(True)
    block(states.float()).sum().backward()
    assert block.up_proj.bias.grad.abs().sum() > 0
    block.requires_grad_(False)
    _, derivative = torch.func.jvp(block, (states.float(),), (direction.float(),))
    exact = copy.deepcopy(block).double()
    expected = (exact(states + 1e-6 * direction) - exact(states - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(derivative.double(), expected, atol=1e-3, rtol=1e-3)


@fuses
def test_a_trace_has_upstreams_operations():
    block, states = with_fusing(upstreams_block("gemma2")).requires_grad_(False), torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.jit.trace(block, states)(states), block(states), atol=1e-5, rtol=1e-5)


def test_weights_keep_upstreams_names_and_other_blocks_are_left_alone():
    block = upstreams_block("gemma2")
    names = [name for name, _ in block.named_parameters()]
    assert [name for name, _ in with_fusing(block).named_parameters()] == names
    block.router = torch.nn.Linear(32, 2)
    assert with_fusing(block) is block and isinstance(with_fusing(upstreams_block("gemma")), FeedForward)
