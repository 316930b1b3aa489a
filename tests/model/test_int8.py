"""Laws of int8 weights: exact products of what was rounded, saved and reloaded as they are, and never trained."""

import json

import numpy as np
import pytest
import torch
from helpers import FAMILIES, build, encoder_config, pad, texts
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderModel, quantize_int8, verify_attention
from modeling_gemma_encoder.quantization_gemma_encoder import ROWS, Int8Linear
from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs

BATCH = pad(texts((10, 6, 3)))


def scores(model, batch=BATCH) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_what_int8_can_hold_is_multiplied_exactly():
    """By hand: rows that are multiples of their largest value's 127th lose nothing. 2 x (127, 1) . 0.5 x (-3, 127) is
    127 * -3 + 127 = -254 in integers, times 2 and 0.5; the other row, 0.25 x (127, 0), gives 127 * 127 * 2 * 0.25."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[-1.5, 63.5], [31.75, 0.0]])
    output = Int8Linear.of(linear)(torch.tensor([[254.0, 2.0]]))
    torch.testing.assert_close(output, torch.tensor([[-254.0, 127 * 127 * 2 * 0.25]]))
    assert torch.equal(Int8Linear.of(linear)(torch.zeros(1, 2)), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_rounded_values(dtype):
    """In float64, of values rounded by an independent rule; the error of rounding is what half a step allows."""
    linear = nn.Linear(96, 40, bias=False)
    states = torch.randn(3, ROWS // 2, 96).to(dtype)  # more rows than are taken at a time
    rows = states.double().reshape(-1, 96).numpy()
    weight = linear.weight.detach().double().numpy()
    steps, of_weight = (np.abs(x).max(1, keepdims=True) / 127 for x in (rows, weight))
    expected = (np.rint(rows / steps) * steps) @ (np.rint(weight / of_weight) * of_weight).T
    with torch.no_grad():
        output = Int8Linear.of(linear)(states)
    assert output.dtype == dtype and output.shape == (3, ROWS // 2, 40)
    close = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]  # a value between two steps may go either way
    np.testing.assert_allclose(output.float().reshape(-1, 40).numpy(), expected, atol=close)
    bound = (steps / 2) * np.abs(weight).sum(1) + np.abs(rows).sum(1, keepdims=True) * of_weight.T / 2
    assert (np.abs(expected - rows @ weight.T) <= bound + steps * of_weight.T / 4 * 96).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_checkpoint_is_saved_and_reloaded(family, tmp_path):
    model = build(GemmaEncoderForRanking, encoder_config(family))
    whole = scores(model)
    assert quantize_int8(model) is model
    rounded = scores(model)
    assert 0 < (rounded - whole).abs().max() < 0.5 * whole.std()
    verify_attention(model)
    model.save_pretrained(tmp_path)
    again = GemmaEncoderForRanking.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(scores(again), rounded, atol=1e-6, rtol=0)
    in_bf16 = GemmaEncoderForRanking.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    layer = in_bf16.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert in_bf16.classifier.out_proj.weight.dtype == torch.float32
    assert in_bf16.get_input_embeddings().weight.dtype == torch.bfloat16
    assert (scores(in_bf16) - rounded).abs().max() < 0.5 * whole.std()


def test_company_hardly_changes_an_int8_score():
    """A token is rounded by itself. Rounding can tip a value that lies between two steps, so scores are equal to a
    hundredth of their spread, not to the last digits as elsewhere."""
    model = quantize_int8(build(GemmaEncoderForRanking, encoder_config("gemma2")))
    many = texts((10, 6, 3, 9, 12, 4, 7, 8))
    alone = torch.cat([scores(model, pad([ids])) for ids in many])
    together = scores(model, pad(many, "left", extra=3))
    assert (together - alone).abs().max() < 0.01 * alone.std()


def test_int8_weights_are_not_trained_or_made_by_accident(tmp_path):
    model = build(GemmaEncoderForRanking, encoder_config("gemma2"))
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="weight_scale"):
        GemmaEncoderForRanking.from_pretrained(tmp_path / "plain", int8_weights=True)
    quantize_int8(model)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model(**BATCH)
    with pytest.raises(ValueError, match="Int8Linear already"):
        quantize_int8(model)
    model.save_pretrained(tmp_path / "int8")
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["int8_weights"] is True
    with pytest.raises(ValueError, match="does not have"):
        GemmaEncoderForRanking.from_pretrained(tmp_path / "int8", int8_weights=False)
    with pytest.raises(ValueError, match="must be a Gemma Encoder, got Linear"):
        quantize_int8(nn.Linear(2, 2))
    adapted = build(GemmaEncoderModel, encoder_config("gemma2"))
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)
    with pytest.raises(ValueError, match="Merge adapters"):
        quantize_int8(adapted)


def test_a_ranker_is_loaded_in_int8(decoder, nano_tokenizer, tmp_path):
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).save_pretrained(tmp_path)
    nano_tokenizer.save_pretrained(tmp_path)
    pairs = [("rain", "It rains."), ("sun", "A star, and a long text about it."), ("fog", "")]
    model, tokenizer = load_ranker(str(tmp_path), "int8", "cpu")
    assert model.config.int8_weights and not model.training
    found = score_pairs(model, tokenizer, pairs, max_length=32)
    quantize_int8(GemmaEncoderForRanking.from_pretrained(tmp_path, dtype=torch.float32)).save_pretrained(tmp_path / "8")
    nano_tokenizer.save_pretrained(tmp_path / "8")
    again, tokenizer = load_ranker(str(tmp_path / "8"), "int8", "cpu")
    np.testing.assert_allclose(score_pairs(again, tokenizer, pairs, max_length=32), found, atol=0.05 * found.std())
