"""Rules for checkpoints: safetensors only, complete, and without files from outside. Writing one is
all or nothing.

SECURITY.md says which threats these rules are against.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Quantized weights whose loader fetches no kernels from the Hub.
QUANTIZATIONS = ("bitsandbytes", "torchao")
# Settings that only the caller may choose, and no config file: some of them load code from the Hub.
CALLERS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
# A model's or an adapter's weights: one file, or parts and their index.
WEIGHTS = re.compile(r"(?P<stem>(adapter_)?model(\.[\w-]+)?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Parts of a model besides the decoder, by the class that it was saved from.
PARTS = {
    "GemmaEncoderModel": ("pooler",),
    "GemmaEncoderForSequenceClassification": ("pooler", "classifier"),
    "GemmaEncoderForRanking": ("pooler", "classifier"),
}
CLASSES = (*PARTS, "GemmaEncoderForMaskedLM")  # classes that save checkpoints of encoders
POOLING_OPTIONS = ("pooling", "pooling_num_probes", "pooling_num_heads")
# Options that decide which weights a pooler and a head have.
WEIGHT_OPTIONS = (*POOLING_OPTIONS, "classifier_hidden_sizes", "num_labels")
# Options that decide what trained weights compute: with others an adapter would load, and score
# otherwise.
TRAINED_OPTIONS = (*POOLING_OPTIONS, "pooling_k", "attention", "attention_window", "label_mean", "label_std")


def only_settings(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a config file's content, and that of its `text_config`, without the settings that
    only the caller may choose.

    Raises:
        ValueError: the file asks for a kind of quantized weights whose loader may fetch code.
    """
    kept = {name: value for name, value in config_dict.items() if name not in CALLERS}
    if dropped := [name for name in config_dict if name in CALLERS and config_dict[name] is not None]:
        logger.warning(f"Ignored `{', '.join(dropped)}` of the config file: pass `attn_implementation` when loading.")
    quantization = kept.get("quantization_config") or {}
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else "bitsandbytes"
    if method not in QUANTIZATIONS:
        raise ValueError(
            f"`quant_method` in the config file's `quantization_config` must be one of {', '.join(QUANTIZATIONS)}; got "
            f"quant_method={method!r}. Convert the checkpoint to plain safetensors first."
        )
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = only_settings(kept["text_config"])
    return kept


def refuse_paths(folder: Path) -> None:
    """Raise ValueError if the index of a local checkpoint names files outside of its folder."""
    for index in folder.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text())["weight_map"].values()):
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not a file of the checkpoint's own folder.")


def refuse_model_with_adapter(folder: Path) -> None:
    """Raise ValueError if a folder of a whole model also holds an adapter, which upstream would
    apply to it."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a whole model and an adapter, which would be applied to it. Keep one of them: "
            "model.safetensors, or adapter_config.json and adapter_model.safetensors."
        )


def refuse_incomplete(
    source, missing: list[str], unexpected: list[str], saved: PreTrainedConfig, loaded: PreTrainedConfig
) -> None:
    """Raise ValueError if the weights of a checkpoint do not match its config. Upstream only
    warns, and draws new ones.

    Args:
        source: The checkpoint's folder or repository.
        missing: Names of parameters that the model has and the files lack.
        unexpected: Names of parameters that the files have and the model lacks.
        saved: The config of the checkpoint.
        loaded: The config that the model was built with.
    """
    same = all(getattr(saved, name) == getattr(loaded, name) for name in WEIGHT_OPTIONS)
    parts = PARTS.get((saved.architectures or [""])[0], ()) if same else ()
    lost = sorted(name for name in missing if name.split(".")[0] in ("model", *parts))
    if any(name.endswith(".weight_scale") for name in lost):
        raise ValueError(
            f"{source} has no int8 weights (weight_scale), and `int8_weights=True` says that a checkpoint has them. "
            "Load it without, then call `quantize_int8(model)`."
        )
    if "lm_head.weight" in missing:
        raise ValueError(
            f"{source} has no lm_head, the matrix with which its decoder predicts tokens. Checkpoints of classifiers "
            "and rankers do not keep it. Load the decoder itself, or a checkpoint of a masked language model."
        )
    if lost and saved.num_hidden_layers < loaded.num_hidden_layers:
        raise ValueError(
            f"`num_hidden_layers` is {loaded.num_hidden_layers}, and {source} has {saved.num_hidden_layers} layers. "
            "Pass no more than it has."
        )
    if lost:
        raise ValueError(
            f"{source} lacks {len(lost)} weights of the model that its config.json describes: {_few(lost)}. The file "
            "is cut short, or of another model. Download or save it again."
        )
    if saved.architectures and saved.text_config.to_dict() == loaded.text_config.to_dict():
        _refuse_unexpected(source, unexpected)


def _refuse_unexpected(source, unexpected: list[str]) -> None:
    """Raise ValueError if a checkpoint has weights of a decoder other than its own config's."""
    extra = sorted(name for name in unexpected if name.startswith("model."))
    if extra:
        raise ValueError(
            f"{source} has {len(extra)} weights that the model of its config.json does not have: {_few(extra)}. Config "
            "and weights are of different models. Save them together."
        )


def _few(names: list[str]) -> str:
    """Return the first names of a list as text."""
    return ", ".join(names if len(names) <= 3 else [*names[:3], "..."])


def refuse_other_class(source, saved: PreTrainedConfig, model_class: type) -> None:
    """Raise ValueError if a user's own class was saved and another class loads it, which may pool
    in another way."""
    known = {*CLASSES, *(parent.__name__ for parent in model_class.__mro__)}
    if others := [name for name in saved.architectures or () if name not in known]:
        raise ValueError(
            f"{source} was saved by {others[0]}, a class of a user, and {model_class.__name__} may give other scores. "
            f"Load it with {others[0]}.from_pretrained, or, if its code was saved, with `trust_remote_code=True` in a "
            "process that has not imported this package. To load its weights alone, pass "
            f"architectures=[{model_class.__name__!r}]."
        )


@contextmanager
def all_or_nothing(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write a checkpoint into, whose files are moved to `folder` when all of them
    are written.

    If writing is interrupted, the old files stay as they were. Old weights in another number of
    files are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".saving-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        files = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (bool(WEIGHTS.fullmatch(file.name)), file.suffix == ".json")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / file, folder / file)
        _remove_stale(folder, {file.name for file in files if len(file.parts) == 1})
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Remove the weights of an earlier checkpoint that the one just written does not have."""
    stems = {match["stem"] for name in written if (match := WEIGHTS.fullmatch(name))}
    for path in folder.iterdir():
        match = WEIGHTS.fullmatch(path.name)
        if match and match["stem"] in stems and path.name not in written:
            path.unlink()
        elif stems and path.name.startswith(".saving-") and any(path.iterdir()):  # of a process that was killed
            shutil.rmtree(path, ignore_errors=True)
