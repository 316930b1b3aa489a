"""Under which licence a model is: its decoder's, and what that asks of who publishes something made of it."""

import importlib.metadata
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.utils import cached_file

from .._scripts.files import is_local
from ..gguf_gemma_encoder import split_gguf

GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
GEMMA_TERMS = "GEMMA_TERMS.html"  # a copy of them, beside a checkpoint that `make gemma` made

OF_GOOGLE = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gemma4_text": "apache-2.0"}


def licence_of(base: str, decoder: str, given: str | None = None) -> str:
    """
    Of the weights: what is given; or what the base model's card says; or what Google says of such decoders.

    Raises:
        ValueError: the base is under the Gemma Terms or a licence of Llama's, which hold for what is made of it, and
            `given` is another; or none of these says anything.
    """
    if card := _card_of(base):
        of_base = card.data.license
    else:  # gated, or out of reach: what cannot be read allows nothing
        of_base = OF_GOOGLE.get(decoder) if base.startswith("google/") else None
    holds = of_base and (of_base == "gemma" or of_base.startswith("llama"))
    if holds and given not in (None, of_base):
        name = "the Gemma Terms of Use" if of_base == "gemma" else of_base
        raise ValueError(f"--license {given}: {base} is under {name}, and so is what is made of it.")
    if found := given or of_base or OF_GOOGLE.get(decoder):
        return found
    raise ValueError(f"{base} has no card that names its licence, and decoders of {decoder} have several: --license.")


def _card_of(base: str) -> ModelCard | None:
    """The card of a repository, of a folder, or of where a GGUF file is; None where it cannot be read."""
    source, _ = split_gguf(base)
    if is_local(str(source)) and not Path(source).exists():
        return None
    try:
        card = cached_file(str(source), "README.md", _raise_exceptions_for_missing_entries=False)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return None
    return card and ModelCard.load(card, ignore_metadata_errors=True)


def origin_of(base: str | None) -> str | None:
    """Return the repository that a model is made of: for a local checkpoint, what its card names, None without one."""
    source, _ = split_gguf(base)
    if source is None:
        return None
    card, place = _card_of(str(source)), Path(source)
    if not is_local(str(source)) and (card or place.parent == Path() or not place.parent.is_dir()):
        return source  # and not a folder that was deleted since, from one that is still there
    found = card and card.data.base_model
    found = found[0] if isinstance(found, list) else found
    return None if not found or is_local(found) else found


def notice(base: str | None, licence: str) -> str | None:
    """The NOTICE file that the Gemma Terms of Use (section 3.1) ask of derivatives, with the changes said."""
    if licence != "gemma":
        return None
    by_way = f", by way of {Path(base).name}" if base and Path(base).exists() else ""
    origin = (origin_of(base) or "a Gemma") + by_way
    return (
        f"{GEMMA_NOTICE}\n\nModified files: the weights (*.safetensors) and config.json are derived from {origin}: "
        "attention was changed, a pooler and a head were added, and the weights were trained further. tokenizer.json "
        "may carry another template.\nThe code (*.py) is not derived from Gemma and is under the Apache License 2.0, "
        "see LICENSE."
    )


def code_licence() -> str:
    """The text of the Apache License, as installed with this package."""
    beside = Path(__file__).parent.parent.parent / "LICENSE"
    if beside.is_file():
        return beside.read_text()
    files = importlib.metadata.files("gemma-encoder") or []
    return next(file for file in files if file.name == "LICENSE").read_text()
