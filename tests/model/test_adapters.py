"""Adapters: trained with the head, saved with the encoder's options, reloaded to the same scores or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import NANO
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import (
    GemmaEncoderConfig,
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    verify_attention,
)
from modeling_gemma_encoder.adapters import TARGET_MODULES, add_lora, four_bit, merge

HEADS = {
    "classifier": (GemmaEncoderForSequenceClassification, {"num_labels": 3, "pooling": "kv_probe"}),
    "causal": (GemmaEncoderForSequenceClassification, {"num_labels": 3, "attention": "causal", "pooling": "last_k"}),
    "ranker": (GemmaEncoderForRanking, {"attention_window": 5, "pooling": "first_k"}),
}


def inputs():
    ids = torch.randint(5, 8000, (4, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def disturb(model):
    """As if trained: everything trainable moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def adapted(name: str = "classifier", dtype=torch.float32, **options):
    model_class, fields = HEADS[name]
    return disturb(add_lora(model_class.from_pretrained(NANO, dtype=dtype, **{**fields, **options})))


@torch.no_grad()
def scores(model) -> torch.Tensor:
    return model(**inputs()).logits


def test_every_linear_layer_the_head_and_a_pooler_with_parameters_are_trained():
    trained = {name for name, parameter in adapted().named_parameters() if parameter.requires_grad}
    for target in TARGET_MODULES:
        assert any(f".{target}.lora_A." in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)
    assert any("pooler.modules_to_save" in name for name in trained)
    assert not any("base_layer" in name or "embed_tokens" in name for name in trained)


def test_peft_knows_which_layers_of_a_gemma_encoder_to_adapt():
    model = GemmaEncoderForSequenceClassification.from_pretrained(NANO, dtype=torch.float32)
    names = {name for name, _ in get_peft_model(model, LoraConfig(task_type="SEQ_CLS")).named_parameters()}
    for target in TARGET_MODULES:
        assert any(f".{target}.lora_A." in name for name in names)


@pytest.mark.parametrize("name", HEADS)
def test_one_call_reloads_an_adapter_to_the_same_scores(name, tmp_path):
    model = adapted(name)
    expected = scores(model)
    model.save_pretrained(tmp_path)
    again = HEADS[name][0].from_pretrained(tmp_path)
    assert type(again) is HEADS[name][0]
    for option in ("attention", "attention_window", "pooling"):
        assert getattr(again.config, option) == getattr(model.config, option)
    verify_attention(again)
    torch.testing.assert_close(scores(again), expected, atol=1e-6, rtol=0)
    through_auto = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(scores(through_auto), expected, atol=1e-6, rtol=0)


def test_a_process_without_this_package_reloads_an_adapter_too(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    code = """
import json, sys, torch
sys.modules["modeling_gemma_encoder"] = None
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps(model(**{name: torch.tensor(v) for name, v in json.loads(sys.argv[2]).items()}).logits.tolist()))
"""
    batch = json.dumps({name: values.tolist() for name, values in inputs().items()})
    command = [sys.executable, "-c", code, str(tmp_path), batch]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ}).stdout
    found = torch.tensor(json.loads(printed.splitlines()[-1]))
    torch.testing.assert_close(found, scores(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "query_probe", "kv_probe"])
def test_all_that_is_trained_over_a_bf16_decoder_is_in_fp32(pooling):
    """In bf16 a small step changes nothing: all that is trained must move, and does."""
    model = GemmaEncoderForSequenceClassification.from_pretrained(NANO, dtype=torch.bfloat16, pooling=pooling)
    trained = {name: value for name, value in add_lora(model).named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    for _ in range(2):  # after the first, B of an adapter is not zero, and A has a gradient
        model(**inputs(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    assert all((value != before[name]).float().mean() > 0.5 for name, value in trained.items())


def test_adapters_over_a_bf16_decoder_keep_their_own_precision(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    adapter = {name: parameter for name, parameter in again.named_parameters() if "lora_" in name}
    assert {parameter.dtype for parameter in adapter.values()} == {torch.float32}
    torch.testing.assert_close(scores(again), scores(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_adapter_is_merged_in_one_call(name, nano_tokenizer, tmp_path):
    model = adapted(name)
    expected = scores(model)
    model.save_pretrained(tmp_path / "adapter")
    nano_tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text('{"model": "google/gemma-2-2b"}')
    (tmp_path / "adapter" / "held-out").mkdir()
    (tmp_path / "adapter" / "held-out" / "results.json").write_text('{"means": {}}')
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    assert type(merged) is HEADS[name][0]
    for file in ("run.json", "held-out/results.json"):  # for a card
        assert (tmp_path / "merged" / file).read_text() == (tmp_path / "adapter" / file).read_text()
    torch.testing.assert_close(scores(merged.eval()), expected, atol=1e-5, rtol=0)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(scores(again), expected, atol=1e-5, rtol=0)
    text = "It rains."
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"] == nano_tokenizer(text)["input_ids"]
    small = merge(tmp_path / "adapter", tmp_path / "small", dtype=torch.bfloat16)
    assert small.dtype == torch.bfloat16 and small.classifier.out_proj.weight.dtype == torch.float32
    torch.testing.assert_close(scores(small.eval()), expected, atol=0.1, rtol=0)


def test_an_adapter_that_was_loaded_trains_on_and_is_saved_whole(tmp_path):
    """All that was trained is trained again; what plain `save_pretrained` writes is ours, for AutoModel too."""
    adapted().save_pretrained(tmp_path / "first")
    model = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "first")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lora_" in name for name in trained} == {True, False}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    before = scores(model.eval())
    disturb(model).save_pretrained(tmp_path / "second")
    assert not torch.allclose(scores(model), before)
    for load in (GemmaEncoderForSequenceClassification, AutoModelForSequenceClassification):
        again = load.from_pretrained(tmp_path / "second")
        assert type(again) is GemmaEncoderForSequenceClassification
        torch.testing.assert_close(scores(again.eval()), scores(model), atol=1e-6, rtol=0)


def test_a_folder_is_a_model_or_an_adapter(tmp_path):
    """Upstream would put the adapter on the whole weights, which may be merged with it already."""
    model = adapted()
    model.save_pretrained(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a whole model and an adapter"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)


def test_a_resized_decoder_is_saved_before_it_is_adapted(tmp_path):
    model = GemmaEncoderForSequenceClassification.from_pretrained(NANO, dtype=torch.float32)
    model.resize_token_embeddings(8200)
    with pytest.raises(ValueError, match=r"has 8200 tokens and .* has 8192"):
        add_lora(model)
    model.save_pretrained(tmp_path / "resized")
    model = disturb(add_lora(GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "resized")))
    model.save_pretrained(tmp_path / "adapter")
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(scores(again), scores(model), atol=1e-6, rtol=0)


def test_a_card_stays_when_an_adapter_is_saved_beside_it(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n\n# Mine\n")
    adapted().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# Mine" in card and "license: gemma" in card


def test_a_base_that_is_not_where_it_was_is_named(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "runs/elsewhere"}))
    with pytest.raises(OSError, match="is an adapter over runs/elsewhere, which cannot be read from here"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)


def test_what_is_no_adapter_of_ours_is_not_merged(tmp_path):
    with pytest.raises(ValueError, match="is no adapter"):
        merge(NANO, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter: write the merged model elsewhere"):
        merge(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises((ValueError, OSError)):  # there is no tokenizer
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_changes_no_score(tmp_path):
    model = adapted()
    expected = scores(model)
    model.save_pretrained(tmp_path)
    config = GemmaEncoderConfig.from_pretrained(tmp_path)
    base = GemmaEncoderForSequenceClassification.from_pretrained(NANO, config=config, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    assert type(merged) is GemmaEncoderForSequenceClassification
    torch.testing.assert_close(scores(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(again), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", [{"attention": "causal"}, {"attention_window": 3}, {"pooling": "mean"}])
def test_other_options_than_an_adapter_was_trained_with_are_refused(option, tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"was trained with {next(iter(option))}="):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, **option)


def test_the_decoder_of_an_adapter_cannot_be_changed(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter over a decoder, whose `num_hidden_layers`"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, num_hidden_layers=2)


def test_options_that_shape_nothing_may_differ(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, feedforward_dropout=0.0)
    assert model.config.feedforward_dropout == 0.0


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification])
def test_an_adapter_is_refused_where_it_would_load_as_causal(load, tmp_path):
    """On the Hub transformers never reads the config beside an adapter: as in a folder without one."""
    adapted().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        load.from_pretrained(tmp_path)


def test_an_adapter_without_an_encoders_config_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"without an encoder's config.json"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["classifier", "pooler"])
def test_an_adapter_that_lost_its_head_is_refused(lost, tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if f".{lost}." not in name}, path)
    with pytest.raises(ValueError, match=f"lacks the weights of .*{lost}"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)


def test_loading_info_and_subfolders_are_those_of_upstream(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "run" / "adapter")
    again, info = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path / "run", subfolder="adapter", output_loading_info=True
    )
    assert not info["missing_keys"]
    torch.testing.assert_close(scores(again), scores(model), atol=1e-6, rtol=0)


def test_adapters_of_other_names_are_guarded_too(tmp_path):
    model = adapted()
    expected = scores(model)
    model.add_adapter("other", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "config.json").exists()
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(scores(again), expected, atol=1e-6, rtol=0)


def test_nothing_is_pickled(tmp_path):
    with pytest.raises(ValueError, match="pickled weights"):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_an_adapter_over_an_adapter_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(GemmaEncoderForSequenceClassification.from_pretrained(tmp_path))


def test_a_model_without_a_head_is_not_adapted():
    with pytest.raises(ValueError, match="has no head to train"):
        add_lora(GemmaEncoderForMaskedLM.from_pretrained(NANO))


def test_layers_that_are_not_there_are_refused():
    model = GemmaEncoderForSequenceClassification.from_pretrained(NANO)
    with pytest.raises(ValueError, match="no layers named query_proj"):
        add_lora(model, target_modules=["q_proj", "query_proj"])


class TestFourBit:
    """QLoRA (arXiv 2305.14314), where bitsandbytes runs."""

    @pytest.fixture(autouse=True)
    def _needs_bitsandbytes(self):
        pytest.importorskip("bitsandbytes")

    def test_the_decoder_is_quantised_and_head_and_pooler_are_not(self):
        model_class, fields = HEADS["classifier"]
        model = model_class.from_pretrained(NANO, quantization_config=four_bit(), **fields)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        assert {kind for name, kind in kinds.items() if name.endswith("_proj") and "layers." in name} == {"Linear4bit"}
        assert "Linear4bit" not in {kind for name, kind in kinds.items() if name.startswith(("pooler", "classifier"))}
        assert {parameter.dtype for parameter in model.classifier.parameters()} == {torch.float32}

    def test_adapters_over_it_train_and_reload(self, nano_tokenizer, tmp_path):
        model_class, fields = HEADS["classifier"]
        base = model_class.from_pretrained(NANO, quantization_config=four_bit(), dtype=torch.float32, **fields)
        model = add_lora(base).train()
        model(**inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        model.zero_grad()
        disturb(model)
        model.save_pretrained(tmp_path)
        again = model_class.from_pretrained(tmp_path)
        assert type(again.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
        for name, parameter in again.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, model.get_parameter(f"base_model.model.{name}"))
        nano_tokenizer.save_pretrained(tmp_path)
        merged = merge(tmp_path, tmp_path / "merged")
        assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
        saved = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert "quantization_config" not in {*saved, *saved["text_config"]}
        assert torch.corrcoef(torch.stack([scores(merged.eval()).flatten(), scores(model).flatten()]))[0, 1] > 0.98
        # bitsandbytes multiplies in bf16 and chooses its kernel by itself on a CPU: equal to bf16's rounding
        torch.testing.assert_close(scores(again), scores(model), atol=2e-2, rtol=0)
