"""Laws of bad input: an error names the argument and the value, or the behaviour is finite and the others untouched."""

import pytest
import torch
from helpers import UNPADDED, build, decoder_config, encoder_config, pad, set_backend, texts
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, modeling_utils, pipeline

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification, GemmaEncoderModel

BATCH = pad(texts((10, 6, 3)))
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]


@pytest.fixture(scope="module")
def model():
    return build(GemmaEncoderForSequenceClassification, encoder_config(num_labels=3))


@pytest.fixture(scope="module")
def ranker():
    return build(GemmaEncoderForRanking, encoder_config())


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 10, 32)}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": IDS[0]}, r"`input_ids` must have shape \(batch, seq_len\), got \(10,\)"),
        ({"inputs_embeds": torch.zeros(3, 10, 31)}, r"`inputs_embeds` must have shape \(batch, seq_len, 32\)"),
        ({"input_ids": IDS[:0]}, r"`input_ids` is empty: its shape is \(0, 10\)"),
        ({"input_ids": IDS[:, :0]}, r"`input_ids` is empty: its shape is \(3, 0\)"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :9]},
            r"`attention_mask` has shape \(3, 9\); it must be \(3, 10\)",
        ),
        ({"input_ids": IDS, "attention_mask": MASK[0]}, r"`attention_mask` has shape \(10,\)"),
        ({"input_ids": IDS.clone().fill_(99)}, r"`input_ids` has ids from 99 to 99.*99 tokens"),
        ({"input_ids": IDS.clone().fill_(-1)}, r"`input_ids` has ids from -1"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, r"65 tokens.*`max_position_embeddings` \(64\)"),
        ({"input_ids": IDS, "attention_mask": (1.0 - MASK.float()) * -1e9}, "`attention_mask` has negative values"),
        ({"input_ids": IDS.float()}, r"`input_ids` must be integers, got torch.float32"),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1])}, r"`labels` of shape \(2,\).*\(3, 3\)"),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1, 3])}, r"`labels` has classes from 0 to 3.*3"),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1, -1])}, r"`labels` has classes from -1"),
        ({"input_ids": IDS, "labels": torch.zeros(3, 2)}, r"`labels` of shape \(3, 2\)"),
    ],
)
@pytest.mark.parametrize("backend", [UNPADDED, "eager"])
def test_malformed_inputs_are_named(model, backend, inputs, says):
    set_backend(model, backend)
    with pytest.raises(ValueError, match=says):
        model(**inputs)


def test_a_misspelt_keyword_is_refused(model, tmp_path):
    with pytest.raises(TypeError, match="atention_mask"):
        model(IDS, atention_mask=MASK)
    model.save_pretrained(tmp_path)
    for model_class in (GemmaEncoderModel, GemmaEncoderForSequenceClassification, GemmaEncoderForRanking):
        with pytest.raises(TypeError, match=r"does not know window.*fields of GemmaEncoderConfig"):
            model_class.from_pretrained(tmp_path, window=3, num_labels=1)


def test_lists_are_not_tensors(model):
    with pytest.raises(TypeError, match="`input_ids` must be a tensor, got list"):
        model(IDS.tolist())
    with pytest.raises(TypeError, match="unpack it"):
        model(BATCH)
    with pytest.raises(TypeError, match="`labels` must be a tensor"):
        model(IDS, labels=[0, 1, 2])
    with pytest.raises(TypeError, match="`labels` must be a tensor"):
        build(GemmaEncoderForRanking, encoder_config())(IDS.view(1, 3, 10), labels=[[0, 1, 2]])


def test_padding_without_a_mask_is_warned_of(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", lambda text, *args: warnings.append(text))
    model(IDS)
    assert any("attention_mask" in text for text in warnings)


@pytest.mark.parametrize("pooling", ["mean", "first_k", "last_k", "query_probe", "kv_probe"])
@pytest.mark.parametrize("backend", [UNPADDED, "eager", "sdpa"])
def test_a_row_of_padding_is_finite_and_leaves_the_others_alone(backend, pooling):
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text", pooling=pooling)).train()
    model.eval()
    set_backend(model, backend)
    mask = MASK.clone()
    mask[1] = 0
    outputs = model(IDS, attention_mask=mask, labels=torch.tensor([0, -100, 1]))
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        expected = model(**pad([texts((10, 6, 3))[0], texts((10, 6, 3))[2]])).logits
        torch.testing.assert_close(outputs.logits[[0, 2]], expected, atol=2e-5, rtol=1e-5)
        nothing = {"attention_mask": torch.zeros_like(MASK[:1]), "labels": torch.tensor([-100])}
        nothing = model(IDS[:1], **nothing).logits
    torch.testing.assert_close(outputs.logits[1:2], nothing)
    assert nothing.isfinite().all()


def test_padding_ids_may_be_anything(model):
    set_backend(model, UNPADDED)
    with torch.no_grad():
        expected = model(**BATCH).logits
        for backend in (UNPADDED, "eager"):
            set_backend(model, backend)
            for pad_id in (-100, 99, 10**6):
                logits = model(IDS.masked_fill(MASK == 0, pad_id), attention_mask=MASK).logits
                torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_long_padding_is_not_a_long_text(model):
    set_backend(model, UNPADDED)
    with torch.no_grad():
        long = model(**pad(texts((10, 6, 3)), "left", extra=90)).logits
        torch.testing.assert_close(long, model(**BATCH).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [
        ((1, 3, 10), torch.zeros(1, 2), r"`labels` of shape \(1, 2\).*\(1, 3\)"),
        ((1, 3, 10), torch.zeros(3), r"`labels` of shape \(3,\)"),
        ((1, 3, 10), torch.zeros(3, 1), r"`labels` of shape \(3, 1\)"),
        ((3, 10), torch.zeros(2, 2), r"`labels` of shape \(2, 2\)"),
        ((3, 10), torch.zeros(3), r"`labels` of shape \(3,\)"),
        ((3, 10), torch.zeros(3, 1), r"`labels` of shape \(3, 1\)"),
    ],
)
def test_lists_that_do_not_match_their_labels_are_named(ranker, shape, labels, says):
    with pytest.raises(ValueError, match=says):
        ranker(IDS.view(shape), labels=labels)


def test_a_ranking_mask_of_the_wrong_shape_is_named(ranker):
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 2, 10\)"):
        ranker(IDS.view(1, 3, 10), attention_mask=MASK.view(1, 3, 10)[:, :2])


def test_a_ranker_has_one_score_a_document():
    with pytest.raises(ValueError, match="`num_labels` must be 1 for ranking"):
        GemmaEncoderForRanking(encoder_config(num_labels=5))


def test_attentions_are_refused_where_they_do_not_exist():
    model = build(GemmaEncoderModel, encoder_config("gemma3_text"))
    set_backend(model, "sdpa")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**BATCH, output_attentions=True)


def test_an_unknown_backend_is_refused_and_the_old_one_stays():
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    for backend in ("sdpa", "fast"):
        with pytest.raises(ValueError, match=backend if backend == "fast" else "soft-cap"):
            model.set_attn_implementation(backend)
        assert model.config._attn_implementation == UNPADDED == model.model.config._attn_implementation
        model(**BATCH)


def test_a_decoders_config_is_no_encoders():
    with pytest.raises(ValueError, match=r"model_type='gemma2'.*GemmaEncoderConfig\(text_config=config\)"):
        GemmaEncoderForSequenceClassification(decoder_config("gemma2"))


@torch.no_grad()
@pytest.mark.parametrize("backend", [UNPADDED, "eager"])
def test_a_text_without_tokens_is_named_by_its_row(model, ranker, backend):
    """Of padding alone it would have the score of no text at all; with labels it may fill a batch, as -100 says."""
    mask = MASK.clone()
    mask[1:] = 0
    for encoder in (model, ranker):
        set_backend(encoder, backend)
        with pytest.raises(ValueError, match=r"`attention_mask` has no token in row 1, 2 of the batch.*`bos_token`"):
            encoder(IDS, attention_mask=mask)
    assert model(IDS, attention_mask=mask, labels=torch.tensor([0, -100, -100])).loss.isfinite()
    for training in (True, False):
        with pytest.raises(ValueError, match=r"no token in row 2 of the batch.*-100"):
            model.train(training)(IDS, attention_mask=mask, labels=torch.tensor([0, -100, 1]))
    lists = {"input_ids": IDS[None], "attention_mask": mask[None]}  # short lists are filled with documents of none
    assert ranker(**lists).logits.isfinite().all()


def test_tools_name_a_text_without_tokens(decoder, tmp_path):
    model = GemmaEncoderForSequenceClassification.from_pretrained(decoder, num_labels=1)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_bos_token = False  # as of Qwen
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", str(tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"`input_ids` is empty.*none of an empty text"):
        classify(["rain", ""])
    encoder = CrossEncoder(str(tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match="no token in row 1"):
        encoder.predict([("rain", "sun"), ("", "")])
