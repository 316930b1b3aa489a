"""Adapters: a decoder that stays as it is, a few weights beside it, and a head and pooler that are trained in full.

LoRA: arXiv 2106.09685; on every linear layer and over 4-bit weights: QLoRA, arXiv 2305.14314. Importing this module
tells PEFT which layers of a Gemma Encoder to adapt.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForSequenceClassification, prepare_model_for_kbit_training
from peft.utils import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .checkpoint_gemma_encoder import all_or_nothing
from .configuration_gemma_encoder import GemmaEncoderConfig
from .modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from .peft_gemma_encoder import write_cross_encoder_files
from .precision_gemma_encoder import computes_in_bf16
from .pretrained_gemma_encoder import find_adapter, quiet

HEADS = {model.__name__: model for model in (GemmaEncoderForSequenceClassification, GemmaEncoderForRanking)}

# Every linear layer of the decoder, as QLoRA found best (section 4, figure 2); our choice of default.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of PEFT's other methods the layers that it has them adapt in Gemma 2. Our head too has a layer that is named "norm".
for name, modules in vars(constants).items():
    if name.endswith("_MODULES_MAPPING") and "gemma2" in modules:
        of_decoder = [{"norm": "model.norm"}.get(module, module) for module in modules["gemma2"]]
        modules[GemmaEncoderConfig.model_type] = of_decoder
constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[GemmaEncoderConfig.model_type] = list(TARGET_MODULES)


class GemmaEncoderPeftModel(PeftModelForSequenceClassification):
    """A Gemma Encoder with adapters, saved with the encoder's config and code beside the adapter's weights.

    `GemmaEncoderForSequenceClassification.from_pretrained(folder)` loads it again, over the decoder it was trained on.
    """

    def save_pretrained(
        self, save_directory: str, safe_serialization: bool = True, selected_adapters: list[str] | None = None, **kwargs
    ) -> None:
        """As PEFT; adapters of other names than "default" have folders of their own in `save_directory`."""
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
    """Add to an adapter's weights what `StockHeadGuard` adds, where PEFT did not: of sharded and of older models."""
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
    """
    LoRA on the decoder's linear layers; the head, and a pooler that has parameters, are trained and saved in full, in
    fp32: over a bf16 decoder a pooler is in bf16 too, whose steps are too coarse for small updates.

    Args:
        r: Rank of an update; 16, as `dropout`, is our choice.
        alpha: The update is scaled by alpha / r. Default: 2 r, our choice.
        target_modules: Names of the layers. Default: every linear layer of the decoder.

    Raises:
        ValueError: `model` has no layers of these names, no head, or a vocabulary that its checkpoint does not have.
    """
    if not hasattr(model, "classifier"):
        raise ValueError(f"{type(model).__name__} has no head to train; adapt a classifier or a ranker.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` has an adapter already: merge it first, or train that one with `PeftModel`.")
    named, base = model.name_or_path, model.config
    with suppress(OSError, ValueError):  # it may not be where it was, or in a folder or revision of that name
        base = GemmaEncoderConfig.from_pretrained(named) if named else base
    if (size := base.get_text_config().vocab_size) != model.config.vocab_size:
        raise ValueError(
            f"`model` has {model.config.vocab_size} tokens and {named} has {size}, over which the adapter "
            "would be loaded again: save the resized model first, and adapt that one."
        )
    target_modules = list(target_modules or TARGET_MODULES)
    layers = {name.rpartition(".")[2] for name, _ in model.model.named_modules()}
    if unknown := [name for name in target_modules if name not in layers]:
        known = ", ".join(TARGET_MODULES)
        raise ValueError(f"`target_modules`: the decoder has no layers named {', '.join(unknown)}; it has {known}.")
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


def add_lora_alone(model: PreTrainedModel, r: int, alpha: int | None = None, dropout: float = 0.05) -> PeftModel:
    """LoRA on the decoder's linear layers and nothing else trained, to be merged: of up-training. As `add_lora`."""
    alpha = 2 * r if alpha is None else alpha
    return PeftModel(
        model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGET_MODULES))
    )


def merge(adapter: str | Path, folder: str | Path, dtype: torch.dtype = torch.float32, **where) -> PreTrainedModel:
    """
    Writes a model without adapters into `folder`: its decoder, with what the adapter learned, head, pooler and
    tokenizer, and what our scripts left beside the adapter, for a card. Over 4-bit weights the adapter was trained for
    those; here it is added to the whole ones.

    Args:
        adapter: A folder that training left, or a repository.
        dtype: Of what is written; bfloat16 loses updates that are small beside their weights.
        where: `revision`, `token` and others of `from_pretrained`, of the adapter.

    Raises:
        ValueError: `adapter` is none, or none of a Gemma Encoder; `folder` holds an adapter, which would be applied
            to the merged model again when it is loaded.
    """
    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: write the merged model elsewhere.")
    if find_adapter(adapter, where) is None:
        raise ValueError(f"{adapter} is no adapter: there is nothing to merge.")
    config = GemmaEncoderConfig.from_pretrained(adapter, **where)
    if not (architecture := set(config.architectures or ()) & HEADS.keys()):
        raise ValueError(f"{adapter} says of no head of ours that it adapts it, but of {config.architectures}.")
    quantized = getattr(config, "quantization_config", None) is not None
    for one in (config, config.text_config):
        vars(one).pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False, **where)
    base = PeftConfig.from_pretrained(adapter, **where)
    of_both = {name: value for name, value in where.items() if name not in ("revision", "subfolder")}
    with quiet():
        model = HEADS[architecture.pop()].from_pretrained(
            base.base_model_name_or_path, revision=base.revision, config=config, dtype=torch.float32, **of_both
        )
    model = PeftModel.from_pretrained(model, adapter, **where).merge_and_unload()
    model.model.to(dtype)
    model.pooler.to(dtype)  # and the head stays in fp32, as when a model is loaded
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    begun = Path(adapter) / "run.json"
    results = [path for where in (".", "*") for path in Path(adapter).glob(f"{where}/results.json")]
    if begun.exists() and not quantized:  # whole weights score otherwise than the 4-bit ones that were measured
        for path in (begun, *Path(adapter).glob("training.json"), *results):
            (Path(folder) / path.relative_to(adapter).parent).mkdir(exist_ok=True)
            shutil.copyfile(path, Path(folder) / path.relative_to(adapter))
    return model


def four_bit() -> BitsAndBytesConfig:
    """
    Return how QLoRA loads a decoder: NF4 with double quantization, computing in bf16, or in fp32 on a device that is
    slow in bf16. Head and pooler stay as they are.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if computes_in_bf16(device) else torch.float32,
    )
