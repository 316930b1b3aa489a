"""Laws of the last layer: computed only where it is pooled, it changes no score and no gradient."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from helpers import FAMILIES, FUSED, OTHERS, UNPADDED, build, encoder_config, pad, texts

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification

BATCH = pad(texts((9, 1, 12, 5)), side="left", extra=2)
FEW = [("first_k", 1), ("last_k", 1), ("last_k", 3)]


def make(family="gemma2", pooling="last_k", pooling_k=1, kind=GemmaEncoderForSequenceClassification, **fields):
    fields = {"attention_dropout": 0, "feedforward_dropout": 0, **fields}
    return build(kind, encoder_config(family, pooling=pooling, pooling_k=pooling_k, **fields))


def in_whole(model, **batch):
    """Logits by way of all token states."""
    return model.classifier(model.pool(model.encode(**batch)))


def seen_by_last(model, part="mlp.up_proj") -> list[int]:
    """Tokens in each call of a linear layer of the last layer, from now on."""
    seen = []
    module = model.model.layers[-1].get_submodule(part)
    forward = module.forward
    module.forward = lambda states: seen.append(states.shape[1]) or forward(states)  # no hook: these see all of it
    return seen


@pytest.mark.parametrize("backend", [UNPADDED, FUSED])
@pytest.mark.parametrize(("pooling", "k"), FEW)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_scores_are_those_of_the_whole_layer(family, pooling, k, backend):
    model = make(family, pooling, k)
    model.set_attn_implementation(backend)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, in_whole(model, **BATCH), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.2])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(("pooling", "k"), FEW[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_layer_dropout_included(family, pooling, k, checkpointing, dropout):
    if family == "gemma4_text" and checkpointing:
        pytest.skip("refused: shared keys and values")
    model = make(family, pooling, k, attention_dropout=dropout, feedforward_dropout=dropout).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    gradients = []
    for run in (lambda: model(**BATCH).logits, lambda: in_whole(model, **BATCH)):
        torch.manual_seed(1)
        model.zero_grad()
        run().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("pooling", "k", "tokens"), [("first_k", 1, 4), ("last_k", 3, 10), ("mean", 1, 27)])
def test_the_last_layer_sees_what_is_pooled(pooling, k, tokens):
    model = make(pooling=pooling, pooling_k=k)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"]
    seen = {part: seen_by_last(model, part) for part in parts}
    model(**BATCH)
    assert seen == {part: [27 if part == "self_attn.k_proj" else tokens] for part in parts}


def test_states_that_are_asked_for_are_whole():
    model = make()
    seen = seen_by_last(model)
    states = model(**BATCH, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, model.encode(**BATCH, output_hidden_states=True).hidden_states[-1])
    assert model(**BATCH, output_attentions=True).attentions[-1].shape[-1] == BATCH["input_ids"].shape[1]
    assert seen == [27, 27, 27]


@pytest.mark.parametrize("where", ["norm", "layers.3", "layers.3.mlp", "layers.3.self_attn.v_proj"])
def test_whoever_looks_at_the_last_layer_sees_all_of_it(where):
    model, seen = make(), []
    model.model.get_submodule(where).register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(**BATCH)
    model.encode(**BATCH)
    torch.testing.assert_close(*seen)


def test_own_poolers_and_subclasses_see_all_of_it():
    class Own(torch.nn.Module):
        def forward(self, states, offsets):
            return torch.stack([states[start:end].amax(0) for start, end in pairwise(offsets)])

    class Subclass(GemmaEncoderForSequenceClassification):
        def pool(self, encoded):
            return Own()(encoded.token_states, encoded.offsets)

    model = make()
    subclass = build(Subclass, model.config)
    subclass.load_state_dict(model.state_dict())
    model.pooler = Own()
    expected = in_whole(model, **BATCH)
    torch.testing.assert_close(model(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subclass(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_last_layer_is_the_one_that_runs_last():
    model = make()
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    torch.testing.assert_close(model(**BATCH).logits, in_whole(model, **BATCH), atol=1e-5, rtol=1e-5)
    model.model.config.num_hidden_layers = 5
    model.model.config.layer_types.append("full_attention")
    torch.testing.assert_close(model(**BATCH).logits, in_whole(model, **BATCH), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_behind():
    """Neither by a repeated layer that stops early, nor by one that fails, nor by one encoder within another."""
    model, other = make("gemma"), make("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**BATCH).logits.sum().backward()
    block, states = model.eval().model.layers[-1].mlp, torch.randn(1, 27, 32)
    expected = block.down_proj(block.act_fn(block.gate_proj(states)) * block.up_proj(states))
    torch.testing.assert_close(block(states), expected)
    forward, scores = block.act_fn.forward, in_whole(model, **BATCH)
    block.act_fn.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**BATCH)
    block.act_fn.forward = lambda x: (other(**pad(texts((3, 2)))), forward(x))[1]
    torch.testing.assert_close(block(states), expected)
    torch.testing.assert_close(model(**BATCH).logits, scores, atol=1e-5, rtol=1e-5)


def test_lists_in_chunks_give_the_same_gradients():
    gradients = []
    lists = {name: values.view(2, 2, -1) for name, values in BATCH.items()}
    for size in (None, 1):
        model = make(kind=GemmaEncoderForRanking, list_chunk_size=size).train()
        model(**lists, labels=torch.tensor([[1, 0], [0, 1]])).loss.backward()
        gradients.append(model.model.layers[-1].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_row_of_padding_alone_is_no_matter():
    model = make()
    batch = {name: torch.cat([values, torch.zeros_like(values[:1])]) for name, values in BATCH.items()}
    batch["labels"] = torch.full((5,), -100)  # it fills a batch, and is not to be scored
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:4], model(**BATCH).logits, atol=1e-5, rtol=1e-5)
    nothing = {name: torch.zeros_like(values) for name, values in BATCH.items()}
    model(**nothing, labels=torch.full((4,), -100)).logits.sum().backward()
    assert torch.isfinite(model.model.layers[-1].mlp.up_proj.weight.grad).all()


def test_threads_can_share_a_model():
    model = make()
    batches = [pad(texts(lengths, seed)) for seed, lengths in enumerate([(9, 3), (5,), (12, 12, 2), (1, 7)] * 8)]

    @torch.no_grad()
    def score(batch):
        return model(**batch).logits

    alone = [score(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(score, batches), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
