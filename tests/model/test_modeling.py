"""Laws of the encoder and its heads: loading any Gemma, exact losses, dropout, and everything a torch model can do."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import FAMILIES, FUSED, OTHERS, UNPADDED, build, decoder_config, encoder_config, pad, set_backend, texts
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
)
from transformers.integrations.neftune import neftune_post_forward_hook

from modeling_gemma_encoder import (
    GemmaEncoderConfig,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
    verify_attention,
)

BATCH = pad(texts((10, 6, 3)))
LISTS = {name: values.view(2, 3, 7) for name, values in pad(texts((7, 5, 4, 6, 3, 2))).items()}


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_any_gemma_checkpoint_loads_and_only_pooler_and_head_are_new(family, tmp_path):
    decoder = AutoModelForCausalLM.from_config(decoder_config(family)).eval()
    decoder.save_pretrained(tmp_path)
    model, info = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path, pooling="query_probe", num_labels=3, attention="causal", output_loading_info=True
    )
    assert model.config.model_type == "gemma_encoder" and model.config.num_labels == 3
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler", "classifier"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in decoder.get_decoder().named_parameters():
        assert torch.equal(parameter, model.model.get_parameter(name)), name
    with torch.no_grad():
        expected = decoder.get_decoder()(BATCH["input_ids"][:1], use_cache=False).last_hidden_state
        encoder = GemmaEncoderModel.from_pretrained(tmp_path, attention="causal").eval()
        states = encoder(BATCH["input_ids"][:1]).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_without_a_language_model_head_loads(tmp_path):
    decoder = AutoModel.from_config(decoder_config("gemma3_text"))
    decoder.save_pretrained(tmp_path)
    model, info = GemmaEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.model.embed_tokens.weight, decoder.embed_tokens.weight)


@pytest.mark.parametrize("tower", ["model.language_model.", "language_model.model."])
def test_the_text_tower_of_a_multimodal_checkpoint_loads(tower, tmp_path):
    """Both spellings: transformers 5 saves the first, the Hub's Gemma 3 repositories hold the second."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = decoder_config("gemma3_text").to_dict()
    config = Gemma3Config(text_config=text, vision_config={"model_type": "siglip_vision_model", **vision})
    multimodal = AutoModelForImageTextToText.from_config(config)
    multimodal.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {
        key.replace("language_model.model.", tower).replace("model.language_model.", tower): value
        for key, value in load_file(path).items()
    }
    assert any(key.startswith(tower) for key in weights) and any("vision_tower" in key for key in weights)
    save_file(weights, path, metadata={"format": "pt"})
    model, info = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
    assert not info["unexpected_keys"]
    for name, parameter in multimodal.model.language_model.named_parameters():
        assert torch.equal(parameter, model.model.get_parameter(name)), name
    model.save_pretrained(tmp_path / "encoder")
    saved = load_file(tmp_path / "encoder" / "model.safetensors")
    assert set(saved) == set(model.state_dict())


def test_the_text_tower_of_gemma_4_loads_with_its_per_layer_embeddings(tmp_path):
    decoder = AutoModel.from_config(decoder_config("gemma4_text"))
    weights = {f"model.language_model.{name}": value.clone() for name, value in decoder.state_dict().items()}
    weights |= {
        "model.vision_tower.encoder.weight": torch.ones(2),
        "model.embed_audio.projection.weight": torch.ones(2),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gemma4", "text_config": decoder_config("gemma4_text").to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = GemmaEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "embed_tokens_per_layer.weight" in decoder.state_dict()
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[name]), name


def test_a_config_alone_makes_a_model(tmp_path):
    config = encoder_config(num_labels=3)
    assert type(AutoModelForSequenceClassification.from_config(config)) is GemmaEncoderForSequenceClassification
    AutoModelForCausalLM.from_config(decoder_config("gemma2")).save_pretrained(tmp_path)
    config = GemmaEncoderConfig.from_pretrained(tmp_path, num_labels=3)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config)
    assert type(model) is GemmaEncoderForSequenceClassification and model.classifier.out_proj.out_features == 3


def test_what_it_is_built_from_is_left_alone():
    decoder = AutoModel.from_config(decoder_config("gemma2"))
    GemmaEncoderModel(GemmaEncoderConfig(text_config=decoder.config))
    decoder(BATCH["input_ids"], use_cache=False)
    config = encoder_config(id2label={0: "no", 1: "yes"})
    assert GemmaEncoderForRanking(config).config.num_labels == 1
    assert config.id2label == {0: "no", 1: "yes"}


def test_keywords_of_from_pretrained_reach_the_layers(tmp_path):
    AutoModelForCausalLM.from_config(decoder_config("gemma2")).save_pretrained(tmp_path)
    model = GemmaEncoderModel.from_pretrained(
        tmp_path, attention_dropout=0.25, feedforward_dropout=0.5, attention="causal", attention_window=2
    )
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.25}
    assert {layer.post_feedforward_layernorm.output_dropout.p for layer in model.model.layers} == {0.5}
    assert {layer.self_attn.reach for layer in model.model.layers} == {(2, 0)}
    model.verify_attention()


# Dropout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["attention_dropout", "feedforward_dropout", "classifier_dropout"])
def test_dropout_is_for_training_only_and_at_each_place(place, family):
    places = {"attention_dropout": 0, "feedforward_dropout": 0, "classifier_dropout": 0}
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family, **{**places, place: 0.5}))
    without = build(GemmaEncoderForSequenceClassification, encoder_config(family, **places)).train()
    with torch.no_grad():
        evaluated = model(**BATCH).logits
        torch.testing.assert_close(model(**BATCH).logits, evaluated)
        torch.testing.assert_close(without(**BATCH).logits, evaluated, atol=1e-5, rtol=1e-5)
        model.train()
        assert not torch.allclose(model(**BATCH).logits, model(**BATCH).logits, atol=1e-3)


@pytest.mark.parametrize("family", (*FAMILIES, *OTHERS))
def test_tools_that_switch_dropout_off_find_all_of_it(family):
    """TRL's `disable_dropout_in_model` and sentence-transformers' tests zero `nn.Dropout` and `attention_dropout`."""
    options = {"attention_dropout": 0.3, "feedforward_dropout": 0.3, "classifier_dropout": 0.3}
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family, **options))
    names = set(model.state_dict())
    with torch.no_grad():
        expected = model(**BATCH).logits
        assert (model.train()(**BATCH).logits - expected).abs().max() > 1e-3
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0
        torch.testing.assert_close(model(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)
    assert not any("dropout" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_feedforward_dropout_drops_what_enters_the_residual(family):
    """What a block adds to the residual stream is zero or scaled by 1 / (1 - p), in the expected share."""
    model = build(GemmaEncoderModel, encoder_config(family, attention_dropout=0, feedforward_dropout=0.25)).train()
    layer = model.model.layers[0]
    block = getattr(layer, "post_feedforward_layernorm", layer.mlp)
    added = []
    block.register_forward_hook(lambda module, args, output: added.append(output))
    with torch.no_grad():
        model(**pad(texts((60,) * 20)))
        model.eval()(**pad(texts((60,) * 20)))
    dropped, whole = added
    kept = dropped != 0
    assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75, atol=1e-4, rtol=1e-4)


def test_attention_dropout_equals_upstreams_under_the_same_random_state():
    """With texts of one length the unpadded attention is upstream's eager attention, dropout included."""
    model = build(GemmaEncoderModel, encoder_config("gemma2", attention_dropout=0.3, feedforward_dropout=0)).train()
    batch = pad(texts((8, 8)))
    states = []
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        torch.manual_seed(1)
        states.append(model(**batch).last_hidden_state)
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


# Heads


def test_several_labels_a_text_are_said_when_the_model_is_loaded():
    """Or pipelines and `probabilities` would take a saved model's logits for one class of several."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma2", num_labels=3))
    with pytest.raises(ValueError, match='load the model with problem_type="multi_label_classification"'):
        model(**BATCH, labels=torch.ones(3, 3))


def test_a_ranker_made_of_a_classifier_is_saved_and_loaded(tmp_path):
    fields = {"num_labels": 2, "problem_type": "single_label_classification", "calibration_temperature": 2.0}
    ranker = build(GemmaEncoderForRanking, encoder_config("gemma2", **fields))
    ranker.save_pretrained(tmp_path)
    again = GemmaEncoderForRanking.from_pretrained(tmp_path)
    assert (again.config.num_labels, again.config.problem_type) == (1, None)
    assert again.config.calibration_temperature is None
    torch.testing.assert_close(again(**BATCH).logits, ranker(**BATCH).logits)


@pytest.mark.parametrize("implementation", [UNPADDED, "eager"])
def test_noise_on_embeddings_is_that_of_rows(implementation):
    """NEFTune's is scaled by the length of a row; an unpadded batch would be one long row."""
    config = encoder_config("gemma2", attention_dropout=0.0, feedforward_dropout=0.0)
    model = build(GemmaEncoderModel, config).train()
    set_backend(model, implementation)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    if implementation == "eager":
        model(**BATCH)
        return
    with pytest.raises(ValueError, match='attn_implementation="eager", or no `neftune_noise_alpha`'):
        model(**BATCH)


def test_single_label_multi_label_and_regression_losses_equal_torch():
    def outputs(labels, **fields):
        model = build(GemmaEncoderForSequenceClassification, encoder_config(**fields))
        result = model(**BATCH, labels=labels)
        assert result.logits.dtype == torch.float32 and model.config.problem_type == fields.get("problem_type")
        return result.loss, result.logits

    labels = torch.tensor([2, 0, 1])
    loss, logits = outputs(labels, num_labels=3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    labels[1] = -100
    loss, logits = outputs(labels, num_labels=3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    loss, logits = outputs(labels, num_labels=3, problem_type="multi_label_classification")
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels))
    loss, logits = outputs(labels, num_labels=3, problem_type="regression")
    torch.testing.assert_close(loss, F.mse_loss(logits, labels))
    labels = torch.tensor([0.5, 4.0, -1.0])
    loss, logits = outputs(labels, num_labels=1)
    torch.testing.assert_close(loss, F.mse_loss(logits[:, 0], labels))


def test_a_standardized_regression_is_the_plain_one_in_other_units(tmp_path):
    """Logits are those of the same weights, times the deviation, plus the mean; the loss and every gradient are those
    of the plain model on labels that were standardized by hand."""
    scale = {"label_mean": [5000.0, -3.0], "label_std": [200.0, 0.5]}
    fields = {"num_labels": 2, "problem_type": "regression"}
    plain = build(GemmaEncoderForSequenceClassification, encoder_config(**fields))
    model = build(GemmaEncoderForSequenceClassification, encoder_config(**fields, **scale))
    mean, std = torch.tensor(scale["label_mean"]), torch.tensor(scale["label_std"])
    labels = torch.tensor([[5100.0, -2.5], [4000.0, -3.0], [-100, -100]])
    by_hand = torch.tensor([[0.5, 1.0], [-5.0, 0.0], [-100, -100]])
    expected, found = plain(**BATCH, labels=by_hand), model(**BATCH, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits * std + mean)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**BATCH).logits, found.logits)
    assert GemmaEncoderForRanking(model.config).config.label_std is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_mean": [1.0, 2.0]}, "`label_mean` and `label_std` go together"),
        ({"label_mean": [1.0], "label_std": [1.0]}, "a number for each of the 2 labels"),
        ({"label_mean": [1.0, 2.0], "label_std": [1.0, 0.0]}, "`label_std` must be above 0"),
        (
            {"label_mean": [1.0, 2.0], "label_std": [1.0, 1.0], "problem_type": "single_label_classification"},
            "are of a regression, not of 'single_label_classification'",
        ),
    ],
)
def test_a_scale_that_fits_no_regression_is_refused(fields, says):
    with pytest.raises(StrictDataclassError, match=says):
        encoder_config(num_labels=2, **fields)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_ignored_labels_give_zero_loss_and_zero_gradient(problem_type):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(num_labels=2, problem_type=problem_type))
    labels = torch.full((3,) if problem_type.startswith("single") else (3, 2), -100)
    loss = model(**BATCH, labels=labels).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_no_items_at_all_is_zero_loss():
    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    assert model(**BATCH, labels=torch.full((3,), -100), num_items_in_batch=0).loss == 0


def test_a_batch_of_nothing_but_padding_runs_as_any_other():
    """Shapes, hidden states and a (zero) gradient for every parameter, as collectives across devices need."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config(pooling="query_probe"))
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        model.zero_grad()
        nothing = torch.zeros_like(BATCH["attention_mask"])
        outputs = model(
            BATCH["input_ids"],
            attention_mask=nothing,
            labels=torch.full((3,), -100),
            output_hidden_states=True,
            output_attentions=True,
        )
        outputs.loss.backward()
        assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
        assert all(states.shape == (3, 10, 32) and states.abs().max() == 0 for states in outputs.hidden_states)
        assert all(weights.shape == (3, 4, 10, 10) and weights.abs().max() == 0 for weights in outputs.attentions)
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.grad.abs().max() == 0 for parameter in model.model.parameters())


def test_the_task_mlp_is_what_the_config_says():
    config = encoder_config(classifier_hidden_sizes=[16, 8], classifier_activation="tanh", num_labels=3)
    model = build(GemmaEncoderForSequenceClassification, config)
    pooled, head = torch.randn(4, 32), model.classifier
    states = F.rms_norm(pooled, (32,), head.norm.weight, eps=1e-6)
    for layer in head.layers:
        states = torch.tanh(layer(states))
    assert [layer.out_features for layer in head.layers] == [16, 8]
    torch.testing.assert_close(head(pooled), head.out_proj(states))
    assert not build(GemmaEncoderForSequenceClassification, encoder_config()).classifier.layers


def test_large_final_states_do_not_blow_up_a_fresh_head():
    model = GemmaEncoderForSequenceClassification(encoder_config(num_labels=3)).eval()
    model.model.norm.weight.data.fill_(200)
    assert model(**BATCH).logits.abs().max() < 5


def test_a_list_scores_as_its_documents_do_alone():
    model = build(GemmaEncoderForRanking, encoder_config())
    flat = {name: values.flatten(0, 1) for name, values in LISTS.items()}
    with torch.no_grad():
        lists, alone = model(**LISTS).logits, model(**flat).logits
        assert lists.shape == (2, 3) and alone.shape == (6, 1) and lists.dtype == torch.float32
        torch.testing.assert_close(lists.flatten(), alone[:, 0])
        embeds = model.get_input_embeddings()(LISTS["input_ids"])
        torch.testing.assert_close(
            model(inputs_embeds=embeds, attention_mask=LISTS["attention_mask"]).logits, lists, atol=1e-5, rtol=1e-5
        )
        states = model(**LISTS, output_hidden_states=True).hidden_states
    assert states[-1].shape == (2, 3, 7, 32)


def test_ranking_loss_is_listwise_and_ragged_lists_do_not_matter():
    model = build(GemmaEncoderForRanking, encoder_config())
    labels = torch.tensor([[0, 1, 0], [2, 0, 0]])
    outputs = model(**LISTS, labels=labels)
    expected = F.cross_entropy(outputs.logits, labels / labels.sum(-1, keepdim=True))  # grades as shares
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()

    model.zero_grad()
    ragged = {name: F.pad(values, (0, 0, 0, 2)) for name, values in LISTS.items()}  # two documents that are not there
    padded = model(**ragged, labels=F.pad(labels, (0, 2), value=-100))
    padded.loss.backward()
    assert padded.logits.isfinite().all()
    torch.testing.assert_close(padded.loss, outputs.loss)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient, atol=1e-5, rtol=1e-4)


# Everything a torch model can do


def loss_and_gradient(model):
    model.zero_grad()
    loss = model(**BATCH, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    """Dropout is on: the recomputation must see the same random state."""
    if family == "gemma4_text" and use_reentrant:
        model = GemmaEncoderModel(encoder_config(family))
        with pytest.raises(ValueError, match="use_reentrant"):  # layers share keys and values past the checkpoint
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):  # as PEFT asks for it; torch's default is reentrant
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={})
        return
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family)).train()
    torch.manual_seed(0)
    loss, gradients = loss_and_gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    torch.manual_seed(0)
    again, recomputed = loss_and_gradient(model)
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_embeddings_can_be_given(family):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family))
    embeds = model.get_input_embeddings()(BATCH["input_ids"])
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        with torch.no_grad():
            given = model(inputs_embeds=embeds, attention_mask=BATCH["attention_mask"]).logits
            torch.testing.assert_close(given, model(**BATCH).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_can_grow(family, tmp_path):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family))
    with torch.no_grad():
        before = model(**BATCH).logits
        model.resize_token_embeddings(110)
        assert model.config.vocab_size == 110 == model.config.text_config.vocab_size
        torch.testing.assert_close(model(**BATCH).logits, before)
        assert model(torch.full((1, 4), 109)).logits.isfinite().all()
        model.save_pretrained(tmp_path)
        loaded = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**BATCH).logits, before, atol=1e-6, rtol=1e-6)


def test_deepcopy_and_pickle_are_whole():
    model = build(GemmaEncoderForSequenceClassification, encoder_config(feedforward_dropout=0.5))
    with torch.no_grad():
        expected = model(**BATCH).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(**BATCH).logits, expected)
            twin.train()
            assert not torch.allclose(twin(**BATCH).logits, twin(**BATCH).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_keeps_the_head_in_fp32(family, tmp_path):
    build(GemmaEncoderForSequenceClassification, encoder_config(family, num_labels=3)).save_pretrained(tmp_path)
    full = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
    half = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.classifier.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = full(**BATCH).logits
        for logits in (half(**BATCH).logits, full.bfloat16()(**BATCH).logits):
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, atol=0.3, rtol=0.1)


def test_a_fresh_head_on_a_bf16_decoder_is_fp32_and_stays_the_same_when_reloaded(tmp_path):
    AutoModelForCausalLM.from_config(decoder_config("gemma2"), dtype=torch.bfloat16).save_pretrained(tmp_path / "gemma")
    config = {"pooling": "query_probe", "num_labels": 3, "classifier_hidden_sizes": [16]}
    model = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "gemma", **config).eval()
    assert model.dtype == torch.bfloat16 == model.pooler.query.weight.dtype
    assert {parameter.dtype for parameter in model.classifier.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "encoder")
    loaded = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, model(**BATCH).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "kv_probe"])
def test_an_adapter_leaves_pooler_and_head_to_modules_to_save(pooling, tmp_path):
    decoder, adapter = tmp_path / "gemma", tmp_path / "adapter"
    AutoModelForCausalLM.from_config(decoder_config("gemma2")).save_pretrained(decoder)
    model = GemmaEncoderForSequenceClassification.from_pretrained(decoder, pooling=pooling)
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["classifier", "pooler"] if pooling == "kv_probe" else ["classifier"],
    )
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
            assert "self_attn" in name or "modules_to_save" in name, name
    verify_attention(model)
    model.save_pretrained(adapter)
    again = GemmaEncoderForSequenceClassification.from_pretrained(decoder, pooling=pooling)
    again = PeftModel.from_pretrained(again, adapter).eval()
    with torch.no_grad():
        expected = model(**BATCH).logits
        torch.testing.assert_close(again(**BATCH).logits, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(again.merge_and_unload()(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "query_probe", "kv_probe"])
def test_autocast_trains_with_fp32_scores(pooling):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(pooling=pooling)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**BATCH, labels=torch.tensor([0, 1, 1]))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.float32 and outputs.loss.isfinite()


@pytest.mark.parametrize("backend", [UNPADDED, "eager"])
def test_compiled_is_the_same(backend):
    torch._dynamo.reset()
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma2"))
    set_backend(model, backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=backend == "eager")
    with torch.no_grad():
        for lengths in ((10, 6, 3), (4, 8)):
            batch = pad(texts(lengths))
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_compiled_layers_are_the_same_and_soon_compiled_for_all_lengths():
    """With fused attention: a few graphs for the first batches, and then no more."""
    torch._dynamo.reset()
    shape = {"max_position_embeddings": 512}
    model = build(GemmaEncoderForSequenceClassification, encoder_config(decoder=shape, pooling="last_k"))
    model.set_attn_implementation(FUSED)
    first = [(5, 3, 9), (300, 10), (4,), (400, 280, 150, 70, 5)]
    batches = [pad(texts(lengths)) for lengths in [*first, (7, 7), (350, 9), (11,), (410, 300, 160, 80, 7, 6), (2, 90)]]
    compiled, graphs = CompileCounter(), []
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        for layer in model.model.layers:
            layer.compile(backend=compiled, dynamic=True)
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
            graphs.append(compiled.frame_count)
    assert graphs[0] > 0 and graphs[len(first) - 1 :] == [graphs[-1]] * (len(batches) - len(first) + 1)
    assert graphs[-1] - graphs[0] <= 4


def test_the_padded_path_exports():
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma2"))
    set_backend(model, "eager")
    batch_size, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    shapes = {name: {0: batch_size, 1: length} for name in BATCH}
    program = torch.export.export(model, (), dict(BATCH), dynamic_shapes=shapes)
    other = pad(texts((5, 9, 2, 7)))
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["fullgraph", "export", "strict export"])
def test_whole_graphs_of_the_unpadded_path_name_the_backend_that_has_them(way):
    """Its shapes depend on the data."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma2"))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r'set_attn_implementation\("eager"\)'):
        if way == "fullgraph":
            torch.compile(model, fullgraph=True, backend="eager")(**BATCH)
        else:
            torch.export.export(model, (), dict(BATCH), strict=way == "strict export")


def test_a_device_map_places_it(tmp_path):
    model = build(GemmaEncoderForSequenceClassification, encoder_config("gemma2"))
    model.save_pretrained(tmp_path)
    placed = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, device_map={"": "cpu"})
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{number}" for number in range(4))]
    parts = [*(f"model.{part}" for part in parts), "pooler", "classifier"]
    offloaded = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path,
        device_map=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with torch.no_grad():
        for loaded in (placed, offloaded):
            torch.testing.assert_close(loaded(**BATCH).logits, model(**BATCH).logits, atol=1e-6, rtol=1e-6)
        verify_attention(offloaded)
    assert model._no_split_modules == {"GemmaEncoderHead", "Gemma2DecoderLayer"}


def test_tuples_are_returned_when_asked():
    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    outputs = model(**BATCH, labels=torch.tensor([0, 1, 1]), return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == 2


def test_a_batch_of_nothing_but_padding_has_finite_gradients():
    model = build(GemmaEncoderForSequenceClassification, encoder_config(pooling="last_k"))
    nothing = {name: torch.zeros_like(values) for name, values in BATCH.items()}
    model(**nothing, labels=torch.full((3,), -100)).logits.sum().backward()
    assert torch.isfinite(model.model.layers[-1].mlp.up_proj.weight.grad).all()


def test_threads_can_share_a_model():
    model = build(GemmaEncoderForSequenceClassification, encoder_config(pooling="last_k"))
    batches = [pad(texts(lengths, seed)) for seed, lengths in enumerate([(9, 3), (5,), (12, 12, 2), (1, 7)] * 8)]

    @torch.no_grad()
    def score(batch):
        return model(**batch).logits

    alone = [score(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(score, batches), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
