"""Laws of bf16: on a processor without instructions for it nobody waits in it without having been told."""

import logging

import pytest
import torch
from conftest import build, encoder_config, pad, texts
from transformers import TrainingArguments

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.adapters import four_bit
from modeling_gemma_encoder.finetuning import FineTuningArguments
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16
from modeling_gemma_encoder.ranking import choose
from modeling_gemma_encoder.recipes import RecipeParser, ScriptParser

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


@pytest.mark.parametrize("parser_class", [ScriptParser, RecipeParser])
def test_training_is_in_fp32_where_bf16_is_slow_and_says_so(processor, parser_class, tmp_path):
    flags = [
        "--model",
        "x",
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
