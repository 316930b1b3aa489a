"""The configuration of a Gemma Encoder: a Gemma decoder's own config, and the choices that make it
an encoder.

Gemma Encoder (arXiv 2503.02656) = decoder weights + bidirectional attention + pooler + task layers
+ dropout. `text_config` is the decoder's own config. Every other field answers one question of the
paper.
"""

import copy
import math
from difflib import get_close_matches
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec, strict
from transformers.utils.type_validators import as_validated_field, interval

from .checkpoint_gemma_encoder import CLASSES, only_settings
from .gguf_gemma_encoder import gguf_config, hub_options, split_gguf

# Decoders whose layers can run bidirectionally here, by `model_type`: the paper's, and two other
# families.
DECODERS = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "llama", "qwen2", "qwen3")
# Multimodal configs whose text tower is one of them.
MULTIMODAL = ("gemma3", "gemma4")
# What `AutoModelForSequenceClassification` may build, the default first.
TASK_HEADS = ("GemmaEncoderForSequenceClassification", "GemmaEncoderForRanking")
# Fields of a decoder that upstream reads and writes under other names.
OLD_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")
# The fields of a decoder's config that a task-specific wrapper inherits from it.
INHERITED = ("id2label", "label2id", "problem_type", "dtype", "torch_dtype", "quantization_config")


@as_validated_field
def activation_name(value: str):
    """Raise ValueError unless the value is an activation of transformers that has no parameters."""
    if value not in ACT2FN:
        raise ValueError(f"Value must be one of {sorted(ACT2FN)}, got {value!r}")
    if any(True for _ in ACT2FN[value].parameters()):
        raise ValueError(f"Value must be an activation without parameters of its own, got {value!r}")


@as_validated_field
def radius(value: int | None):
    """Raise ValueError unless the value is None or a radius in tokens."""
    if value is not None and (isinstance(value, bool) or value < 0):
        raise ValueError(f"Value must be None or a radius of at least 0 tokens, got {value}")


@as_validated_field
def chunk_size(value: int | None):
    """Raise ValueError unless the value is None or a number of documents."""
    if value is not None and (isinstance(value, bool) or value < 1):
        raise ValueError(f"Value must be None or at least 1 document, got {value}")


@as_validated_field
def temperature(value: int | float | None):
    """Raise ValueError unless the value is None or a number above 0."""
    if value is not None and (isinstance(value, bool) or not 0 < value < float("inf")):
        raise ValueError(f"Value must be None or a number above 0, got {value}")


@as_validated_field
def share(value: int | float | None):
    """Raise ValueError unless the value is None or a number from 0 to below 1."""
    if value is not None and (isinstance(value, bool) or not 0 <= value < 1):
        raise ValueError(f"Value must be None or a number of at least 0 and below 1, got {value}")


@as_validated_field
def numbers(value: list[int | float] | tuple[int | float, ...] | None):
    """Raise ValueError unless the value is None or a list of finite numbers."""
    if any(isinstance(number, bool) or not math.isfinite(number) for number in value or ()):
        raise ValueError(f"Value must be None or a list of a finite number for each label, got {value}")


@as_validated_field
def layer_sizes(value: list[int] | tuple[int, ...]):
    """Raise ValueError unless the value is a list of layer sizes."""
    if any(isinstance(size, bool) or size < 1 for size in value):
        raise ValueError(f"Value must list the sizes of the hidden layers, each at least 1, got {value}")


class OfDecoder(property):
    """Mark a field of the decoder's config."""


def _of_decoder(name: str) -> OfDecoder:
    """Return a property that reads and writes a field of `text_config`, so that there is one copy
    of it."""

    def read(self):
        try:
            return getattr(self.text_config, name)
        except Exception as error:  # Gemma 4's layers differ, and upstream's own error is no AttributeError
            raise AttributeError(str(error)) from error

    return OfDecoder(read, lambda self, value: setattr(self.text_config, name, value), doc=f"`text_config.{name}`.")


Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "first_k", "last_k", "query_probe", "kv_probe"]
RankingLoss = Literal[
    "point_ce", "pair", "softmax", "poly1", "rankt5_softmax", "rankt5_poly1", "lambdarank", "margin_mse", "kl"
]
MaskedLMObjective = Literal["mlm", "mntp"]


@strict
class GemmaEncoderConfig(PreTrainedConfig):
    r"""Store the configuration of a Gemma Encoder. A raw Gemma `config.json` (Gemma 1, 2, 3, 4;
    multimodal Gemma 3 and 4 by their text tower) loads through
    [`~GemmaEncoderConfig.from_pretrained`] and becomes the `text_config`; so does one of Llama,
    Qwen 2 or Qwen 3.

    Options count when a model is built or loaded. One that is assigned to `model.config` later does
    not change what runs; `verify_attention` raises if it is an option of attention.

    Args:
        text_config: The decoder's own config, or its dict. By default Gemma 2's.
        attention: Whether a token sees all others ("bidirectional", the paper) or only earlier ones
            ("causal", the decoder's own mask). Flags of the decoder, such as `is_causal` or
            `use_bidirectional_attention`, have no effect.
        attention_window: Radius r: a token sees tokens at distance |i - j| <= r, in every layer and
            on top of the decoder's own sliding layers. Distances are counted in tokens, not in
            padding. `None` for no limit.
        pooling: How token states become one vector, a key of `POOLERS`.
        pooling_k: Number of tokens averaged by "first_k" and "last_k". Paper: unstated; 1 is our
            choice.
        pooling_num_probes: Number of learned latents of "query_probe" and "kv_probe". Our choice.
        pooling_num_heads: Attention heads of "query_probe" and "kv_probe"; divides the hidden size.
            Our choice.
        attention_dropout: Probability of dropping an attention weight while training (paper: 0.1).
        feedforward_dropout: Probability of dropping an element of a feed-forward block's output
            while training, where it enters the residual stream (paper: 0.1).
        classifier_hidden_sizes: Sizes of the task MLP's hidden layers; empty for one linear layer.
        classifier_activation: Activation between the task MLP's layers, a key of transformers'
            `ACT2FN`.
        classifier_dropout: Probability of dropping an input of each of the task MLP's layers while
            training; None is 0.
        ranking_loss: Loss of `GemmaEncoderForRanking`, a key of `RANKING_LOSSES`. The targets of
            "softmax" and "poly1" sum to one in every list; "rankt5_softmax" and "rankt5_poly1"
            weigh a list by its sum of grades (the paper).
        list_chunk_size: Documents of a batch that `GemmaEncoderForRanking` encodes at a time; the
            chunks are computed again in the backward pass, so that memory does not grow with the
            lists. `None` for all at once.
        label_mean, label_std: Mean and standard deviation of a regression's labels, one number for
            each label. The head learns `(label - label_mean) / label_std`, and `logits` are in the
            labels' own units. With `None` the head learns the labels as they are.
        calibration_temperature, calibration_bias: `probabilities` of a classifier or ranker
            subtracts the bias from the logits, and divides by the temperature, which is `None`
            until it was fitted.
        masked_lm_objective: Which state predicts a token in `GemmaEncoderForMaskedLM`: its own
            ("mlm"), or the one before it ("mntp", masked next-token prediction).
        int8_weights: Whether the decoder's linear layers hold int8 weights, as `quantize_int8` made
            them. It describes a checkpoint; it does not make one.
        problem_type: Which loss a classifier has, as in transformers. `None`: it is inferred from
            the labels.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or value, at
            construction or assignment; or two fields contradict each other, at construction,
            saving, or when the model is built.
        ValueError: the decoder is not supported, or a keyword is a misspelled field.
    """

    model_type = "gemma_encoder"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma2")}

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    attention: Attention = "bidirectional"
    attention_window: int | None = radius(default=None)
    pooling: Pooling = "mean"
    pooling_k: int = interval(min=1)(default=1)
    pooling_num_probes: int = interval(min=1)(default=8)
    pooling_num_heads: int = interval(min=1)(default=4)
    attention_dropout: int | float = interval(min=0, max=1, exclude_max=True)(default=0.1)
    feedforward_dropout: int | float = interval(min=0, max=1, exclude_max=True)(default=0.1)
    classifier_hidden_sizes: list[int] | tuple[int, ...] = layer_sizes(default=())
    classifier_activation: str = activation_name(default="gelu")
    classifier_dropout: int | float | None = share(default=0.0)
    ranking_loss: RankingLoss = "softmax"
    list_chunk_size: int | None = chunk_size(default=None)
    label_mean: list[int | float] | tuple[int | float, ...] | None = numbers(default=None)
    label_std: list[int | float] | tuple[int | float, ...] | None = numbers(default=None)
    calibration_temperature: int | float | None = temperature(default=None)
    calibration_bias: int | float = 0.0
    masked_lm_objective: MaskedLMObjective = "mlm"
    int8_weights: bool = False
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    head_dim = _of_decoder("head_dim")
    hidden_size = _of_decoder("hidden_size")
    intermediate_size = _of_decoder("intermediate_size")
    num_hidden_layers = _of_decoder("num_hidden_layers")
    layer_types = _of_decoder("layer_types")
    num_attention_heads = _of_decoder("num_attention_heads")
    num_key_value_heads = _of_decoder("num_key_value_heads")
    rms_norm_eps = _of_decoder("rms_norm_eps")
    sliding_window = _of_decoder("sliding_window")
    tie_word_embeddings = _of_decoder("tie_word_embeddings")
    use_cache = _of_decoder("use_cache")
    vocab_size = _of_decoder("vocab_size")
    max_position_embeddings = _of_decoder("max_position_embeddings")
    initializer_range = _of_decoder("initializer_range")
    pad_token_id = _of_decoder("pad_token_id")
    bos_token_id = _of_decoder("bos_token_id")
    eos_token_id = _of_decoder("eos_token_id")

    def __post_init__(self, **kwargs):
        self._refuse_misspelled(kwargs)
        flat = {name: kwargs.pop(name) for name in [*kwargs] if is_of_decoder(type(self), name)}
        self.text_config = _as_decoder_config(self.text_config, flat)
        _refuse_fields_of_decoder(self.text_config, kwargs)
        self.architectures = self.architectures or []  # AutoModelForSequenceClassification looks a head up in it
        super().__post_init__(**kwargs)

    def validate_labels(self):
        """Raise ValueError if the fields about labels contradict each other."""
        if not self.num_labels:
            raise ValueError(f"`num_labels` must be at least 1, got {self.num_labels}")
        if (self.label_mean is None) != (self.label_std is None):
            raise ValueError("`label_mean` and `label_std` go together: give both, or None for both.")
        for name in ("label_mean", "label_std"):
            if (value := getattr(self, name)) is not None and len(value) != self.num_labels:
                raise ValueError(
                    f"`{name}` must have a number for each of the {self.num_labels} labels, got {value}; a fresh head "
                    "for other labels needs label_mean=None and label_std=None."
                )
        if self.label_std is not None and min(self.label_std) <= 0:
            raise ValueError(f"`label_std` must be above 0, got {self.label_std}")
        if self.label_mean is not None and "classification" in (self.problem_type or ""):
            raise ValueError(f"`label_mean` and `label_std` are of a regression, not of {self.problem_type!r}.")

    def validate_pooling(self):
        """Raise ValueError if the number of probes or of their heads does not fit."""
        probed = self.pooling in ("query_probe", "kv_probe")
        if probed and self.hidden_size % self.pooling_num_heads:
            raise ValueError(
                f"`pooling_num_heads` ({self.pooling_num_heads}) must divide the hidden size ({self.hidden_size})"
            )
        if self.pooling == "kv_probe" and self.pooling_num_probes < 2:
            raise ValueError(
                "`pooling_num_probes` must be at least 2 for pooling='kv_probe': with one key every token attends to "
                f"it fully and the pooled vector no longer depends on the text, got {self.pooling_num_probes}"
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the config of a checkpoint, a raw decoder or a GGUF file as an encoder's, and the
        other `kwargs`."""
        source, gguf_file = split_gguf(pretrained_model_name_or_path, kwargs.pop("gguf_file", None))
        if gguf_file is not None:
            where = hub_options(kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in where and not name.startswith("_")}
            return _adopt_decoder(gguf_config(source, gguf_file, where)), kwargs
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _adopt_decoder(only_settings(config_dict)), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a config as upstream does, from the dict with the keywords in it, so that all is
        checked together."""
        cls._refuse_misspelled(kwargs)
        config_dict = _adopt_decoder(only_settings(config_dict))
        if isinstance(kwargs.get("text_config"), dict):
            decoder = _to_dict(config_dict.get("text_config"))
            if unknown := [name for name in kwargs["text_config"] if decoder and name not in decoder]:
                raise ValueError(f"`text_config` of {decoder.get('model_type')} has no field {', '.join(unknown)}.")
            kwargs["text_config"] = {**decoder, **kwargs["text_config"]}
        for name in [*kwargs]:
            if (name in cls.__dataclass_fields__ and name != "dtype") or is_of_decoder(cls, name):
                config_dict[name] = kwargs.pop(name)
        if (kwargs.get("num_labels") or 0) != len(config_dict.get("id2label") or ()) and "num_labels" in kwargs:
            config_dict["id2label"] = config_dict["label2id"] = None  # upstream would check `problem_type` by the old
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, with an `auto_map` that names the checkpoint's own code and
        no repository's."""
        output = super().to_dict()
        heads = [name for name in self.architectures or () if name in TASK_HEADS]
        # Of the class that was saved, where that is a user's own.
        named = tuple(f".{name}" for name in self.architectures or () if name not in CLASSES)
        own = {auto: code for auto, code in (output.get("auto_map") or {}).items() if "--" not in str(code)}
        own = {auto: code for auto, code in own.items() if isinstance(code, str) and code.endswith(named)}
        output["auto_map"] = {
            "AutoConfig": "configuration_gemma_encoder.GemmaEncoderConfig",
            "AutoModel": "modeling_gemma_encoder.GemmaEncoderModel",
            "AutoModelForMaskedLM": "modeling_gemma_encoder.GemmaEncoderForMaskedLM",
            "AutoModelForSequenceClassification": f"modeling_gemma_encoder.{[*heads, TASK_HEADS[0]][0]}",
            **own,
        }
        return output

    @classmethod
    def _refuse_misspelled(cls, kwargs: dict[str, Any]) -> None:
        """Raise ValueError if a keyword is a misspelled field, or one that has no effect here."""
        known = [*cls.__dataclass_fields__, "num_labels", "attn_implementation"]
        for name in kwargs:
            if name in ("is_causal", "use_bidirectional_attention"):
                raise ValueError(f'`{name}` does not decide here: pass attention="bidirectional" or "causal".')
            if name not in known and not hasattr(cls, name) and (close := get_close_matches(name, known, 1, 0.85)):
                raise ValueError(f"`{name}` is not a field of {cls.__name__}. Did you mean `{close[0]}`?")


def is_of_decoder(config_class: type, name: str) -> bool:
    """Return whether a config's field is a field of its decoder."""
    return isinstance(getattr(config_class, name, None), OfDecoder)


def _to_dict(config: PreTrainedConfig | dict | None) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})


def _refuse_fields_of_decoder(decoder: PreTrainedConfig | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that the decoder's config has, and an encoder's has not."""
    fields = {*type(decoder or AutoConfig.for_model(DECODERS[1])).__dataclass_fields__, *OLD_FIELDS}
    if of_decoder := [name for name in kwargs if name in fields and not hasattr(GemmaEncoderConfig, name)]:
        raise ValueError(
            f"`{', '.join(of_decoder)}` is the decoder's: pass text_config={{{of_decoder[0]!r}: "
            f"{kwargs[of_decoder[0]]!r}, ...}}."
        )


def _with_fields(decoder: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return a decoder's config with other values of some fields. With fewer layers, the first
    types are kept."""
    changed, layers, types = {**decoder, **fields}, fields.get("num_hidden_layers"), decoder.get("layer_types")
    if layers is not None and types and "layer_types" not in fields:
        changed["layer_types"] = types[:layers] if layers <= len(types) else None  # None: the family's own pattern
    if layers is not None and changed.get("per_layer_config"):  # Gemma 4
        kept = {number: value for number, value in changed["per_layer_config"].items() if int(number) < layers}
        changed["per_layer_config"] = kept
    return changed


def _as_decoder_config(
    config: PreTrainedConfig | dict | None, fields: dict[str, Any] | None = None
) -> PreTrainedConfig | None:
    """Return the text decoder's config with other `fields`. Raise ValueError if the family is not
    supported."""
    if fields:
        config = _with_fields(_to_dict(_as_decoder_config(config or {})), fields)
    if config is None:
        return None
    model_type = config.get("model_type", DECODERS[1]) if isinstance(config, dict) else config.model_type
    if model_type not in (*DECODERS, *MULTIMODAL):
        raise ValueError(
            f"model_type={model_type!r} is not a decoder that can run as an encoder here. Supported: "
            f"{', '.join(DECODERS)}, and {' and '.join(MULTIMODAL)} by their text tower."
        )
    if isinstance(config, dict):
        config = AutoConfig.for_model(model_type, **{name: config[name] for name in config if name != "model_type"})
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if any(of_type.get("rope_type") == "longrope" for of_type in (rope, *rope.values()) if isinstance(of_type, dict)):
        raise ValueError("rope_type='longrope' rotates a text by the longest one beside it: its score would change.")
    return copy.deepcopy(config.get_text_config())  # it is ours to set a backend on, not the caller's decoder's


def _adopt_decoder(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a raw Gemma config as the `text_config` of an encoder's, and an encoder's config as it
    is."""
    if config_dict.get("model_type", GemmaEncoderConfig.model_type) == GemmaEncoderConfig.model_type:
        return dict(config_dict)
    adopted = {name: config_dict[name] for name in INHERITED if name in config_dict}
    return {**adopted, "text_config": _as_decoder_config(config_dict)}


GemmaEncoderConfig.register_for_auto_class()
