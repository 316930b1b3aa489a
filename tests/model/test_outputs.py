"""Laws of what a caller is given beside scores: states and attention weights, which of them, and their gradients."""

import gc
import weakref

import pytest
import torch
from helpers import ATTENTIONS, UNPADDED, build, encoder_config, pad, set_backend, texts

from modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

BATCH = pad(texts((7, 3, 5)), side="left", extra=1)
EVERY = (GemmaEncoderModel, GemmaEncoderForSequenceClassification, GemmaEncoderForRanking, GemmaEncoderForMaskedLM)


@torch.no_grad()
@pytest.mark.parametrize("backend", [UNPADDED, "eager"])
@pytest.mark.parametrize("model_class", EVERY)
def test_layers_may_be_asked_for_by_their_numbers(model_class, backend):
    """As transformers has it: a tuple of all layers, with None in the place of those that are not asked for."""
    model = build(model_class, encoder_config())
    set_backend(model, backend)
    every = model(**BATCH, output_hidden_states=True).hidden_states
    some = model(**BATCH, output_hidden_states=[0, -2]).hidden_states
    assert [states is not None for states in some] == [True, False, False, True, False]
    for number in (0, 3):
        assert torch.equal(some[number], every[number])


@torch.no_grad()
def test_layers_of_lists_may_be_asked_for_by_their_numbers():
    model = build(GemmaEncoderForRanking, encoder_config())
    lists = {name: values[None] for name, values in BATCH.items()}
    states = model(**lists, output_hidden_states=[1]).hidden_states
    assert states[1].shape == (1, 3, 8, 32) and states[0] is None


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_returned_states_keep_the_gradient_of_the_layers_own(attention):
    """The reference is torch's own `retain_grad` on what upstream's layer returns, padded."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text", attention=attention))
    set_backend(model, "eager")
    flowing = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: flowing.append(output))
    scores = model(**BATCH).logits
    handle.remove()
    flowing[0].retain_grad()
    scores.sum().backward()
    expected = flowing[0].grad
    assert expected.abs().max() > 0.01 and (expected[BATCH["attention_mask"] == 0] == 0).all()
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        outputs = model(**BATCH, output_hidden_states=True)
        states = outputs.hidden_states[2]
        states.retain_grad()
        outputs.logits.sum().backward()
        torch.testing.assert_close(states.grad, expected, atol=1e-5, rtol=1e-3)


def test_gradients_of_states_and_weights_are_the_same_for_every_backend_and_every_form():
    model = build(GemmaEncoderForRanking, encoder_config("gemma3_text"))
    lists = {name: values[None] for name, values in BATCH.items()}
    dims, found = [3] * 5 + [4] * 4, []  # a text's states are (seq_len, hidden), its weights (heads, seq_len, seq_len)
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        for batch in (BATCH, lists):
            outputs = model(**batch, output_hidden_states=True, output_attentions=True)
            kept = [*outputs.hidden_states, *outputs.attentions]
            for values in kept:
                values.retain_grad()
            outputs.logits.square().sum().backward()
            assert all(values.grad.shape == values.shape for values in kept)
            found.append([values.grad.flatten(0, values.dim() - own) for values, own in zip(kept, dims, strict=True)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-3)


def test_the_last_states_of_the_bare_encoder_keep_their_gradient():
    model = build(GemmaEncoderModel, encoder_config())
    outputs = model(**BATCH)
    outputs.last_hidden_state.retain_grad()
    outputs.pooler_output.sum().backward()
    share = BATCH["attention_mask"] / BATCH["attention_mask"].sum(-1, keepdim=True)  # of mean pooling
    torch.testing.assert_close(outputs.last_hidden_state.grad, share[..., None].expand(-1, -1, 32).float())


def test_a_loss_on_returned_states_counts_too():
    """As in distillation: the gradient is that of both ways, through the layers and of the states themselves."""
    model = build(GemmaEncoderModel, encoder_config())
    outputs = model(**BATCH)
    outputs.last_hidden_state.retain_grad()
    (outputs.pooler_output.sum() + outputs.last_hidden_state.sum()).backward()
    real = BATCH["attention_mask"].float()
    expected = (real / real.sum(-1, keepdim=True) + real)[..., None].expand(-1, -1, 32)
    torch.testing.assert_close(outputs.last_hidden_state.grad, expected)


def test_nothing_stays_alive_after_its_outputs():
    model = build(GemmaEncoderModel, encoder_config())
    gc.collect()
    gc.disable()
    try:
        outputs = model(**BATCH)
        outputs.last_hidden_state.retain_grad()
        states = weakref.ref(outputs.last_hidden_state)
        del outputs
        assert states() is None
    finally:
        gc.enable()


def test_gradients_add_up_as_torchs_do():
    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    outputs = model(**BATCH, output_hidden_states=[2])
    outputs.hidden_states[2].retain_grad()
    outputs.logits.sum().backward(retain_graph=True)
    once = outputs.hidden_states[2].grad.clone()
    outputs.logits.sum().backward()
    torch.testing.assert_close(outputs.hidden_states[2].grad, 2 * once)


def test_outputs_are_saved_and_copied_as_any_others(tmp_path):
    outputs = build(GemmaEncoderModel, encoder_config())(**BATCH, output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.requires_grad
    torch.save(outputs, tmp_path / "outputs.pt")
    again = torch.load(tmp_path / "outputs.pt", weights_only=False)
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        for one, other in zip(outputs[name], again[name], strict=True):
            assert torch.equal(one, other)
