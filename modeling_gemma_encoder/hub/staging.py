"""Put together a folder that stands on its own: weights, config, code, tokenizer, licenses, card,
golden outputs."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import modeling_gemma_encoder
from .._scripts.files import is_local, write
from ..adapter_gemma_encoder import find_adapter
from ..checkpoints import load_tokenizer
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..gguf_gemma_encoder import split_gguf
from ..peft_gemma_encoder import write_cross_encoder_files
from .file_checks import CODE, PACKAGE
from .golden import dtypes, write_golden
from .licenses import GEMMA_TERMS, code_license, license_of, notice
from .model_card import CardRequest, ModelFacts, make_card
from .run_record import RunRecord


@dataclass(frozen=True)
class Staged:
    """Hold a folder that is ready to be published, and how its card is made again once the commit
    is known."""

    folder: Path
    request: CardRequest
    model: ModelFacts

    @property
    def names(self) -> list[str]:
        """Return the names of all files of the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def write_card(self, revision: str | None) -> None:
        """Write README.md, whose snippets pin the commit `revision`."""
        write(self.folder / "README.md", str(make_card(self.request, self.model, revision)))


@dataclass(frozen=True)
class Trained:
    """Hold what a training left: a model or an adapter, not yet loaded."""

    source: str
    config: GemmaEncoderConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: dict  # adapter_config.json; {} of a model
    base: str | None
    license: str  # of the weights

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Return the class that the config names."""
        return getattr(modeling_gemma_encoder, self.config.architectures[0])


def stage(
    source: str,
    folder: Path,
    repo_id: str,
    template: Path,
    run: RunRecord,
    base: str | None = None,
    base_revision: str | None = None,
    licence: str | None = None,
    dtype: str | None = None,
    inputs: list | None = None,
    language: list[str] | None = None,
    limits: str | None = None,
    max_shard_size: str = "5GB",
) -> Staged:
    """Put everything that is published of the trained model or adapter `source` into a new or
    empty `folder`.

    Args:
        base: The checkpoint it was made of. Default: what it names itself; without any, `licence`
            is needed.
        base_revision: Commit of the base that an adapter is loaded over from now on.
        licence: License of the weights. Default: the base's.
        inputs: Golden inputs besides our own.

    Raises:
        ValueError: `source` is untrained, lacks a tokenizer, a known license or a public base, or
            `folder` has files.
    """
    part = _make_part_folder(Path(folder))
    trained = _read_trained(source, base, licence)
    if trained.adapter:
        _stage_adapter(trained, part, base_revision)
    else:
        _stage_weights(trained, part, dtype, max_shard_size)
    _stage_tokenizer(trained.tokenizer, part)
    _stage_licenses(trained, part)
    request = CardRequest(template, repo_id, run, language, limits)
    return _finish(trained, part, Path(folder), request, inputs)


def _make_part_folder(target: Path) -> Path:
    """Return an empty folder beside `target`, which takes its name when it is complete."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"`folder` (--output_dir) {target} is not empty: give a new or an empty folder.")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def _read_trained(source: str, base: str | None, given_license: str | None) -> Trained:
    """Read config and tokenizer of a training's output, and find out its base and license."""
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        models = sorted(str(path.parent) for path in Path(source).glob("**/config.json"))
        raise ValueError(
            f"{source} has no config.json, so it is no model; below it are: {', '.join(models) or 'none'}."
        )
    adapter = find_adapter(source, {}) or {}
    config = GemmaEncoderConfig.from_pretrained(source)
    if not config.architectures:
        raise ValueError(f"{source} is a decoder as it is, and no encoder: train an encoder of it first.")
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} has no tokenizer. Save the tokenizer beside the model: the template is in it."
        ) from error
    base = base or adapter.get("base_model_name_or_path") or config.text_config._name_or_path or None
    if base is None and given_license is None:
        raise ValueError(
            f"{source} does not say which decoder it was made of. Give that decoder as `base` (--base_model), since "
            "its license holds for the model, or, for a decoder of your own, a license as `licence` (--license)."
        )
    license = license_of(base, config.text_config.model_type, given_license) if base else given_license
    return Trained(source, config, tokenizer, adapter, base, license)


def _stage_weights(trained: Trained, folder: Path, dtype: str | None, max_shard_size: str) -> None:
    """Save a model's weights, config and code, as `save_pretrained` does."""
    form = {"dtype": getattr(torch, dtype)} if dtype else {}
    model, loading = trained.model_class.from_pretrained(trained.source, output_loading_info=True, **form)
    if new := sorted(loading["missing_keys"]):
        raise ValueError(f"{trained.source} is not trained: {', '.join(new)} would be random.")
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def _stage_adapter(trained: Trained, folder: Path, revision: str | None) -> None:
    """Copy an adapter, pin the commit of its base, and add config and code."""
    from ..adapters import refuse_stock_head  # needs PEFT

    base = trained.base
    if is_local(base) or split_gguf(base)[1] is not None:
        raise ValueError(
            f"The adapter was trained over {base}, which others do not have or PEFT does not read. Publish that "
            "decoder first (examples/convert_gguf.py makes a checkpoint of a GGUF file) and give its repository as "
            "`base` (--base_model), or merge the adapter."
        )
    weights = folder / "adapter_model.safetensors"
    shutil.copyfile(transformers.utils.cached_file(trained.source, weights.name), weights)
    refuse_stock_head(weights)
    # A branch could be moved to other weights, a commit cannot.
    revision = revision or trained.adapter.get("revision") or HfApi().model_info(base).sha
    adapter = {**trained.adapter, "base_model_name_or_path": base, "revision": revision}
    adapter.pop("auto_mapping", None)
    write(folder / "adapter_config.json", json.dumps(adapter, indent=2))
    trained.config.save_pretrained(folder)
    write_cross_encoder_files(folder)
    for name in CODE:
        shutil.copyfile(PACKAGE / name, folder / name)


def _stage_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer without the truncation and padding that its last call left in it."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def _stage_licenses(trained: Trained, folder: Path) -> None:
    """Write the code's license and what the license of the weights asks for."""
    write(folder / "LICENSE", code_license().rstrip("\n"))
    if text := notice(trained.base, trained.license):
        write(folder / "NOTICE", text)
        if trained.base and (terms := Path(trained.base) / GEMMA_TERMS).is_file():
            shutil.copyfile(terms, folder / GEMMA_TERMS)


def _finish(trained: Trained, part: Path, target: Path, request: CardRequest, inputs: list | None) -> Staged:
    """Write the card and the golden outputs of what was staged, and give the folder its name."""
    model = trained.model_class.from_pretrained(part, dtype=torch.float32).eval()
    model.config.architectures = trained.config.architectures
    facts = ModelFacts(
        config=model.config,
        tokenizer=trained.tokenizer,
        base=trained.base,
        license=trained.license,
        parameters=model.num_parameters(),
        dtypes=dtypes(part),
        adapter=bool(trained.adapter),
    )
    Staged(part, request, facts).write_card(None)
    write_golden(part, model, trained.tokenizer, inputs)
    if target.exists():
        target.rmdir()
    return Staged(part.rename(target), request, facts)
