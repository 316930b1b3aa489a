"""Laws of the config: what goes in comes out, what is wrong is refused by name, a raw Gemma becomes a `text_config`."""

import json
from typing import get_args

import pytest
import torch
from helpers import FAMILIES, build, decoder_config, encoder_config, pad, texts
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_gemma_encoder import (
    POOLERS,
    RANKING_LOSSES,
    GemmaEncoderConfig,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

BATCH = pad(texts((6, 3)))

CHOICES = {
    "attention": "causal",
    "attention_window": 7,
    "pooling": "kv_probe",
    "pooling_k": 3,
    "pooling_num_probes": 5,
    "pooling_num_heads": 2,
    "attention_dropout": 0.2,
    "feedforward_dropout": 0.3,
    "classifier_hidden_sizes": [16, 8],
    "classifier_activation": "tanh",
    "classifier_dropout": 0.4,
    "ranking_loss": "lambdarank",
    "list_chunk_size": 4,
    "num_labels": 3,
    "problem_type": "multi_label_classification",
}


@pytest.mark.parametrize("fields", [{}, CHOICES], ids=["defaults", "choices"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dict_and_file_are_fixpoints(family, fields, tmp_path):
    config = encoder_config(family, **fields)
    once = config.to_dict()
    again = GemmaEncoderConfig.from_dict(once)
    assert again.to_dict() == once
    for name, value in fields.items():
        assert getattr(again, name) == value
    config.save_pretrained(tmp_path)
    for loaded in (GemmaEncoderConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GemmaEncoderConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == once  # Auto classes note where it came from
    assert type(again.text_config) is type(decoder_config(family))


def test_choices_are_the_keys_of_what_they_choose():
    hints = GemmaEncoderConfig.__annotations__
    assert set(get_args(hints["pooling"])) == set(POOLERS)
    assert set(get_args(hints["ranking_loss"])) == set(RANKING_LOSSES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_raw_decoder_becomes_the_text_config(family, tmp_path):
    raw = decoder_config(family, dtype="bfloat16")
    raw.save_pretrained(tmp_path)
    config = GemmaEncoderConfig.from_pretrained(tmp_path, pooling="last_k", num_labels=5)
    assert config.model_type == "gemma_encoder" and config.pooling == "last_k" and config.num_labels == 5
    assert config.text_config.to_dict() == {**raw.to_dict(), "architectures": config.text_config.architectures}
    assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_multimodal_decoder_gives_its_text_tower(family, tmp_path):
    text = {"model_type": f"{family}_text", "hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 77}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "text_config": text, "vision_config": {}}))
    config = GemmaEncoderConfig.from_pretrained(tmp_path)
    assert config.text_config.model_type == f"{family}_text"
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 6, 77)


def test_the_labels_of_a_classifier_are_kept(tmp_path):
    decoder_config("gemma2", id2label={0: "no", 1: "maybe", 2: "yes"}).save_pretrained(tmp_path)
    config = GemmaEncoderConfig.from_pretrained(tmp_path)
    assert config.num_labels == 3 and config.id2label[2] == "yes"


@pytest.mark.parametrize("model_type", ["mistral", "bert", "gemma3n", "t5gemma"])
def test_another_family_is_refused_by_name(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=model_type):
        GemmaEncoderConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=model_type):
        GemmaEncoderConfig(text_config={"model_type": model_type})


WRONG = [
    ("attention", "bidirect", "'bidirectional', 'causal'"),
    ("pooling", "max", "'mean', 'first_k', 'last_k', 'query_probe', 'kv_probe'"),
    ("ranking_loss", "hinge", "'softmax'"),
    ("problem_type", "multi", "'regression', 'single_label_classification', 'multi_label_classification'"),
    ("classifier_activation", "gelo", "'gelu'"),
    ("classifier_activation", "prelu", "without parameters of its own"),
    ("attention_window", -1, "-1"),
    ("attention_window", 2.5, "2.5"),
    ("pooling_k", 0, "0"),
    ("list_chunk_size", 0, "0"),
    ("list_chunk_size", True, "True"),
    ("pooling_num_probes", 0, "0"),
    ("pooling_num_heads", 0, "0"),
    ("attention_dropout", 1.0, "1.0"),
    ("attention_dropout", -0.1, "-0.1"),
    ("feedforward_dropout", 1.5, "1.5"),
    ("classifier_dropout", "high", "high"),
    ("classifier_hidden_sizes", [8, 0], "0"),
    ("label_std", [float("inf")], "finite"),
    ("label_mean", ["high"], "high"),
]


@pytest.mark.parametrize(("name", "value", "says"), WRONG)
def test_a_wrong_value_is_refused_wherever_it_enters(name, value, says, tmp_path):
    decoder_config("gemma2").save_pretrained(tmp_path)
    for enter in (
        lambda: encoder_config(**{name: value}),
        lambda: setattr(encoder_config(), name, value),
        lambda: GemmaEncoderConfig.from_pretrained(tmp_path, **{name: value}),
        lambda: GemmaEncoderConfig.from_dict({**encoder_config().to_dict(), name: value}),
    ):
        with pytest.raises(StrictDataclassError) as error:
            enter()
        assert name in str(error.value) and says in str(error.value)


def test_a_classifier_without_classes_is_refused():
    with pytest.raises(StrictDataclassError, match="`num_labels` must be at least 1, got 0"):
        encoder_config(num_labels=0)


def test_poolers_that_cannot_work_are_refused():
    with pytest.raises(StrictDataclassError, match=r"pooling_num_heads.*5.*32"):
        encoder_config(pooling="query_probe", pooling_num_heads=5)
    with pytest.raises(StrictDataclassError, match="pooling_num_probes"):
        encoder_config(pooling="kv_probe", pooling_num_probes=1)


@pytest.mark.parametrize(("misspelt", "meant"), [("poling", "pooling"), ("atention_window", "attention_window")])
def test_a_misspelt_field_is_refused(misspelt, meant, tmp_path):
    decoder_config("gemma2").save_pretrained(tmp_path)
    for enter in (
        lambda: encoder_config(**{misspelt: 1}),
        lambda: GemmaEncoderConfig.from_pretrained(tmp_path, **{misspelt: 1}),
    ):
        with pytest.raises(ValueError, match=f"`{misspelt}`.*`{meant}`"):
            enter()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_rotation_that_depends_on_the_batch_is_refused(family):
    """Gemma 3 has a rotation of its own for each type of layer."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope |= {"factor": 4.0, "original_max_position_embeddings": 16}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="rotates a text by the longest one beside it"):
        encoder_config(family, decoder={"rope_parameters": rope})


def test_fields_assigned_together_are_checked_when_the_model_is_built():
    config = encoder_config(pooling="kv_probe")
    config.pooling_num_probes = 1
    with pytest.raises(ValueError, match="pooling_num_probes"):
        GemmaEncoderModel(config)


@pytest.mark.parametrize("flag", ["is_causal", "use_bidirectional_attention"])
def test_the_decoders_flags_do_not_decide(flag):
    with pytest.raises(ValueError, match=f"`{flag}` does not decide here"):
        encoder_config(**{flag: True})


def test_a_field_the_decoder_does_not_have_is_refused(tmp_path):
    decoder_config("gemma2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`text_config` of gemma2 has no field sliding_windw"):
        GemmaEncoderConfig.from_pretrained(tmp_path, text_config={"sliding_windw": 8})
    assert GemmaEncoderConfig.from_pretrained(tmp_path, text_config={"sliding_window": 8}).sliding_window == 8


def test_it_answers_as_any_config_does():
    config = encoder_config("gemma2", num_labels=4)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers, config.num_attention_heads) == (
        32,
        99,
        4,
        4,
    )
    assert (config.max_position_embeddings, config.pad_token_id, config.num_labels) == (64, 0, 4)
    assert (config.head_dim, config.num_key_value_heads, config.sliding_window, config.use_cache) == (8, 2, 3, True)
    assert not hasattr(encoder_config("gemma4_text"), "head_dim")  # its layers differ
    assert GemmaEncoderConfig(text_config=decoder_config("gemma2"), sliding_window=9).text_config.sliding_window == 9
    config.use_cache = False
    config.pad_token_id = 7
    assert config.text_config.pad_token_id == 7 == config.get_text_config().pad_token_id
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert GemmaEncoderConfig.from_dict(config.to_dict()).sentence_transformers == config.sentence_transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_fields_of_the_decoder_are_the_decoders(family):
    """As upstream's config of these fields is."""
    few = {"num_kv_shared_layers": 0} if family == "gemma4_text" else {}
    config = encoder_config(family, few, num_hidden_layers=2, intermediate_size=40)
    types = {} if family == "gemma" else {"layer_types": ["sliding_attention", "full_attention"]}
    expected = decoder_config(family, num_hidden_layers=2, intermediate_size=40, **few, **types)
    assert config.text_config.to_dict() == expected.to_dict() and config.num_hidden_layers == 2
    model = build(GemmaEncoderForSequenceClassification, config)
    assert len(model.model.layers) == 2 and model(**BATCH).logits.shape == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma4_text"])
def test_a_checkpoint_loads_with_its_first_layers(family, tmp_path):
    """Of Gemma 4 all layers share a matrix, whose shape does not match: an error of upstream's."""
    build(GemmaEncoderForSequenceClassification, encoder_config(family)).save_pretrained(tmp_path)
    loaded = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(loaded.model.layers) == 2 and loaded.config.text_config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"`num_hidden_layers` is 6, and .* has 4"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, num_hidden_layers=6)
    whole = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path)
    states = [model(**BATCH, output_hidden_states=True).hidden_states[1] for model in (loaded.eval(), whole.eval())]
    torch.testing.assert_close(*states)  # the first layer is the first layer
    again = GemmaEncoderConfig.from_dict(json.loads(json.dumps(loaded.config.to_dict())))
    assert again.to_dict() == loaded.config.to_dict()


def test_flat_fields_without_a_decoder_are_those_of_the_default():
    config = GemmaEncoderConfig(num_hidden_layers=3, hidden_size=64)
    expected = AutoConfig.for_model("gemma2", num_hidden_layers=3, hidden_size=64)
    assert config.text_config.to_dict() == expected.to_dict()


def test_more_layers_follow_the_familys_own_pattern():
    config = GemmaEncoderConfig(
        text_config=AutoConfig.for_model("gemma3_text", num_hidden_layers=2), num_hidden_layers=7
    )
    assert config.layer_types == AutoConfig.for_model("gemma3_text", num_hidden_layers=7).layer_types


def test_other_fields_of_the_decoder_are_refused_flat(tmp_path):
    with pytest.raises(ValueError, match=r"`attn_logit_softcapping` is the decoder's: pass text_config=\{'attn"):
        GemmaEncoderConfig(attn_logit_softcapping=None)
    with pytest.raises(ValueError, match="`rope_theta` is the decoder's"):
        GemmaEncoderConfig(rope_theta=1e6)
    config = GemmaEncoderConfig(text_config={"attn_logit_softcapping": None})
    assert config.text_config.attn_logit_softcapping is None


def test_no_classifier_dropout_is_none_or_zero(tmp_path):
    """As in upstream's configs, where None is allowed."""
    model = build(GemmaEncoderForSequenceClassification, encoder_config(classifier_dropout=None))
    assert model.classifier.dropout.p == 0
    model.save_pretrained(tmp_path)
    assert GemmaEncoderConfig.from_pretrained(tmp_path).classifier_dropout is None
    with pytest.raises(StrictDataclassError, match="classifier_dropout"):
        encoder_config(classifier_dropout=1.0)


def test_a_model_says_how_many_tokens_it_has():
    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    assert model.vocab_size == 99
    model.resize_token_embeddings(103)
    assert model.vocab_size == 103


def test_an_unknown_backend_is_named_in_upstreams_words():
    with pytest.raises(ValueError, match='Specified `attn_implementation="warp"` is not supported'):
        GemmaEncoderForSequenceClassification._from_config(encoder_config(), attn_implementation="warp")
