"""Reading an adapter: where it is, the options it was trained with, and its weights.

An adapter's folder holds PEFT's `adapter_config.json`, the weights in `adapter_model.safetensors`,
and the encoder's `config.json`. PEFT names the weights `base_model.model.<parameter>`, without the
name of the adapter.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, logging

from .checkpoint_gemma_encoder import TRAINED_OPTIONS
from .gguf_gemma_encoder import split_gguf
from .peft_gemma_encoder import WITHIN_PEFT, parts_with_weights

# Files that make a folder a whole model: its weights, or the index of their parts.
WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the report that a decoder has no head, which an adapter or a checkpoint is about to
    bring."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def find_adapter(path: Any, where: dict[str, Any]) -> dict[str, Any] | None:
    """Return the PEFT config at `path`; None if there is none, or if the folder also holds a whole
    model."""
    if not isinstance(path, str | Path) or split_gguf(path)[1] is not None:
        return None
    folder = Path(path) / where.get("subfolder", "")
    if any((folder / name).exists() for name in WHOLE_MODEL):
        return None
    if folder.is_dir():
        file = folder / "adapter_config.json"
        return json.loads(file.read_text()) if file.is_file() else None
    file = find_adapter_config_file(str(path), **where)
    return None if file is None else json.loads(Path(file).read_text())


@dataclass(frozen=True)
class Adapter:
    """Locate an adapter in a folder or a repository; `where` holds the options of `cached_file`."""

    path: str | Path
    where: dict[str, Any]
    peft_config: dict[str, Any]

    @classmethod
    def find(cls, path: Any, where: dict[str, Any]) -> "Adapter | None":
        """Return the adapter at `path`, or None if there is none."""
        if not (peft_config := find_adapter(path, where)):
            return None
        folder = Path(path) / where.get("subfolder", "")
        if folder.is_dir():
            return cls(folder, {name: where[name] for name in where if name != "subfolder"}, peft_config)
        return cls(path, where, peft_config)

    @property
    def base(self) -> str:
        """Return the folder or repository of the decoder that the adapter was trained over."""
        return self.peft_config["base_model_name_or_path"]

    @property
    def base_options(self) -> dict[str, Any]:
        """Return the options with which `base` is loaded."""
        options = {name: self.where[name] for name in self.where if name not in ("revision", "subfolder")}
        return {**options, "revision": self.peft_config.get("revision") or "main"}

    def weights_file(self) -> str:
        """
        Return the path of the adapter's weights, downloaded if need be.

        Raises:
            OSError: there are no safetensors. Pickled weights are never read.
        """
        return cached_file(self.path, "adapter_model.safetensors", **self.where)


def refuse_plain_adapter(adapter: Adapter, model_type: str) -> None:
    """Raise ValueError if no config of a `model_type` lies beside the adapter."""
    file = cached_file(adapter.path, "config.json", **adapter.where, _raise_exceptions_for_missing_entries=False)
    if file is None or json.loads(Path(file).read_text()).get("model_type") != model_type:
        raise ValueError(
            f"{adapter.path} is an adapter without an encoder's config.json, which says how the encoder attends and "
            "pools. Load the base model with the options the adapter was trained with, and the adapter with "
            "`PeftModel.from_pretrained`."
        )


def refuse_other_options(adapter: Adapter, given: PreTrainedConfig, trained: PreTrainedConfig) -> None:
    """Raise ValueError if `given` has other options than the adapter was `trained` with."""
    for name in TRAINED_OPTIONS:
        if (value := getattr(given, name)) != (right := getattr(trained, name)):
            raise ValueError(
                f"{adapter.path} was trained with {name}={right!r} and cannot be loaded with {name}={value!r}. Leave "
                f"`{name}` out."
            )


def refuse_lost_weights(adapter: Adapter, model: nn.Module, saved: dict[str, torch.Tensor], missing: set[str]) -> None:
    """
    Raise ValueError if an adapter's file lacks weights of the model.

    Args:
        saved: The weights in the file.
        missing: Names of the adapter's parameters that were not found in the file.
    """
    lost = [name for name in parts_with_weights(model) if not any(f".{name}." in key for key in saved)]
    if lost or missing:
        raise ValueError(
            f"{adapter.path} lacks the weights of {', '.join([*lost, *sorted(missing)])}. A head and a pooler are "
            'saved with an adapter if its LoraConfig has `modules_to_save=["classifier", "pooler"]`.'
        )


def restore_precision(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Give the parameters of a loaded adapter the values and the dtype that were saved.

    Over a bf16 or 4-bit decoder upstream rounds them to bf16.
    """
    peft = import_module("peft")  # an import statement would make every checkpoint ask for it
    parameters = peft.get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), save_embedding_layers=False
    )
    for name, parameter in parameters.items():
        weight = saved.get(WITHIN_PEFT + name)
        if weight is not None and weight.dtype != parameter.dtype:
            parameter.data = weight.to(parameter.device)
