"""Long lists in chunks: the plain path's scores and gradients, at the memory of one chunk."""

import pytest
import torch
from helpers import FAMILIES, build, encoder_config, pad, texts
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_gemma_encoder import RANKING_LOSSES, GemmaEncoderForRanking
from modeling_gemma_encoder.encoding_gemma_encoder import in_chunks

NO_DROPOUT = {"attention_dropout": 0.0, "feedforward_dropout": 0.0}


def lists(num_docs: int = 7, batch: int = 2):
    """Ragged: the last document of the second list is not there."""
    lengths = tuple(3 + 5 * number % 8 for number in range(batch * num_docs))
    inputs = {name: values.unflatten(0, (batch, num_docs)) for name, values in pad(texts(lengths)).items()}
    labels = torch.arange(batch * num_docs).view(batch, num_docs) % 3
    inputs["attention_mask"][1, -1] = 0
    labels[1, -1] = -100
    return {**inputs, "labels": labels}


def ranker(size, family: str = "gemma2", **fields):
    return build(GemmaEncoderForRanking, encoder_config(family, list_chunk_size=size, **fields)).train()


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 14, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_neither_scores_nor_gradients(family, size):
    inputs = lists()
    plain, chunked = (ranker(s, family, pooling="kv_probe", **NO_DROPOUT) for s in (None, size))
    with torch.no_grad():
        torch.testing.assert_close(chunked(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
    expected, found = gradients(plain, inputs), gradients(chunked, inputs)
    assert found.keys() == expected.keys() and len(found) > 20
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("ranking_loss", RANKING_LOSSES)
def test_every_loss_sees_the_whole_list(ranking_loss):
    inputs = lists()
    plain, chunked = (ranker(size, ranking_loss=ranking_loss, **NO_DROPOUT) for size in (None, 3))
    torch.testing.assert_close(chunked(**inputs).loss, plain(**inputs).loss)
    expected = RANKING_LOSSES[ranking_loss](plain(**inputs).logits, inputs["labels"])
    torch.testing.assert_close(plain(**inputs).loss, expected)


def test_with_dropout_gradients_are_those_of_the_same_chunks_held_in_memory():
    inputs, model = lists(), ranker(3, attention_dropout=0.3, feedforward_dropout=0.3)
    torch.manual_seed(0)
    found = gradients(model, inputs)
    model.zero_grad()
    torch.manual_seed(0)
    flat = [inputs[name].flatten(0, 1).split(3) for name in ("input_ids", "attention_mask")]
    logits = torch.cat([model._score(ids, mask, None) for ids, mask in zip(*flat, strict=True)]).view(2, 7)
    RANKING_LOSSES["softmax"](logits, inputs["labels"]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_gradient_checkpointing_and_adapters_go_with_chunks():
    inputs, found = lists(), []
    for size, checkpointed in ((None, False), (3, False), (3, True)):
        torch.manual_seed(0)
        model = get_peft_model(
            ranker(size, **NO_DROPOUT),
            LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        ).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, inputs))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, expected in found[0].items():
            torch.testing.assert_close(other[name], expected, atol=1e-5, rtol=1e-4, msg=name)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were made within it and alive at once."""

    def __enter__(self):
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return output


def peak(size, num_docs: int) -> int:
    model, inputs = ranker(size, **NO_DROPOUT), lists(num_docs)
    gradients(model, inputs)  # gradients are there before and after
    with PeakMemory() as memory:
        model(**inputs).loss.backward()
    return memory.peak


def test_peak_memory_does_not_grow_with_the_list():
    plain, chunked = ([peak(size, num_docs) for num_docs in (8, 32)] for size in (None, 4))
    assert plain[1] > 3 * plain[0]
    assert chunked[1] < 1.2 * chunked[0]
    assert chunked[1] < plain[1] / 5


def test_chunks_split_the_rows_in_order():
    seen = []

    def score(rows, nothing):
        assert nothing is None
        seen.append(rows.tolist())
        return rows[:, None]

    assert in_chunks(score, 2, torch.arange(5), None)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert seen == [[0, 1], [2, 3], [4]]


def test_states_of_chunks_are_refused():
    with pytest.raises(ValueError, match="need `list_chunk_size=None`"):
        ranker(3)(**lists(), output_attentions=True)
