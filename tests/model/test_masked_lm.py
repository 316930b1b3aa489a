"""Laws of up-training: tokens are predicted by the decoder's own head, at the place where they belong."""

import pytest
import torch
from helpers import FAMILIES, FAMILY_BACKENDS, build, decoder_config, encoder_config, pad, set_backend, texts
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

from modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

OBJECTIVES = ("mlm", "mntp")
SEQUENCES = texts((10, 6, 3))
BATCH = pad(SEQUENCES)


def masked_labels(batch, every: int = 3) -> torch.Tensor:
    places = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"]) % every == 1
    return batch["input_ids"].where(places & batch["attention_mask"].bool(), -100)


def test_an_embedding_that_is_the_head_is_not_offloaded(tmp_path):
    build(GemmaEncoderForMaskedLM, encoder_config("gemma2")).save_pretrained(tmp_path)
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = GemmaEncoderForMaskedLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match='`device_map` has it on "disk"'):
        model(**BATCH)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_upstreams_causal_language_model(family, tmp_path):
    decoder = AutoModelForCausalLM.from_config(decoder_config(family)).eval()
    decoder.save_pretrained(tmp_path)
    options = {"attention": "causal", "output_loading_info": True}
    for objective in OBJECTIVES:
        model, info = GemmaEncoderForMaskedLM.from_pretrained(tmp_path, masked_lm_objective=objective, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            expected = decoder(SEQUENCES[0][None], use_cache=False).logits[0]
            logits = model.eval()(**BATCH).logits[0]
        if objective == "mntp":  # there, the next token's prediction
            logits, expected = logits[1:], expected[:-1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_logits_are_upstreams_without_its_mask(family, tmp_path):
    decoder = AutoModelForCausalLM.from_config(decoder_config(family, is_causal=False)).eval()
    decoder.save_pretrained(tmp_path)
    model = GemmaEncoderForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = decoder(SEQUENCES[1][None], use_cache=False).logits[0]
        torch.testing.assert_close(model(**BATCH).logits[1, :6], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_cross_entropy_of_the_labelled_tokens(objective):
    model = build(GemmaEncoderForMaskedLM, encoder_config(masked_lm_objective=objective))
    labels = masked_labels(BATCH)
    labels[1, 0] = 7  # a first token
    with torch.no_grad():
        outputs, logits = model(**BATCH, labels=labels), model(**BATCH).logits
    assert outputs.logits is None and logits.shape == (3, 10, 99)
    if objective == "mntp":
        assert not logits[:, 0].any()
        labels[:, 0] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, expected)


# Flex attention is compiled for each family, which takes long; the encoder's own laws have it in all of them.
CASES = [case for case in FAMILY_BACKENDS if case[1] != "flex_attention" or case[0] == "gemma2"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_padding_never_changes_a_prediction(family, backend, objective):
    model = build(GemmaEncoderForMaskedLM, encoder_config(family, masked_lm_objective=objective))
    with torch.no_grad():
        reference = model(**BATCH)["logits"]
        loss = model(**BATCH, labels=masked_labels(BATCH)).loss
        set_backend(model, backend)
        for side in ("left", "right"):
            batch = pad(SEQUENCES, side=side, extra=2, pad_id=50)
            logits = model(**batch).logits
            assert not logits[~batch["attention_mask"].bool()].any()
            mask = batch["attention_mask"].bool()
            torch.testing.assert_close(logits[mask], reference[BATCH["attention_mask"].bool()], atol=1e-4, rtol=1e-4)
            labels = torch.full_like(batch["input_ids"], -100)
            labels[mask] = masked_labels(BATCH)[BATCH["attention_mask"].bool()]
            labels[~mask] = 5  # of padding: ignored
            torch.testing.assert_close(model(**batch, labels=labels).loss, loss, atol=1e-5, rtol=1e-5)


def test_accumulation_never_changes_a_gradient():
    model = build(GemmaEncoderForMaskedLM, encoder_config(masked_lm_objective="mntp"))
    labels = masked_labels(BATCH)
    labels[:, 0] = -100  # a first token is never predicted, and the Trainer would count it
    number = (labels != -100).sum()
    model(**BATCH, labels=labels).loss.backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    for row in range(3):
        part = {name: values[row : row + 1] for name, values in BATCH.items()}
        model(**part, labels=labels[row : row + 1], num_items_in_batch=number).loss.backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_a_batch_without_labels_trains_nothing():
    model = build(GemmaEncoderForMaskedLM, encoder_config())
    loss = model(**BATCH, labels=torch.full_like(BATCH["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0 and not model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_up_trained_checkpoint_loads_into_every_head_without_remarks(objective, tmp_path):
    config = encoder_config(masked_lm_objective=objective, pooling="query_probe")
    model = build(GemmaEncoderForMaskedLM, config)
    model.save_pretrained(tmp_path)
    news = {
        GemmaEncoderModel: {"pooler"},
        GemmaEncoderForSequenceClassification: {"pooler", "classifier"},
        GemmaEncoderForRanking: {"pooler", "classifier"},
        GemmaEncoderForMaskedLM: set(),
    }
    for model_class, new in news.items():
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert {name.split(".")[0] for name in info["missing_keys"]} == new
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
    classifier = build(GemmaEncoderForSequenceClassification, config)
    classifier.save_pretrained(tmp_path / "classifier")
    _, info = GemmaEncoderForMaskedLM.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_new_tokens_can_be_predicted():
    model = build(GemmaEncoderForMaskedLM, encoder_config())
    model.resize_token_embeddings(105)
    assert model(**BATCH).logits.shape == (3, 10, 105)


def test_the_fill_mask_pipeline_runs(nano_tokenizer, tmp_path):
    vocab_size = len(nano_tokenizer)
    for objective in OBJECTIVES:
        config = encoder_config(decoder={"vocab_size": vocab_size}, masked_lm_objective=objective)
        build(GemmaEncoderForMaskedLM, config).save_pretrained(tmp_path / objective)
        nano_tokenizer.save_pretrained(tmp_path / objective)
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / objective)
        fill = pipeline("fill-mask", model=model, tokenizer=nano_tokenizer, device="cpu")
        best = fill("The <mask> shines.", top_k=1)[0]
        inputs = nano_tokenizer("The <mask> shines.", return_tensors="pt")
        place = inputs["input_ids"][0].tolist().index(nano_tokenizer.mask_token_id)
        with torch.no_grad():
            probability, token = model(**inputs).logits[0, place].softmax(-1).max(-1)
        assert best["token"] == token.item() and best["score"] == pytest.approx(probability.item(), abs=1e-5)


def test_bad_input_is_named():
    model = build(GemmaEncoderForMaskedLM, encoder_config())
    with pytest.raises(ValueError, match=r"`labels` has shape \(3,\)"):
        model(**BATCH, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(StrictDataclassError, match="masked_lm_objective"):
        encoder_config(masked_lm_objective="clm")
    labels = torch.full_like(BATCH["input_ids"], -100)
    labels[0, 2] = 99
    with pytest.raises(ValueError, match="`labels` has tokens from"):
        model(**BATCH, labels=labels)
