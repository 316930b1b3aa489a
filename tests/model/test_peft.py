"""Laws of PEFT used by itself: what it saves comes back as it was, and what it cannot save is refused by name."""

import copy
import re

import pytest
import torch
from helpers import NANO, pad, texts
from peft import (
    AutoPeftModelForSequenceClassification,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShadowConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification, GemmaEncoderModel
from modeling_gemma_encoder.adapters import add_lora, merge

LORA = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "down_proj"]}
BATCH = {**pad(texts((7, 3))), "labels": torch.tensor([0, 1])}
PROBES = ("query_probe", "kv_probe")


def classifier(pooling: str = "mean", folder=NANO):
    return GemmaEncoderForSequenceClassification.from_pretrained(folder, pooling=pooling, dtype=torch.float32)


def train(model):
    """A few steps that move everything that is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model.train()(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**BATCH).logits


@pytest.mark.parametrize("pooling", PROBES)
def test_a_new_pooler_that_an_adapter_would_lose_is_refused(pooling, tmp_path):
    """PEFT trains and saves the head by default, and leaves a pooler as it was drawn."""
    model = get_peft_model(classifier(pooling), LoraConfig(**LORA))
    expected = re.escape("modules_to_save=['pooler', 'classifier']")
    with pytest.raises(ValueError, match=f"`pooler` are not in the checkpoint.*add_lora.*{expected}"):
        model.train()(**BATCH)
    with pytest.raises(ValueError, match="`pooler` are not in"):
        model.save_pretrained(tmp_path)


def test_a_new_head_that_an_adapter_would_lose_is_refused():
    """Without a task PEFT knows of no head at all."""
    model = get_peft_model(classifier(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`classifier` are not in"):
        model.train()(**BATCH)


@pytest.mark.parametrize("pooling", ["mean", *PROBES])
def test_what_is_trained_comes_back_to_the_same_scores(pooling, tmp_path):
    model = classifier(pooling)
    base = copy.deepcopy(model.state_dict())
    model = train(get_peft_model(model, LoraConfig(**LORA, modules_to_save=["classifier", "pooler"])))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # a head and a pooler drawn anew
    again = PeftModel.from_pretrained(classifier(pooling), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    again = classifier(pooling)
    again.load_state_dict(base)
    assert (logits(again.eval()) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("pooling", PROBES)
def test_a_pooler_of_the_checkpoint_may_stay_as_it_is(pooling, tmp_path):
    train(classifier(pooling)).save_pretrained(tmp_path / "base")
    model = train(get_peft_model(classifier(pooling, tmp_path / "base"), LoraConfig(**LORA)))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(classifier(pooling, tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


def test_a_head_that_is_frozen_on_purpose_is_saved_with_its_model(tmp_path):
    """Without PEFT nothing is lost."""
    model = classifier("query_probe")
    model.pooler.requires_grad_(False)
    train(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(classifier("query_probe", tmp_path)), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification])
def test_a_folder_of_peft_alone_never_loads_on_the_stock_causal_class(load, tmp_path):
    train(get_peft_model(classifier(), LoraConfig(**LORA))).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        load.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without an encoder's config\.json.*PeftModel\.from_pretrained"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)


def test_a_head_without_a_task_is_refused_before_its_folder_could_load_as_causal(tmp_path):
    """PEFT keeps the stock head out by the guard, which only its sequence classifiers save."""
    alone = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    model = train(get_peft_model(classifier(), alone))
    with pytest.raises(ValueError, match=r'task_type="SEQ_CLS".*merge_and_unload'):
        model.save_pretrained(tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=0)


def test_a_copy_of_an_adapted_model_is_guarded_and_loads_as_it(tmp_path):
    model = train(get_peft_model(classifier(), LoraConfig(**LORA)))
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    again.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_folder_without_the_guard_still_loads(tmp_path):
    """PEFT's own, of earlier versions of these classes."""
    model = train(get_peft_model(classifier(), LoraConfig(**LORA)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    assert weights.pop("base_model.model.score.weight").shape == (0,)
    save_file(weights, path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification])
def test_an_adapter_over_a_saved_encoder_loads_by_the_auto_classes(load, tmp_path):
    """Its base names our class."""
    train(classifier("query_probe")).save_pretrained(tmp_path / "base")
    model = train(get_peft_model(classifier("query_probe", tmp_path / "base"), LoraConfig(**LORA)))
    model.save_pretrained(tmp_path / "adapter")
    again = load.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


def test_sizes_of_ones_own_make_new_weights_too(tmp_path):
    train(classifier("kv_probe")).save_pretrained(tmp_path)
    other = {"pooling_num_probes": 4, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    model = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, **other)
    with pytest.raises(ValueError, match="`pooler` are not in"):
        get_peft_model(model, LoraConfig(**LORA)).train()(**BATCH)


@pytest.mark.parametrize("source", ["checkpoint", "config"])
def test_the_bare_encoder_is_held_to_the_same(source, tmp_path):
    model = GemmaEncoderModel.from_pretrained(NANO, pooling="kv_probe")
    if source == "config":
        model = GemmaEncoderModel(model.config)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    batch = {name: values for name, values in BATCH.items() if name != "labels"}
    with pytest.raises(ValueError, match="`pooler` are not in"):
        model.train()(**batch)
    with pytest.raises(ValueError, match="`pooler` are not in"):
        model.save_pretrained(tmp_path)


def test_a_head_that_is_trained_by_hand_may_be_merged(tmp_path):
    model = get_peft_model(classifier(), LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.classifier.requires_grad_(True)
    expected = logits(train(model))
    model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(classifier("mean", tmp_path)), expected, atol=1e-5, rtol=0)


def test_state_dicts_of_merged_models_are_those_of_any_other():
    merged = train(get_peft_model(classifier(), LoraConfig(**LORA))).merge_and_unload()
    again = classifier()
    again.load_state_dict(merged.state_dict())
    torch.testing.assert_close(logits(again.eval()), logits(merged))
    merged.load_state_dict(again.state_dict())


def test_a_cross_encoder_over_an_adapter_says_to_merge_first(tmp_path):
    """And scores as the adapter does when it is merged."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    add_lora(GemmaEncoderForRanking.from_pretrained(NANO)).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(adapter)
    with pytest.raises(ValueError, match="`trust_remote_code=True`"):
        CrossEncoder(str(adapter), device="cpu")
    with pytest.raises(ValueError, match="Merge it first, with `modeling_gemma_encoder"):
        CrossEncoder(str(adapter), device="cpu", trust_remote_code=True)
    merge(adapter, merged)
    encoder = CrossEncoder(str(merged), device="cpu", model_kwargs={"dtype": torch.float32}, trust_remote_code=True)
    batch = encoder.tokenizer([("a cat", "purrs")], return_tensors="pt")
    expected = GemmaEncoderForRanking.from_pretrained(adapter, dtype=torch.float32)(**batch).logits
    assert encoder.predict([("a cat", "purrs")]).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    "method",
    [HRAConfig, IA3Config, LNTuningConfig, OFTConfig, VeraConfig],
)
def test_other_methods_adapt_the_layers_that_peft_has_them_adapt_in_gemma_2(method, tmp_path):
    """Without `target_modules`; and what they train comes back."""
    stock = AutoModelForSequenceClassification.from_config(classifier().config.text_config)
    model, stock = (get_peft_model(base, method(task_type="SEQ_CLS")) for base in (classifier(), stock))
    layers, of_stock = (
        {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
        for adapted in (model, stock)
    )
    assert layers == of_stock
    before = logits(model.eval())
    train(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert (logits(again) - before).abs().max() > 0.01


def test_a_merged_model_is_saved_as_any_other(tmp_path):
    model = train(get_peft_model(classifier(), LoraConfig(**LORA))).merge_and_unload()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved, safe_open(NANO / "model.safetensors", "pt") as base:
        head = {"classifier.norm.weight", "classifier.out_proj.weight", "classifier.out_proj.bias"}
        assert set(saved.keys()) == {*base.keys()} - {"lm_head.weight"} | head
    torch.testing.assert_close(logits(classifier("mean", tmp_path)), logits(model), atol=1e-6, rtol=0)


def test_prompt_tuning_runs_and_prefix_tuning_is_refused_by_name():
    prompted = get_peft_model(classifier(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert logits(prompted).isfinite().all()
    with pytest.raises(ValueError, match="prefix tuning"):
        get_peft_model(classifier(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))(**BATCH)


@pytest.mark.parametrize("backend", ["gemma_encoder_unpadded", "eager"])
def test_shadow_peft_is_refused_by_name(backend):
    model = classifier()
    model.set_attn_implementation(backend)
    model = get_peft_model(model, ShadowConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="ShadowPEFT"):
        model(**BATCH)
