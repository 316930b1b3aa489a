"""Laws of the nano decoder: small, loaded by anyone, and it has read English."""

import json

import pytest
import torch
from helpers import NANO
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

# Written for this test: in no book and no documentation.
SENTENCES = [
    "The old man walked slowly down the street and looked at the windows of the shops.",
    "She had never seen so many people in the house, and she did not know what to say to them.",
    "If the argument is not an array, it is converted to one before the values are computed.",
    "When the rain had stopped, the children ran out into the garden to look for their ball.",
]


@pytest.fixture(scope="module")
def decoder():
    return AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()


def loss(decoder, ids: list[int]) -> float:
    ids = torch.tensor([ids])
    with torch.no_grad():
        return decoder(ids, labels=ids).loss.item()


def test_it_is_small_and_bf16():
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 20e6
    with safe_open(NANO / "model.safetensors", "pt") as weights:
        assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    for name in ("README.md", "results.json", "training_log.json", "training.png", "tokenizer.json", "config.json"):
        assert (NANO / name).exists(), name


def test_it_loads_as_a_language_model_and_as_every_encoder():
    _, info = AutoModelForCausalLM.from_pretrained(NANO, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for model_class, new in (
        (GemmaEncoderModel, set()),
        (GemmaEncoderForMaskedLM, set()),
        (GemmaEncoderForSequenceClassification, {"classifier"}),
        (GemmaEncoderForRanking, {"classifier"}),
    ):
        model, info = model_class.from_pretrained(NANO, output_loading_info=True)
        assert {name.split(".")[0] for name in info["missing_keys"]} == new and not info["unexpected_keys"]
        model.verify_attention()


def test_it_has_read_english(decoder, nano_tokenizer):
    generator = torch.Generator().manual_seed(0)
    for sentence in SENTENCES:
        ids = nano_tokenizer(sentence)["input_ids"]
        words = sentence.split(" ")
        shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=generator))
        assert loss(decoder, ids) + 1 < loss(decoder, nano_tokenizer(shuffled)["input_ids"]), sentence


def test_it_writes_words(decoder, nano_tokenizer):
    inputs = nano_tokenizer("It was a dark and", return_tensors="pt")
    with torch.no_grad():
        written = decoder.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = nano_tokenizer.decode(written[0], skip_special_tokens=True)
    assert text.startswith("It was a dark and") and len(text.split()) > 6


def test_its_results_beat_counting(decoder):
    report = json.loads((NANO / "results.json").read_text())
    assert set(report["perplexity"]) == {"gutenberg", "docstrings"}
    for values in report["perplexity"].values():
        assert values["decoder"] < values["trigram"] / 1.5 and values["trigram"] < values["unigram"]
    assert report["parameters"] == decoder.num_parameters()
    assert AutoTokenizer.from_pretrained(NANO).vocab_size == decoder.config.vocab_size
