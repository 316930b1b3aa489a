"""Adapters: a few trained weights beside a frozen decoder, and a head and a pooler that are trained
in full.

LoRA: arXiv 2106.09685. LoRA on every linear layer and over 4-bit weights: QLoRA, arXiv 2305.14314.
Importing this module registers with PEFT which layers of a Gemma Encoder to adapt.
"""

import itertools
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForSequenceClassification, prepare_model_for_kbit_training
from peft.utils import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .adapter_gemma_encoder import find_adapter, quiet
from .checkpoint_gemma_encoder import all_or_nothing
from .configuration_gemma_encoder import GemmaEncoderConfig
from .modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from .peft_gemma_encoder import write_cross_encoder_files
from .precision_gemma_encoder import computes_in_bf16

HEADS = {model.__name__: model for model in (GemmaEncoderForSequenceClassification, GemmaEncoderForRanking)}

# Every linear layer of the decoder, as QLoRA found best (section 4, figure 2); our choice of
# default.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# PEFT's other methods adapt the layers that they adapt in Gemma 2. "norm" alone would also mean a
# layer of our head.
for name, modules in vars(constants).items():
    if name.endswith("_MODULES_MAPPING") and "gemma2" in modules:
        of_decoder = [{"norm": "model.norm"}.get(module, module) for module in modules["gemma2"]]
        modules[GemmaEncoderConfig.model_type] = of_decoder
constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[GemmaEncoderConfig.model_type] = list(TARGET_MODULES)


class GemmaEncoderPeftModel(PeftModelForSequenceClassification):
    """Train and save a Gemma Encoder with adapters; the encoder's config and code are saved beside
    the weights.

    `GemmaEncoderForSequenceClassification.from_pretrained(folder)` loads it again, over the decoder
    it was trained on.
    """

    def save_pretrained(
        self, save_directory: str, safe_serialization: bool = True, selected_adapters: list[str] | None = None, **kwargs
    ) -> None:
        """Save adapters as PEFT does: "default" in `save_directory`, and others in folders of their
        own in it."""
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: pickled weights run code when they are loaded.")
        with all_or_nothing(save_directory) as part:
            if (card := Path(save_directory) / "README.md").exists():  # which PEFT adds to
                part.mkdir()
                shutil.copyfile(card, part / "README.md")
            super().save_pretrained(str(part), selected_adapters=selected_adapters, **kwargs)
            if kwargs.get("is_main_process", True):
                self._save_encoder(part, selected_adapters)

    def _save_encoder(self, save_directory: Path, selected_adapters: list[str] | None) -> None:
        encoder = self.get_base_model()
        encoder.config.architectures, encoder.config.dtype = [type(encoder).__name__], encoder.dtype
        for name in selected_adapters or list(self.peft_config):
            folder = save_directory if name == "default" else save_directory / name
            refuse_stock_head(folder / "adapter_model.safetensors")
            if encoder._auto_class is not None:
                custom_object_save(encoder, folder, config=encoder.config)
            encoder.save_code(folder)
            write_cross_encoder_files(folder)
            encoder.config.save_pretrained(folder)


def refuse_stock_head(path: Path) -> None:
    """Add to an adapter's file the weight that `StockHeadGuard` adds, which sharded and older
    models lack."""
    tensors = load_file(path)
    if any(name.endswith(".score.weight") for name in tensors):
        return
    part = path.with_suffix(".part")
    save_file({**tensors, "base_model.model.score.weight": torch.empty(0)}, part, metadata={"format": "pt"})
    part.replace(path)


def add_lora(
    model: PreTrainedModel,
    r: int = 16,
    alpha: int | None = None,
    dropout: float = 0.05,
    target_modules: list[str] | None = None,
) -> GemmaEncoderPeftModel:
    """Add LoRA to the decoder's linear layers, and train the head and a pooler that has parameters
    in full.

    Head and pooler are trained and saved in fp32. Over a bf16 decoder a pooler is in bf16 as well,
    whose steps are too coarse for small updates.

    Args:
        r: Rank of an update. The default, like that of `dropout`, is our choice.
        alpha: The update is scaled by alpha / r. The default is 2 r, our choice.
        target_modules: Names of the layers. The default is every linear layer of the decoder.

    Raises:
        ValueError: `model` has no head, has an adapter, has no layers of these names, or has
            another vocabulary than the checkpoint it came from.
    """
    target_modules = list(target_modules or TARGET_MODULES)
    refuse_to_adapt(model, target_modules)
    has_parameters = any(True for _ in model.pooler.float().parameters())
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=["classifier", "pooler"] if has_parameters else ["classifier"],
    )
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return GemmaEncoderPeftModel(model, config)


def refuse_to_adapt(model: PreTrainedModel, target_modules: list[str]) -> None:
    """Raise ValueError if LoRA cannot be added to these layers of a model, or not be loaded again."""
    if not hasattr(model, "classifier"):
        raise ValueError(f"{type(model).__name__} has no head to train. Adapt a classifier or a ranker.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` has an adapter already. Merge it first, or train that one with `PeftModel`.")
    named, base = model.name_or_path, model.config
    with suppress(OSError, ValueError):  # it may have moved, or be in a folder or revision of that name
        base = GemmaEncoderConfig.from_pretrained(named) if named else base
    if (size := base.get_text_config().vocab_size) != model.config.vocab_size:
        raise ValueError(
            f"`model` has {model.config.vocab_size} tokens and {named} has {size}, over which the adapter would be "
            "loaded again. Save the resized model first, and adapt that one."
        )
    layers = {name.rpartition(".")[2] for name, _ in model.model.named_modules()}
    if unknown := [name for name in target_modules if name not in layers]:
        raise ValueError(
            f"`target_modules` names layers that the decoder does not have: there are no layers named "
            f"{', '.join(unknown)}. Its linear layers are {', '.join(TARGET_MODULES)}."
        )


def add_lora_alone(model: PreTrainedModel, r: int, alpha: int | None = None, dropout: float = 0.05) -> PeftModel:
    """Add LoRA to the decoder's linear layers and train nothing else, to be merged after
    up-training."""
    alpha = 2 * r if alpha is None else alpha
    return PeftModel(
        model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGET_MODULES))
    )


def merge(adapter: str | Path, folder: str | Path, dtype: torch.dtype = torch.float32, **where) -> PreTrainedModel:
    """Merge an adapter into its decoder, and write the model, its tokenizer and the results of its
    run into `folder`.

    An adapter that was trained over 4-bit weights was trained for those; it is merged into the full
    weights.

    Args:
        adapter: The folder of a training run, or a repository.
        dtype: The dtype of what is written. bfloat16 loses updates that are small beside their
            weights.
        where: `revision`, `token` and others of `from_pretrained`, for the adapter.

    Raises:
        ValueError: `adapter` is not an adapter of a Gemma Encoder, or `folder` holds an adapter,
            which would be applied to the merged model again when it is loaded.
    """
    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: write the merged model elsewhere.")
    if find_adapter(adapter, where) is None:
        raise ValueError(f"{adapter} is no adapter, so there is nothing to merge. Name the folder of an adapter.")
    config = GemmaEncoderConfig.from_pretrained(adapter, **where)
    is_quantized = getattr(config, "quantization_config", None) is not None
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False, **where)
    model = PeftModel.from_pretrained(load_full_base(adapter, config, where), adapter, **where).merge_and_unload()
    model.model.to(dtype)
    model.pooler.to(dtype)  # and the head stays in fp32, as when a model is loaded
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not is_quantized:  # full weights score otherwise than the 4-bit ones that were measured
        copy_results(Path(adapter), Path(folder))
    return model


def load_full_base(adapter: str | Path, config: GemmaEncoderConfig, where: dict[str, Any]) -> PreTrainedModel:
    """
    Load the model that an adapter was trained over, in fp32, whatever it was quantized to.

    Raises:
        ValueError: the adapter's config names no Gemma Encoder class with a head.
    """
    if not (architecture := set(config.architectures or ()) & HEADS.keys()):
        raise ValueError(
            f"The `architectures` in the config of {adapter} must name one of {', '.join(HEADS)}; got "
            f"{config.architectures}. Only adapters of classifiers and rankers can be merged."
        )
    for one in (config, config.text_config):
        vars(one).pop("quantization_config", None)
    base = PeftConfig.from_pretrained(adapter, **where)
    options = {name: value for name, value in where.items() if name not in ("revision", "subfolder")}
    with quiet():
        return HEADS[architecture.pop()].from_pretrained(
            base.base_model_name_or_path, revision=base.revision, config=config, dtype=torch.float32, **options
        )


def copy_results(source: Path, target: Path) -> None:
    """Copy the settings and results of a training run, for a model card; nothing if `source` is of
    no such run."""
    if not (source / "run.json").exists():
        return
    names = ("run.json", "training.json", "results.json", "*/results.json")
    for path in itertools.chain.from_iterable(source.glob(name) for name in names):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def four_bit() -> BitsAndBytesConfig:
    """
    Return the config with which QLoRA loads a decoder: NF4 with double quantization.

    It computes in bf16, or in fp32 on a device that is slow in bf16. Head and pooler are not
    quantized.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if computes_in_bf16(device) else torch.float32,
    )
