"""What the README says of the alternatives, run. These laws are upstream's: should one change, so must the README."""

import pytest
import torch
from helpers import FAMILIES, decoder_config, pad, texts
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

BATCH = pad(texts((10, 6, 3)))


def sees_later_tokens(model, **inputs) -> bool:
    """Whether changing the last token changes the state of the first."""
    ids = texts((8,))[0].repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % 99
    with torch.no_grad():
        states = model(ids, **inputs, use_cache=False).last_hidden_state
    return bool((states[0, 0] - states[1, 0]).abs().max() > 1e-6)


def stock(family: str, backend: str, **flags):
    config = decoder_config(family, **flags)
    config._attn_implementation = backend
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_classifiers_are_causal(family):
    assert not sees_later_tokens(stock(family, "eager"))


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_use_bidirectional_attention_stays_causal_under_eager(family):
    assert not sees_later_tokens(stock(family, "eager", use_bidirectional_attention=True))


def test_use_bidirectional_attention_turns_causal_with_padding_on_gemma_1_under_sdpa():
    model = stock("gemma", "sdpa", use_bidirectional_attention=True)
    assert sees_later_tokens(model)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, -2:] = 0
    ids = texts((8,))[0].repeat(2, 1)
    ids[1, 5] = (ids[1, 5] + 1) % 99  # the last real token
    with torch.no_grad():
        states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.allclose(states[0, 0], states[1, 0], atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_is_causal_false_lets_packed_texts_see_each_other(backend):
    config = decoder_config("gemma3_text")
    config.is_causal = False
    config._attn_implementation = backend
    model = AutoModel.from_config(config).eval()
    torch._dynamo.reset()
    ids = torch.cat(texts((5, 5)))[None]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 99
    positions = torch.arange(5).repeat(2)[None]
    with torch.no_grad():
        states = [model(x, position_ids=positions, use_cache=False).last_hidden_state for x in (ids, other)]
    assert not torch.allclose(states[0][0, :5], states[1][0, :5], atol=1e-6)


def test_stock_classifiers_multiply_gradients_by_the_accumulation_steps(tmp_path):
    """transformers#47688: the loss ignores what the Trainer passes, and the Trainer does not divide."""
    from transformers import TrainerCallback

    data = [{**pad([ids]), "labels": torch.tensor(0)} for ids in texts((5,) * 4)]
    data = [{name: values.view(-1) if name != "labels" else values for name, values in row.items()} for row in data]
    norms = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(model.score.weight.grad.norm().item())

    for batch, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(decoder_config("gemma2"))
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, args, train_dataset=data, callbacks=[Note()]).train()
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-3)
