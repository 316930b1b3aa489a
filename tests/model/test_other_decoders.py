"""Llama and Qwen behind the same classes: Gemma's laws, held of them. Qwen 2 has biases, and here sliding layers."""

import json
import sys
from functools import partial

import pytest
import test_attention as of_attention
import test_configuration as of_configuration
import test_int8 as of_int8
import test_masked_lm as of_masked_lm
import test_modeling as of_models
import test_saving as of_saving
import torch
import uptrain
from helpers import ATTENTIONS, FUSED, NANO, OTHERS, ROOT, UNPADDED, decoder_config, encoder_config, texts
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder import (
    POOLERS,
    GemmaEncoderConfig,
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

BACKENDS = (UNPADDED, FUSED, "eager", "sdpa")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", OTHERS)
def test_states_gradients_and_scores(family, attention):
    for backend in BACKENDS:
        of_attention.test_states_equal_upstream(family, backend, attention)
        for pooling in POOLERS:
            of_attention.test_company_never_changes_the_score(family, backend, attention, pooling)
    of_attention.test_gradients_equal_upstream(family, attention)
    of_attention.test_attention_is_verified_by_behaviour(family, attention)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", OTHERS)
def test_reach(family, attention):
    for window in (None, 2):
        of_attention.test_flash_attentions_arguments_mean_the_same(family, attention, window)
        of_attention.test_windows_reach_exactly(family, "full_attention", attention, window)
        if family == "qwen2":
            of_attention.test_windows_reach_exactly(family, "sliding_attention", attention, window)


@pytest.mark.parametrize("family", OTHERS)
def test_dropout_and_checkpointing(family):
    for place in ("attention_dropout", "feedforward_dropout", "classifier_dropout"):
        of_models.test_dropout_is_for_training_only_and_at_each_place(place, family)
    of_models.test_feedforward_dropout_drops_what_enters_the_residual(family)
    for use_reentrant in (True, False):
        of_models.test_gradient_checkpointing_changes_nothing(family, use_reentrant)


@pytest.mark.parametrize("family", OTHERS)
def test_loading_and_saving(family, tmp_path):
    places = iter(tmp_path / str(number) for number in range(9))
    of_configuration.test_dict_and_file_are_fixpoints(family, of_configuration.CHOICES, next(places))
    of_models.test_any_gemma_checkpoint_loads_and_only_pooler_and_head_are_new(family, next(places))
    of_models.test_the_vocabulary_can_grow(family, next(places))
    of_models.test_bf16_keeps_the_head_in_fp32(family, next(places))
    of_int8.test_an_int8_checkpoint_is_saved_and_reloaded(family, next(places))
    for model_class in (GemmaEncoderForSequenceClassification, GemmaEncoderForRanking):
        of_saving.test_a_checkpoint_holds_everything(model_class, family, "query_probe", next(places))


@pytest.mark.parametrize("family", OTHERS)
def test_fresh_weights_are_upstreams_own_kind(family):
    """Llama's and Qwen's norms multiply by their weight, and start at one, where Gemma's start at zero."""
    decoder = GemmaEncoderForSequenceClassification(encoder_config(family)).model
    norms = [value for name, value in decoder.named_parameters() if "norm" in name]
    assert norms and all(torch.equal(value, torch.ones_like(value)) for value in norms)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", OTHERS)
def test_masked_language_models(family, tied, tmp_path, monkeypatch):
    """With a tied embedding, as Llama 3.2 1B and the small Qwens have it, and with a matrix of their own."""
    monkeypatch.setattr(of_masked_lm, "decoder_config", partial(decoder_config, tie_word_embeddings=tied))
    of_masked_lm.test_logits_are_those_of_upstreams_causal_language_model(family, tmp_path / "causal")
    of_masked_lm.test_bidirectional_logits_are_upstreams_without_its_mask(family, tmp_path / "bidirectional")
    model = GemmaEncoderForMaskedLM.from_pretrained(tmp_path / "causal", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "saved")
    again, info = GemmaEncoderForMaskedLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and again.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(**of_masked_lm.BATCH).logits, model(**of_masked_lm.BATCH).logits, atol=1e-6, rtol=1e-6
        )
    again.requires_grad_(False).resize_token_embeddings(120)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        grown = again(**of_masked_lm.BATCH).logits
        assert grown.shape[-1] == 120
        torch.testing.assert_close(grown[..., :99], model(**of_masked_lm.BATCH).logits, atol=1e-6, rtol=1e-6)
    _, info = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"} and not info["unexpected_keys"]


def test_a_head_that_was_lost_is_an_error_and_one_with_an_adapter_trains(tmp_path):
    config = encoder_config("llama", {"tie_word_embeddings": False})
    GemmaEncoderForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no lm_head"):
        GemmaEncoderForMaskedLM.from_pretrained(tmp_path)
    model = get_peft_model(GemmaEncoderForMaskedLM(config), LoraConfig(target_modules=["q_proj", "lm_head"]))
    model(**of_masked_lm.BATCH, labels=of_masked_lm.masked_labels(of_masked_lm.BATCH)).loss.backward()
    assert all(value.grad.any() for name, value in model.named_parameters() if "lm_head.lora_B" in name)


@pytest.mark.parametrize(("family", "tied", "lacks"), [("llama", False, {"pad_token"}), ("qwen3", True, {"bos_token"})])
def test_up_training(family, tied, lacks, tmp_path, monkeypatch):
    """Its script, with a tokenizer that has no mask, and no padding or no start, as theirs."""
    source, out = tmp_path / "decoder", tmp_path / "encoder"
    config = decoder_config(family, vocab_size=8192, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    for name in {"mask_token", *lacks}:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    flags = ["--model", source, "--text", text, "--validation_text", text, "--output_dir", out, "--block_size", 32]
    flags += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--mask_token", "<unk>", "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["uptrain.py", *map(str, flags)])
    uptrain.main()
    _, info = GemmaEncoderForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"} and not info["unexpected_keys"]
    saved = AutoTokenizer.from_pretrained(out)
    assert saved.mask_token is None and all(getattr(saved, name) is None for name in lacks)


# As such files are on the Hub: rotary embeddings in the words of older versions, several ends, no padding.
OLD_FILES = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": [128001, 128008],
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 4,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "max_window_layers": 4,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    },
}
SHAPE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize("family", OTHERS)
def test_files_of_older_versions_are_read_as_upstream_reads_them(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SHAPE, **OLD_FILES[family]}))
    expected = AutoConfig.from_pretrained(tmp_path)
    decoder = AutoModelForCausalLM.from_config(expected, dtype=torch.float32).eval()
    save_file(decoder.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = GemmaEncoderConfig.from_pretrained(tmp_path).text_config
    read, of_upstream = config.to_dict(), expected.to_dict()
    assert {name: read[name] for name in ("rope_parameters", "eos_token_id", "pad_token_id")} == {
        name: of_upstream[name] for name in ("rope_parameters", "eos_token_id", "pad_token_id")
    }
    encoder = GemmaEncoderModel.from_pretrained(tmp_path, attention="causal", dtype=torch.float32).eval()
    ids = texts((40,))[0][None]
    with torch.no_grad():
        states = decoder.get_decoder()(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(encoder(ids).last_hidden_state, states, atol=1e-5, rtol=1e-5)
