"""Laws of bf16: on a processor without instructions for it nobody waits in it without having been told."""

import logging
from functools import partial

import pytest
import torch
from helpers import build, encoder_config, pad, texts
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, TrainingArguments, pipeline

from modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)
from modeling_gemma_encoder._scripts.command_line import ScriptParser, YamlScriptParser
from modeling_gemma_encoder.adapters import four_bit
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16
from modeling_gemma_encoder.ranking.scoring import choose

BATCH = pad(texts((5, 3)))
AVX2, AVX512 = {"avx2": True}, {"avx2": True, "avx512_bf16": True}


@pytest.fixture
def processor(monkeypatch, caplog):
    """Sets what the processor can, in this process without an accelerator, and hears what is said once."""
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    def can(capabilities: dict):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        return caplog

    return can


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({}, False), (AVX2, False), (AVX512, True), ({"amx_bf16": True}, True), ({"neon": True, "bf16": True}, True)],
)
def test_a_processor_computes_in_bf16_where_it_has_instructions_for_it(processor, capabilities, fast):
    processor(capabilities)
    assert computes_in_bf16("cpu") is fast
    assert choose("auto", "cpu")[0] == ("bfloat16" if fast else "float32")
    assert four_bit().bnb_4bit_compute_dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("parser_class", [ScriptParser, YamlScriptParser])
def test_training_is_in_fp32_where_bf16_is_slow_and_says_so(processor, parser_class, tmp_path):
    flags = [
        "--model",
        "me/x",
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "--dtype",
        "bfloat16",
        "--lora_r",
        "2",
        "--use_cpu",
    ]

    def parse(*more):
        parser = parser_class((FineTuningArguments, TrainingArguments), "")
        options, args = parser.parse_args_into_dataclasses([*flags, *more])
        return options.dtype, args.bf16

    said = processor(AVX2)
    assert parse() == ("float32", False)
    assert "--bf16: this processor has no bf16 instructions" in said.text and "--force_bf16 insists" in said.text
    assert parse("--force_bf16") == ("bfloat16", True)
    processor(AVX512)
    assert parse() == ("bfloat16", True)


@torch.no_grad()
def test_a_bf16_model_says_once_what_to_pass(processor):
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text"))
    said = processor(AVX2)
    model(**BATCH)
    assert not said.text
    model.bfloat16()(**BATCH)
    model(**BATCH)
    assert said.text.count("pass dtype=torch.float32") == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(**BATCH)
    assert said.text.count("train with bf16=False") == 1


@torch.no_grad()
def test_nothing_is_said_where_bf16_is_fast(processor):
    said = processor(AVX512)
    build(GemmaEncoderForSequenceClassification, encoder_config("gemma3_text")).bfloat16()(**BATCH)
    assert "bf16" not in said.text


def test_bf16_that_is_asked_for_is_given_with_a_warning(processor):
    said = processor(AVX2)
    assert choose("bfloat16", "cpu") == ("bfloat16", "cpu")
    assert "many times slower" in said.text


def overflowing(model_class):
    """A model whose states are beyond fp16's 65504 and within bf16 and fp32, as those of Gemma 3 are."""
    model = build(model_class, encoder_config("gemma3_text"))
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    return model


@torch.no_grad()
@pytest.mark.parametrize("model_class", [GemmaEncoderForSequenceClassification, GemmaEncoderForRanking])
@pytest.mark.parametrize("training", [False, True])
def test_fp16_that_is_too_short_is_an_error_that_names_bf16(model_class, training):
    model = overflowing(model_class).train(training)
    assert model(**BATCH).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"`logits`.*float16 ends at 65504.*torch\.bfloat16.*bf16=True"):
        model.half()(**BATCH)


@torch.no_grad()
def test_fp16_by_autocast_is_refused_alike():
    model = overflowing(GemmaEncoderForSequenceClassification)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**BATCH).logits.isfinite().all()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"`logits`.*float16"):
        model(**BATCH)


@torch.no_grad()
def test_vectors_and_states_that_are_not_finite_are_errors():
    with pytest.raises(ValueError, match=r"`pooler_output`.*float16"):
        overflowing(GemmaEncoderModel).half()(**BATCH)
    model = overflowing(GemmaEncoderForMaskedLM).half()
    for labels in ({}, {"labels": BATCH["input_ids"]}):
        with pytest.raises(ValueError, match=r"`last_hidden_state`.*float16"):
            model(**BATCH, **labels)


@torch.no_grad()
def test_an_embedding_on_disk_is_no_matter(decoder, tmp_path):
    """Its weight is gone again after its turn, and with it the device."""
    model = GemmaEncoderForSequenceClassification.from_pretrained(decoder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "pooler", "classifier"), "cpu")
    offloaded = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path / "saved", device_map={"model.embed_tokens": "disk", **places}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(offloaded(**BATCH).logits, model(**BATCH).logits)


def test_fp16_is_left_alone_where_it_holds_the_states():
    """Of Llama and Qwen, and of a Gemma whose states are small."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config("llama"))
    expected = model(**BATCH).logits
    torch.testing.assert_close(model.half()(**BATCH).logits, expected, atol=0.05, rtol=0)


def test_weights_that_training_ruined_are_named_when_scoring():
    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    model.classifier.out_proj.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"`logits` .*weights in float32.*diverge"):
        model(**BATCH)
    assert model.train()(**BATCH, labels=torch.tensor([0, 1])).loss.isnan()  # the Trainer counts and reports these


@pytest.mark.parametrize("tool", ["pipeline", "CrossEncoder"])
def test_no_tool_returns_a_score_that_is_no_number(tool, decoder, tmp_path):
    model_class = GemmaEncoderForRanking if tool == "CrossEncoder" else GemmaEncoderForSequenceClassification
    model = model_class.from_pretrained(decoder, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e6
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path)
    if tool == "CrossEncoder":
        encoder = CrossEncoder(str(tmp_path), trust_remote_code=True, model_kwargs={"dtype": torch.float16})
        score = partial(encoder.predict, [("rain", "It rains.")])
    else:
        classify = pipeline("text-classification", str(tmp_path), trust_remote_code=True, dtype=torch.float16)
        score = partial(classify, "It rains.")
    with pytest.raises(ValueError, match=r"`logits`.*float16"):
        score()
