"""What a checkpoint may be: safetensors only, whole, and nothing but itself. Writing one is all or nothing.

The threats these rules are about are in SECURITY.md.
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

# Quantised weights whose loader fetches no kernels from the Hub.
QUANTIZATIONS = ("bitsandbytes", "torchao")
# What a config file could name and only whoever loads it may choose: some of these load code from the Hub.
CALLERS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
# A model's or an adapter's weights: one file, or parts and their index.
WEIGHTS = re.compile(r"(?P<stem>(adapter_)?model(\.[\w-]+)?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Parts of a model besides the decoder, by the class that it was saved from, and the options that shape them.
PARTS = {
    "GemmaEncoderModel": ("pooler",),
    "GemmaEncoderForSequenceClassification": ("pooler", "classifier"),
    "GemmaEncoderForRanking": ("pooler", "classifier"),
}
CLASSES = (*PARTS, "GemmaEncoderForMaskedLM")  # all that a checkpoint of ours may be saved from
SHAPES = ("pooling", "pooling_num_probes", "pooling_num_heads", "classifier_hidden_sizes", "num_labels")


def only_settings(config_dict: dict[str, Any]) -> dict[str, Any]:
    """
    A config file's content without what is the caller's to choose, here and in its `text_config`.

    Raises:
        ValueError: it asks for quantised weights of a kind whose loader may fetch code.
    """
    kept = {name: value for name, value in config_dict.items() if name not in CALLERS}
    if dropped := [name for name in config_dict if name in CALLERS and config_dict[name] is not None]:
        logger.warning(f"Ignored `{', '.join(dropped)}` of the config file: pass `attn_implementation` when loading.")
    quantization = kept.get("quantization_config") or {}
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else "bitsandbytes"
    if method not in QUANTIZATIONS:
        raise ValueError(
            f"The config file has quantization_config of quant_method={method!r}; {' and '.join(QUANTIZATIONS)} can "
            "be loaded. Convert the checkpoint to plain safetensors first."
        )
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = only_settings(kept["text_config"])
    return kept


def refuse_paths(folder: Path) -> None:
    """Raises ValueError where the index of a local checkpoint names files outside of it."""
    for index in folder.glob("*.safetensors.index.json"):
        for name in set(json.loads(index.read_text())["weight_map"].values()):
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not a file of the checkpoint's own folder.")


def refuse_incomplete(
    source, missing: list[str], unexpected: list[str], saved: PreTrainedConfig, loaded: PreTrainedConfig
) -> None:
    """
    Raises ValueError where weights do not match their own config. Upstream makes up what is missing, and warns.

    Args:
        missing, unexpected: Parameter names: of the model and not in the files; in the files and not of the model.
        saved: The config that `source` came with.
        loaded: The one that the model was built with.
    """
    same = all(getattr(saved, name) == getattr(loaded, name) for name in SHAPES)
    parts = PARTS.get((saved.architectures or [""])[0], ()) if same else ()
    lost = sorted(name for name in missing if name.split(".")[0] in ("model", *parts))
    if any(name.endswith(".weight_scale") for name in lost):
        raise ValueError(
            f"{source} has no int8 weights (weight_scale), as `int8_weights=True` says of a checkpoint: load it as it "
            "is, then call `quantize_int8(model)`."
        )
    if "lm_head.weight" in missing:
        raise ValueError(
            f"{source} has no lm_head, the matrix of its own by which its decoder predicts tokens: a classifier's or "
            "ranker's checkpoint lost it. Load the decoder itself, or what was saved as a masked language model."
        )
    if lost and saved.num_hidden_layers < loaded.num_hidden_layers:
        raise ValueError(
            f"`num_hidden_layers` is {loaded.num_hidden_layers}, and {source} has {saved.num_hidden_layers}."
        )
    if lost:
        raise ValueError(
            f"{source} lacks {len(lost)} weights that its config.json promises: {', '.join(lost[:3])}"
            f"{' ...' if len(lost) > 3 else ''}. The file is cut short or not this model's: download or save it again."
        )
    same = saved.text_config.to_dict() == loaded.text_config.to_dict()
    extra = sorted(name for name in unexpected if name.startswith("model."))
    if extra and saved.architectures and same:
        raise ValueError(
            f"{source} has {len(extra)} weights that its config.json knows nothing of: {', '.join(extra[:3])}"
            f"{' ...' if len(extra) > 3 else ''}. Config and weights are of different models."
        )


def refuse_other_class(source, saved: PreTrainedConfig, model_class: type) -> None:
    """Raise ValueError where a user's own class, which may pool in its own way, was saved, and another one loads."""
    known = {*CLASSES, *(parent.__name__ for parent in model_class.__mro__)}
    if others := [name for name in saved.architectures or () if name not in known]:
        raise ValueError(
            f"{source} was saved by {others[0]}, a class of its own, whose scores {model_class.__name__} may not have. "
            f"Load it with {others[0]}.from_pretrained, or, if its code was saved, with `trust_remote_code=True` in a "
            f"process that has not imported this package. architectures=[{model_class.__name__!r}] takes its weights."
        )


@contextmanager
def all_or_nothing(folder: str | Path) -> Iterator[Path]:
    """
    A place to write a checkpoint. Its files take their places in `folder` when all are written; when writing is
    interrupted, the old ones are as they were. Old weights in another number of files are removed.
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
    stems = {match["stem"] for name in written if (match := WEIGHTS.fullmatch(name))}
    for path in folder.iterdir():
        match = WEIGHTS.fullmatch(path.name)
        if match and match["stem"] in stems and path.name not in written:
            path.unlink()
        elif stems and path.name.startswith(".saving-") and any(path.iterdir()):  # of a process that was killed
            shutil.rmtree(path, ignore_errors=True)
