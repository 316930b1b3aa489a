"""Loading and saving: any checkpoint of these decoders loads, and what is saved carries its own code."""

import copy
import json
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
from transformers.utils import cached_file, find_adapter_config_file, logging

from .attention_gemma_encoder import UNPADDED
from .checkpoint_gemma_encoder import CLASSES, all_or_nothing, refuse_incomplete, refuse_other_class, refuse_paths
from .configuration_gemma_encoder import GemmaEncoderConfig, is_of_decoder
from .fused_gemma_encoder import FUSED
from .gguf_gemma_encoder import HUB_OPTIONS, read_decoder, split_gguf
from .peft_gemma_encoder import refuse_lost_parts
from .pooling_gemma_encoder import POOLERS, ProbePooler

logger = logging.get_logger(__name__)

# Multimodal Gemma checkpoints keep the decoder in a text tower, under one of these names.
TEXT_TOWER = {r"^(model\.)?language_model\.(model\.)?(?=layers|embed_tokens|norm|per_layer)": "model."}
# Of such checkpoints, and of language models, what an encoder has no use for.
NOT_OURS = [r"lm_head", r"vision_tower", r"audio_tower", r"multi_modal_projector", r"embed_vision", r"embed_audio"]

WHOLE = ("", ".index.json")
# Options of an encoder that an adapter cannot do without.
SHAPING = {"attention", "attention_window", "pooling", "pooling_k", "pooling_num_probes", "pooling_num_heads"}
SHAPING |= {"label_mean", "label_std"}
FIELDS = GemmaEncoderConfig.__dataclass_fields__.keys() - {"dtype"} | {"num_labels"}
# Arguments of `push_to_hub`.
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


@contextmanager
def quiet():
    """Load without the report that a decoder has no head, which an adapter or a checkpoint is about to bring."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def find_adapter(path, where: dict) -> dict | None:
    """The PEFT config at `path`, unless that is a whole model's folder that also holds an adapter."""
    if not isinstance(path, str | Path) or split_gguf(path)[1] is not None:
        return None
    folder = Path(path) / where.get("subfolder", "")
    if any((folder / f"model.safetensors{end}").exists() for end in WHOLE):
        return None
    if folder.is_dir():
        file = folder / "adapter_config.json"
        return json.loads(file.read_text()) if file.is_file() else None
    file = find_adapter_config_file(str(path), **where)
    return None if file is None else json.loads(Path(file).read_text())


def refuse_unknown_attention(requested: str) -> None:
    """Raises ValueError where no attention function of this name is registered: a name never loads code."""
    if requested.startswith("paged|") or requested not in ("eager", *AttentionInterface().valid_keys()):
        raise ValueError(
            f'Specified `attn_implementation="{requested}"` is not supported. Use "{UNPADDED}" (the default), '
            f'"{FUSED}", "eager", "sdpa", "flex_attention", "flash_attention_2" or "flash_attention_3".'
        )


def materialize(model: nn.Module) -> None:
    """Gives parameters on the meta device a place each, where FSDP puts rank 0's values.

    On other ranks upstream leaves new parameters, such as a head's, on meta. accelerate tells parameters apart by their
    address, which is 0 for all of those: these ranks' part of all but one would never be trained (transformers 5.23,
    accelerate 1.15).
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.zeros_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


class GemmaEncoderPreTrainedModel(GemmaPreTrainedModel):
    """What every class here shares: loading any decoder, backends, initialisation and saving."""

    config: GemmaEncoderConfig
    # Scores stay apart: neither bf16 rounding nor 4-bit loading may touch the head. FSDP shards it apart for its dtype.
    _no_split_modules = ["GemmaEncoderHead"]
    _keep_in_fp32_modules = ["classifier", "pooler"]
    _keep_in_fp32_modules_strict = ["classifier", "weight_scale"]
    _keys_to_ignore_on_load_unexpected = NOT_OURS
    _can_record_outputs = None  # the decoder records its own

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if any(parent.__name__ == cls.__name__ for parent in cls.__mro__[1:]):
            raise TypeError(f"A class derived from {cls.__name__} needs a name of its own, by which it is saved.")
        if not cls.__module__.startswith("torch."):  # where FSDP2 makes a class of each
            cls._auto_class = None  # a parent's registration says nothing of a user's own class

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not know {', '.join(unknown)}. An encoder's options are the "
                "fields of GemmaEncoderConfig; its decoder's are given as `text_config={...}`."
            )
        if config.model_type != GemmaEncoderConfig.model_type:
            raise ValueError(
                f"`config` has model_type={config.model_type!r}. Pass GemmaEncoderConfig(text_config=config), or no "
                "config to `from_pretrained`."
            )
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, key_mapping=None, **kwargs):
        """
        As upstream. The text tower of a multimodal checkpoint is found by its parameter names, and an adapter comes
        over the decoder it was trained on, with the options it was trained with, which its folder's config holds. A
        GGUF file, by `gguf_file` or as a path that ends in .gguf, is dequantized into `dtype`, fp32 unless given.

        Raises:
            ValueError: weights of the decoder, or of the head or pooler that were saved, are missing; the weights are
                not those of the config; an adapter has no encoder's config or lacks the head, or `kwargs` say other
                options.
            OSError: there are no safetensors. Pickled weights are never read.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors` must be True: pickled weights run code when they are loaded.")
        key_mapping = {**TEXT_TOWER, **(key_mapping or {})}
        source, gguf_file = split_gguf(pretrained_model_name_or_path, kwargs.pop("gguf_file", None))
        if gguf_file is not None:
            return cls._from_gguf(source, *args, gguf_file=gguf_file, key_mapping=key_mapping, **kwargs)
        given = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        where = {name: given[name] for name in HUB_OPTIONS if name in given}
        if adapter := find_adapter(pretrained_model_name_or_path, where):
            return cls._from_adapter(
                pretrained_model_name_or_path, adapter, where, *args, key_mapping=key_mapping, **kwargs
            )
        if isinstance(pretrained_model_name_or_path, str | Path):
            folder = Path(pretrained_model_name_or_path) / where.get("subfolder", "")
            refuse_paths(folder)
            if (folder / "adapter_config.json").exists():
                raise ValueError(
                    f"{folder} holds a whole model and an adapter, which upstream would apply to it: keep one of them, "
                    "model.safetensors or adapter_config.json and adapter_model.safetensors."
                )
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, key_mapping=key_mapping, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None and (info["missing_keys"] or info["unexpected_keys"]):
            saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
            refuse_incomplete(
                pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"], saved, model.config
            )
        refuse_other_class(pretrained_model_name_or_path, model.config, cls)
        if is_fsdp_enabled():
            materialize(model)
        return (model, info) if with_info else model

    @classmethod
    def _from_gguf(cls, source, *args, gguf_file: str, config=None, **kwargs):
        where = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        if config is None:
            of_decoder = {name for name in kwargs if is_of_decoder(cls.config_class, name)}
            of_config = {name: kwargs.pop(name) for name in (FIELDS & kwargs.keys()) | of_decoder}
            config = cls.config_class.from_pretrained(source, gguf_file=gguf_file, **where, **of_config)
        if getattr(config, "model_type", None) != GemmaEncoderConfig.model_type:
            raise ValueError("`config` must be a GemmaEncoderConfig: GemmaEncoderConfig(text_config=config), or none.")
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        decoder = read_decoder(source, gguf_file, config.text_config, dtype, where)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None,
            *args,
            config=config,
            state_dict=decoder.state_dict(),
            dtype=decoder.dtype,
            output_loading_info=True,
            **kwargs,
        )
        place = "/".join(filter(None, (str(source), where.get("subfolder"), gguf_file)))
        model.name_or_path = model.config.name_or_path = place  # over which an adapter is loaded again
        if is_fsdp_enabled():
            materialize(model)
        return (model, info) if with_info else model

    @classmethod
    def _from_adapter(cls, path, adapter: dict, where: dict, *args, config=None, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in (*where, "adapter_kwargs")}
        if (folder := Path(path) / where.get("subfolder", "")).is_dir():
            path, where = folder, {name: value for name, value in where.items() if name != "subfolder"}
        with_info = kwargs.pop("output_loading_info", False)
        file = cached_file(path, "config.json", **where, _raise_exceptions_for_missing_entries=False)
        if file is None or json.loads(Path(file).read_text()).get("model_type") != GemmaEncoderConfig.model_type:
            raise ValueError(
                f"{path} is an adapter without an encoder's config.json, which says how it attends and pools. Load the "
                "base model with the options it was trained with, and the adapter with `PeftModel.from_pretrained`."
            )
        weights = cached_file(path, "adapter_model.safetensors", **where)  # or OSError: pickled ones are never read
        options = {name: kwargs.pop(name) for name in FIELDS & kwargs.keys()}
        if of_decoder := [name for name in kwargs if is_of_decoder(cls.config_class, name)]:
            raise ValueError(f"{path} is an adapter over a decoder, whose `{of_decoder[0]}` cannot be changed.")
        trained = cls.config_class.from_pretrained(path, **where)
        refuse_other_class(path, trained, cls)
        given = config or cls.config_class.from_pretrained(path, **where, **options)
        for name in SHAPING:
            if (value := getattr(given, name)) != (right := getattr(trained, name)):
                raise ValueError(f"{path} was trained with {name}={right!r}, and cannot be loaded with {value!r}.")
        given = copy.deepcopy(given)
        if quantization := given.__dict__.pop("quantization_config", None):  # what the base becomes, not what it is
            kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
        base = {name: where[name] for name in where if name not in ("revision", "subfolder")}
        revision, named = adapter.get("revision") or "main", adapter["base_model_name_or_path"]
        with quiet():
            try:
                source, gguf_file = split_gguf(named)
                load = super().from_pretrained if gguf_file is None else partial(cls._from_gguf, gguf_file=gguf_file)
                model = load(source, *args, config=given, revision=revision, **base, **kwargs)
            except OSError as error:
                raise OSError(f"{path} is an adapter over {named}, which cannot be read from here: {error}") from error
            loaded = model.load_adapter(str(path), adapter_kwargs=where, is_trainable=True)
            model.eval()  # as any that is loaded
        saved = load_state_dict(weights)
        heads = [name for name in ("pooler", "classifier") if list(getattr(model, name, nn.Identity()).parameters())]
        lost = [name for name in heads if not any(f".{name}." in key for key in saved)]
        if lost or loaded.missing_keys:
            raise ValueError(
                f"{path} lacks the weights of {', '.join([*lost, *sorted(loaded.missing_keys)])}. Head and pooler are "
                'saved with an adapter when `modules_to_save=["classifier", "pooler"]` of its LoraConfig.'
            )
        for name, parameter in model.named_parameters():  # over a bf16 or 4-bit decoder upstream rounds them to bf16
            weight = saved.get(f"base_model.model.{name.replace('.default', '').replace('.modules_to_save', '')}")
            if weight is not None and parameter.dtype != weight.dtype:
                parameter.data = weight.to(parameter.device)
        return (model, loaded.to_dict()) if with_info else model

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """As upstream, with parameters under our names, whatever they were loaded from. An interrupted save leaves
        what was there before as it was; `distributed_checkpoint=True` does not."""
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
        """Write the files that a user's own class is derived from; upstream copies its file and relative imports."""
        name, pooler = type(self).__name__, getattr(self, "pooler", None)
        expected = POOLERS[self.config.pooling]
        found = type(getattr(pooler, "original_module", pooler)).__name__.removeprefix("FSDP")
        if pooler is not None and found != expected.__name__:
            logger.warning(
                f"`pooler` is of the class {found}, not the {expected.__name__} of pooling={self.config.pooling!r}: "
                "what loads this checkpoint will pool otherwise. Derive a class whose `pool` does it."
            )
        if name in CLASSES:
            return
        if self._auto_class is None:
            logger.warning(
                f"{name} is a class of your own, and its code is not saved: only {name}.from_pretrained loads what is "
                "written. To save its code too, put it in a file of its own, and after it the line "
                f'{name}.register_for_auto_class("AutoModelForSequenceClassification").'
            )
            return
        for path in Path(__file__).parent.glob("*_gemma_encoder.py"):
            shutil.copyfile(path, folder / path.name)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, as upstream's models have it."""
        return self.config.vocab_size

    def active_adapters(self) -> list[str]:
        """As upstream, whatever PEFT is installed: transformers 5.24 asks for a PEFT 0.22 that there is not yet."""
        active = [layer.active_adapter for layer in self.modules() if hasattr(layer, "get_base_layer")]
        if not active:
            raise ValueError("No adapter loaded. Please load an adapter first.")
        return [active[0]] if isinstance(active[0], str) else list(active[0])

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """As upstream, with what the stock causal class cannot load, see `adapters.refuse_stock_head`."""
        refuse_lost_parts(self)
        peft = import_module("peft")  # an import statement would make every checkpoint ask for it
        state_dict = peft.get_peft_model_state_dict(self, state_dict, adapter_name or self.active_adapters()[0])
        return {**state_dict, "score.weight": torch.empty(0)}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        refuse_unknown_attention(attn_implementation or UNPADDED)  # upstream would look for a kernel of this name
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As upstream, with unpadded execution as the default, and the decoder has a say."""
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
        """As upstream, except where it would be silently wrong.

        Raises:
            ValueError: `use_reentrant` is not False on a Gemma 4 whose layers share keys and values: their gradient
                would be lost.
        """
        shares = getattr(self.config.text_config, "num_kv_shared_layers", 0)
        given = getattr(gradient_checkpointing_func, "keywords", {"use_reentrant": False})
        if enable and shares and given.get("use_reentrant") is not False:  # torch's own default is reentrant
            raise ValueError(
                "`use_reentrant`, unless False, loses gradients of a Gemma 4 whose layers share keys and values; pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
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
        """As upstream; the decoder resizes, since Gemma 4 has a second embedding to keep in step."""
        embeddings = self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.num_embeddings
        if (head := self.get_output_embeddings()) is not None:
            resized = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            self.set_output_embeddings(resized.requires_grad_(head.weight.requires_grad))
        self.config.text_config.vocab_size = size
        return embeddings


@contextmanager
def _named_as_written(model_class: type):
    """FSDP2 makes a model's class one of its own, in torch's module, whose code would be saved in the place of ours."""
    if not model_class.__module__.startswith("torch."):
        yield
        return
    written, made = model_class.__bases__[1], (model_class.__name__, model_class.__module__)
    model_class.__name__, model_class.__module__ = written.__name__, written.__module__
    try:
        yield
    finally:
        model_class.__name__, model_class.__module__ = made
