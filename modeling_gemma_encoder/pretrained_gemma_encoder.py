"""Loading and saving: checkpoints of any supported decoder are loaded, and checkpoints are saved
with their code."""

import copy
import shutil
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.integrations import is_fsdp_enabled
from transformers.modeling_utils import load_state_dict
from transformers.models.gemma.modeling_gemma import GemmaPreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .adapter_gemma_encoder import (
    Adapter,
    quiet,
    refuse_lost_weights,
    refuse_other_options,
    refuse_plain_adapter,
    restore_precision,
)
from .attention_gemma_encoder import UNPADDED
from .checkpoint_gemma_encoder import (
    CLASSES,
    all_or_nothing,
    refuse_incomplete,
    refuse_model_with_adapter,
    refuse_other_class,
    refuse_paths,
)
from .configuration_gemma_encoder import GemmaEncoderConfig, is_of_decoder
from .fused_gemma_encoder import FUSED
from .gguf_gemma_encoder import HUB_OPTIONS, hub_options, read_decoder, split_gguf
from .peft_gemma_encoder import refuse_lost_parts
from .pooling_gemma_encoder import POOLERS, ProbePooler

logger = logging.get_logger(__name__)

# Multimodal Gemma checkpoints have the decoder in a text tower, under one of these names.
TEXT_TOWER = {r"^(model\.)?language_model\.(model\.)?(?=layers|embed_tokens|norm|per_layer)": "model."}
# Weights of such checkpoints, and of language models, that an encoder does not use.
NOT_OURS = [r"lm_head", r"vision_tower", r"audio_tower", r"multi_modal_projector", r"embed_vision", r"embed_audio"]

# Fields of an encoder's config that `from_pretrained` takes.
FIELDS = GemmaEncoderConfig.__dataclass_fields__.keys() - {"dtype"} | {"num_labels"}
# Arguments of `push_to_hub`.
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def refuse_unknown_attention(requested: str) -> None:
    """Raise ValueError if no attention function of this name is registered; a name never loads
    code."""
    if requested.startswith("paged|") or requested not in ("eager", *AttentionInterface().valid_keys()):
        raise ValueError(
            f'Specified `attn_implementation="{requested}"` is not supported. Use "{UNPADDED}" (the default), '
            f'"{FUSED}", "eager", "sdpa", "flex_attention", "flash_attention_2" or "flash_attention_3".'
        )


def materialize(model: nn.Module) -> None:
    """Allocate the parameters on the meta device, for FSDP to fill them with rank 0's values.

    On other ranks upstream leaves new parameters, such as a head's, on meta. accelerate tells parameters apart by their
    address, which is 0 for all of these, so that only one of them would be trained on these ranks (transformers 5.23,
    accelerate 1.15).
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.zeros_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


class GemmaEncoderPreTrainedModel(GemmaPreTrainedModel):
    """Load, initialize and save encoders; the base of all model classes here."""

    config: GemmaEncoderConfig
    # The head stays in fp32, without bf16 rounding or 4-bit loading. FSDP shards it by itself, for
    # its dtype.
    _no_split_modules = ["GemmaEncoderHead"]
    _keep_in_fp32_modules = ["classifier", "pooler"]
    _keep_in_fp32_modules_strict = ["classifier", "weight_scale"]
    _keys_to_ignore_on_load_unexpected = NOT_OURS
    _can_record_outputs = None  # the decoder records its own

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if any(parent.__name__ == cls.__name__ for parent in cls.__mro__[1:]):
            raise TypeError(
                f"A class derived from {cls.__name__} needs a name of its own, by which it is saved. Rename it."
            )
        if not cls.__module__.startswith("torch."):  # where FSDP2 makes a class of each
            cls._auto_class = None  # a parent's registration does not hold for a user's own class

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not know {', '.join(unknown)}. An encoder's options are the "
                "fields of GemmaEncoderConfig; pass those of its decoder as `text_config={...}`."
            )
        if config.model_type != GemmaEncoderConfig.model_type:
            raise ValueError(
                f"`config` must be a GemmaEncoderConfig; got one with model_type={config.model_type!r}. Pass "
                "GemmaEncoderConfig(text_config=config), or no config to `from_pretrained`."
            )
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, key_mapping=None, **kwargs):
        """Load a checkpoint of a decoder or of an encoder, or an adapter with the decoder it was
        trained over.

        The text tower of a multimodal checkpoint is found by its parameter names. An adapter is
        loaded with the options it was trained with, which its folder's config holds. A GGUF file,
        given by `gguf_file` or as a path that ends in .gguf, is dequantized into `dtype`, or into
        fp32. Otherwise as upstream.

        Raises:
            ValueError: weights of the decoder, or of the head or pooler that were saved, are
                missing; the weights are not those of the config; an adapter has no encoder's config
                or lacks the head, or other options are given than it was trained with.
            OSError: there are no safetensors. Pickled weights are never read.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors` must be True: pickled weights run code when they are loaded.")
        kwargs["key_mapping"] = {**TEXT_TOWER, **(key_mapping or {})}
        source, gguf_file = split_gguf(pretrained_model_name_or_path, kwargs.pop("gguf_file", None))
        if gguf_file is not None:
            return cls._from_gguf(source, *args, gguf_file=gguf_file, **kwargs)
        where = hub_options({**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        if adapter := Adapter.find(source, where):
            return cls._from_adapter(adapter, *args, **kwargs)
        if isinstance(source, str | Path):
            folder = Path(source) / where.get("subfolder", "")
            refuse_paths(folder)
            refuse_model_with_adapter(folder)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
        if source is not None and (missing or unexpected):
            saved = cls.config_class.from_pretrained(source, **where)
            refuse_incomplete(source, missing, unexpected, saved, model.config)
        refuse_other_class(source, model.config, cls)
        if is_fsdp_enabled():
            materialize(model)
        return (model, info) if with_info else model

    @classmethod
    def _from_gguf(cls, source, *args, gguf_file: str, config=None, **kwargs):
        where = hub_options(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in where}
        if config is None:
            of_decoder = {name for name in kwargs if is_of_decoder(cls.config_class, name)}
            of_config = {name: kwargs.pop(name) for name in (FIELDS & kwargs.keys()) | of_decoder}
            config = cls.config_class.from_pretrained(source, gguf_file=gguf_file, **where, **of_config)
        if getattr(config, "model_type", None) != GemmaEncoderConfig.model_type:
            raise ValueError(
                f"`config` must be a GemmaEncoderConfig or None; got {type(config).__name__}. Pass "
                "GemmaEncoderConfig(text_config=config)."
            )
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        decoder = read_decoder(source, gguf_file, config.text_config, dtype, where)
        with_info = kwargs.pop("output_loading_info", False)
        weights = {"state_dict": decoder.state_dict(), "dtype": decoder.dtype}
        model, info = super().from_pretrained(None, *args, config=config, output_loading_info=True, **weights, **kwargs)
        place = "/".join(filter(None, (str(source), where.get("subfolder"), gguf_file)))
        model.name_or_path = model.config.name_or_path = place  # over which an adapter is loaded again
        if is_fsdp_enabled():
            materialize(model)
        return (model, info) if with_info else model

    @classmethod
    def _from_adapter(cls, adapter: Adapter, *args, config=None, **kwargs):
        refuse_plain_adapter(adapter, GemmaEncoderConfig.model_type)
        weights_file = adapter.weights_file()
        of_adapter = (*HUB_OPTIONS, "adapter_kwargs")
        kwargs = {name: value for name, value in kwargs.items() if name not in of_adapter}
        with_info = kwargs.pop("output_loading_info", False)
        options = {name: kwargs.pop(name) for name in FIELDS & kwargs.keys()}
        if of_decoder := [name for name in kwargs if is_of_decoder(cls.config_class, name)]:
            raise ValueError(f"{adapter.path} is an adapter over a decoder, whose `{of_decoder[0]}` cannot be changed.")
        config = cls._config_of_adapter(adapter, config, options)
        # What the decoder becomes when it is loaded, and not what its checkpoint is.
        if quantization := vars(config).pop("quantization_config", None):
            kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
        with quiet():
            model = cls._load_base(adapter, *args, config=config, **kwargs)
            info = model.load_adapter(str(adapter.path), adapter_kwargs=adapter.where, is_trainable=True)
        model.eval()  # as every model that is loaded
        saved = load_state_dict(weights_file)
        refuse_lost_weights(adapter, model, saved, info.missing_keys)
        restore_precision(model, saved)
        return (model, info.to_dict()) if with_info else model

    @classmethod
    def _config_of_adapter(cls, adapter: Adapter, config, options: dict) -> GemmaEncoderConfig:
        """Return a copy of `config`, or of the adapter's own with other `options`, checked against
        the adapter's."""
        trained = cls.config_class.from_pretrained(adapter.path, **adapter.where)
        refuse_other_class(adapter.path, trained, cls)
        given = config or cls.config_class.from_pretrained(adapter.path, **adapter.where, **options)
        refuse_other_options(adapter, given, trained)
        return copy.deepcopy(given)

    @classmethod
    def _load_base(cls, adapter: Adapter, *args, **kwargs):
        """Load the decoder that an adapter was trained over, as an encoder without the adapter."""
        source, gguf_file = split_gguf(adapter.base)
        load = super().from_pretrained if gguf_file is None else partial(cls._from_gguf, gguf_file=gguf_file)
        try:
            return load(source, *args, **adapter.base_options, **kwargs)
        except OSError as error:
            raise OSError(
                f"{adapter.path} is an adapter over {adapter.base}, which cannot be read from here: {error}"
            ) from error

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """Save the model as upstream does, under our parameter names, whatever it was loaded from.

        If saving is interrupted, the folder stays as it was, unless `distributed_checkpoint=True`.
        """
        kwargs = {"save_original_format": False, **kwargs}
        hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if push_to_hub and name in kwargs}
        with _named_as_written(type(self)):
            if kwargs.get("distributed_checkpoint"):
                return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **hub, **kwargs)
            with all_or_nothing(save_directory) as part:
                super().save_pretrained(part, *args, **kwargs)
                self.save_code(part)
                if (part / "adapter_config.json").exists():
                    self.config.save_pretrained(part)
        if push_to_hub:
            return self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def save_code(self, folder: Path) -> None:
        """Copy the files that a user's own class is derived from; upstream copies its file and
        relative imports."""
        name, pooler = type(self).__name__, getattr(self, "pooler", None)
        expected = POOLERS[self.config.pooling]
        found = type(getattr(pooler, "original_module", pooler)).__name__.removeprefix("FSDP")
        if pooler is not None and found != expected.__name__:
            logger.warning(
                f"`pooler` is of the class {found}, not the {expected.__name__} of pooling={self.config.pooling!r}, "
                "with which this checkpoint will be loaded. Derive a class whose `pool` does what yours does."
            )
        if name in CLASSES:
            return
        if self._auto_class is None:
            logger.warning(
                f"{name} is a class of your own, and its code is not saved, so that only {name}.from_pretrained loads "
                "this checkpoint. To save its code too, put it in a file of its own, and after it the line "
                f'{name}.register_for_auto_class("AutoModelForSequenceClassification").'
            )
            return
        for path in Path(__file__).parent.glob("*_gemma_encoder.py"):
            shutil.copyfile(path, folder / path.name)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return self.config.vocab_size

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters; transformers 5.24 asks for PEFT 0.22, which is
        not released."""
        active = [layer.active_adapter for layer in self.modules() if hasattr(layer, "get_base_layer")]
        if not active:
            raise ValueError("No adapter loaded. Please load an adapter first.")
        return [active[0]] if isinstance(active[0], str) else list(active[0])

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """Return an adapter's weights, with one that the stock causal class cannot load, as
        `StockHeadGuard` adds."""
        refuse_lost_parts(self)
        peft = import_module("peft")  # an import statement would make every checkpoint ask for it
        state_dict = peft.get_peft_model_state_dict(self, state_dict, adapter_name or self.active_adapters()[0])
        return {**state_dict, "score.weight": torch.empty(0)}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        refuse_unknown_attention(attn_implementation or UNPADDED)  # upstream would look for a kernel of this name
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return the backend as upstream does, by default the unpadded one, if encoder and decoder
        support it."""
        requested = requested_attention or self.config.text_config._attn_implementation or UNPADDED
        refuse_unknown_attention(requested)
        if requested == "sdpa" and self.config.text_config.model_type == "gemma2":
            raise ValueError(
                "attn_implementation='sdpa' cannot soft-cap attention scores, as Gemma 2 does. Use the default, "
                f"{UNPADDED!r}, or 'eager'."
            )
        if not is_init_check:
            self.model.get_correct_attn_implementation(requested)
        return super().get_correct_attn_implementation(requested, is_init_check)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Set gradient checkpointing as upstream does, unless it would lose gradients.

        Raises:
            ValueError: `use_reentrant` is not False, and the decoder is a Gemma 4 whose layers
                share keys and values.
        """
        shares = getattr(self.config.text_config, "num_kv_shared_layers", 0)
        given = getattr(gradient_checkpointing_func, "keywords", {"use_reentrant": False})
        if enable and shares and given.get("use_reentrant") is not False:  # torch's own default is reentrant
            raise ValueError(
                "`use_reentrant` must be False for a Gemma 4 whose layers share keys and values, or gradients are "
                'lost. Pass `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        module.was_drawn = True  # and did not come from a checkpoint, see `refuse_lost_parts`
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)  # the decoder starts its own norms; upstream's Gemma would start ours at zero
        elif isinstance(module, ProbePooler):
            init.normal_(module.probes)
        else:
            super()._init_weights(module)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary; the decoder does it, since Gemma 4 has a second embedding of the
        same size."""
        embeddings = self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.num_embeddings
        if (head := self.get_output_embeddings()) is not None:
            resized = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            self.set_output_embeddings(resized.requires_grad_(head.weight.requires_grad))
        self.config.text_config.vocab_size = size
        return embeddings


@contextmanager
def _named_as_written(model_class: type):
    """Give a class made by FSDP2 the name and module of the class it was made from, while its code
    is saved."""
    if not model_class.__module__.startswith("torch."):
        yield
        return
    written, made = model_class.__bases__[1], (model_class.__name__, model_class.__module__)
    model_class.__name__, model_class.__module__ = written.__name__, written.__module__
    try:
        yield
    finally:
        model_class.__name__, model_class.__module__ = made
