"""Laws that need a GPU: its kernels give what the CPU gives. Skipped where there is none."""

import pytest
import torch
from helpers import FAMILIES, FUSED, UNPADDED, build, encoder_config, pad, texts
from transformers.utils import is_flash_attn_2_available

from modeling_gemma_encoder import (
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
    quantize_int8,
    verify_attention,
)
from modeling_gemma_encoder.attention_gemma_encoder import unpad
from modeling_gemma_encoder.fused_gemma_encoder import find_sequences, fused_attention, is_kept, new_draw, runs_varlen

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LENGTHS = (40, 1, 17, 64, 5)
BATCH = pad(texts(LENGTHS), side="left", extra=3)
LABELS = torch.tensor([0, 1, 1, 0, 1])
WIDE = {"head_dim": 32, "max_position_embeddings": 512}  # what flex attention's kernel takes
EAGER_AND_OURS = [UNPADDED, FUSED, "eager"]


def make(kind=GemmaEncoderModel, family="gemma2", **fields):
    decoder = WIDE | ({"global_head_dim": 64} if family == "gemma4_text" else {})
    return build(
        kind, encoder_config(family, decoder=decoder, **{"attention_dropout": 0, "feedforward_dropout": 0, **fields})
    )


def there(batch: dict) -> dict:
    return {name: values.to(DEVICE) for name, values in batch.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double().cpu() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", EAGER_AND_OURS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_of_a_cpu(family, backend, attention):
    """In fp32, and in bf16 to its rounding, where Gemma 3 and 4 run flash attention of variable lengths."""
    model = make(family=family, attention=attention)
    expected = model(**BATCH).last_hidden_state
    model.to(DEVICE).set_attn_implementation(backend)
    assert relative(model(**there(BATCH)).last_hidden_state, expected) < 1e-3  # TF32 may be on
    verify_attention(model)
    assert relative(model.bfloat16()(**there(BATCH)).last_hidden_state, expected) < 5e-2


@pytest.mark.parametrize("radius", [0, 5, 16])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@torch.no_grad()
def test_fused_windows_reach_as_far(family, radius):
    model = make(family=family, attention_window=radius)
    expected = model(**BATCH).last_hidden_state
    model.to(DEVICE).set_attn_implementation(FUSED)
    assert relative(model(**there(BATCH)).last_hidden_state, expected) < 1e-3
    assert relative(model.bfloat16()(**there(BATCH)).last_hidden_state, expected) < 5e-2


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("heads", [4, 6])
def test_dropout_by_two_calls_is_dropout(softcap, heads):
    """Output and gradients are those of weights that are computed whole and then dropped, by the same draw."""
    generator = torch.Generator().manual_seed(0)
    tokens, rate = sum(LENGTHS), 0.3
    states = [torch.randn(1, n, tokens, 32, generator=generator).to(DEVICE) for n in (heads, 2, 2)]
    query, key, value = (x.requires_grad_() for x in states)
    module = torch.nn.Module()
    module.reach, module.training = (None, None), True
    sequences = find_sequences(unpad(there(BATCH)["attention_mask"].bool()), {module.reach})
    torch.manual_seed(7)
    draw, places = new_draw(rate, DEVICE), torch.arange(tokens, device=DEVICE)
    kept = is_kept(draw, torch.arange(heads, device=DEVICE)[:, None, None], places[:, None], places)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(DEVICE)
    keys, values = (x.repeat_interleave(heads // 2, 1) for x in (key, value))
    scores = query @ keys.mT * 0.25
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(owner[:, None] != owner, -torch.inf).softmax(-1) * kept / (1 - rate)
    expected = (weights @ values).transpose(1, 2)
    torch.manual_seed(7)
    kwargs = {"scaling": 0.25, "softcap": softcap, "dropout": rate, "sequences": sequences}
    output, _ = fused_attention(module, query, key, value, None, **kwargs)
    assert relative(output, expected.detach().cpu()) < 2e-3
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    for gradient, of_reference in zip(found, torch.autograd.grad(expected, (query, key, value), upstream), strict=True):
        assert relative(gradient, of_reference.cpu()) < 5e-3


@pytest.mark.parametrize("pooling", ["mean", "last_k"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", [UNPADDED, FUSED])
def test_gradients_are_those_of_a_cpu(backend, compiled, pooling):
    """Of the last layer where it is pooled, and of layers that are compiled by themselves, too."""
    torch._dynamo.reset()
    model = make(GemmaEncoderForSequenceClassification, pooling=pooling).train()
    model(**BATCH, labels=LABELS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.to(DEVICE).set_attn_implementation(backend)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    model(**there(BATCH), labels=LABELS.to(DEVICE)).loss.backward()
    for name, p in model.named_parameters():
        if name in expected and expected[name].norm() > 1e-6:
            assert relative(p.grad, expected[name]) < 1e-2, name


def test_a_step_in_bf16_with_both_dropouts_learns():
    model = (
        make(GemmaEncoderForSequenceClassification, attention_dropout=0.1, feedforward_dropout=0.1).to(DEVICE).train()
    )
    model.set_attn_implementation(FUSED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**there(BATCH), labels=LABELS.to(DEVICE)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@torch.no_grad()
def test_int8_is_that_of_a_cpu():
    model = quantize_int8(make(GemmaEncoderForSequenceClassification))
    expected = model(**BATCH).logits
    assert relative(model.to(DEVICE)(**there(BATCH)).logits, expected) < 1e-2


def test_flash_attention_of_variable_lengths_is_there():
    """On a GPU of today and a torch of today, Gemma 3 in bf16 is not left to flex attention."""
    query = torch.zeros(1, 4, 8, 32, device=DEVICE, dtype=torch.bfloat16)
    assert runs_varlen(query, None, 0.0) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@torch.no_grad()
def test_flash_attention_2_gives_the_same():
    model = make(family="gemma3_text")
    expected = model(**BATCH).last_hidden_state
    model.to(DEVICE).bfloat16().set_attn_implementation("flash_attention_2")
    assert relative(model(**there(BATCH)).last_hidden_state, expected) < 5e-2
