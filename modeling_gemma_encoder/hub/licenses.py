"""Find the license of a model: that of its decoder, and the files that it asks of whoever publishes
a derivative."""

import importlib.metadata
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.utils import cached_file

from .._scripts.files import is_local
from ..gguf_gemma_encoder import split_gguf

GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
GEMMA_TERMS = "GEMMA_TERMS.html"  # a copy of the terms, beside a checkpoint that `make gemma` made

# The license that Google gives its decoders of each model type.
LICENSES_OF_GOOGLE = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gemma4_text": "apache-2.0"}


def license_of(base: str, decoder: str, given: str | None = None) -> str:
    """Return the license of the weights: `given`, or that of the base model's card, or Google's
    for the decoder's type.

    Args:
        base: The checkpoint that was trained further.
        decoder: The model type of its decoder.

    Raises:
        ValueError: `base` is under the Gemma Terms of Use or a license of Llama, which hold for
            derivatives too, and `given` is another license; or no license is known.
    """
    if card := _card_of(base):
        of_base = card.data.license
    else:  # the base may be gated or out of reach: a card that cannot be read allows nothing
        of_base = LICENSES_OF_GOOGLE.get(decoder) if base.startswith("google/") else None
    binds = of_base is not None and (of_base == "gemma" or of_base.startswith("llama"))
    if binds and given not in (None, of_base):
        name = "the Gemma Terms of Use" if of_base == "gemma" else of_base
        raise ValueError(
            f"--license {given} cannot be given: {base} is under {name}, and so is every model that is made of it."
        )
    if found := given or of_base or LICENSES_OF_GOOGLE.get(decoder):
        return found
    raise ValueError(
        f"The license of {base} is not known: it has no card that names one, and decoders of {decoder} have several. "
        "Give it with --license."
    )


def _card_of(base: str) -> ModelCard | None:
    """Return the card of a repository, of a folder, or of the folder of a GGUF file; None if it
    cannot be read."""
    source, _ = split_gguf(base)
    if is_local(str(source)) and not Path(source).exists():
        return None
    try:
        card = cached_file(str(source), "README.md", _raise_exceptions_for_missing_entries=False)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return None
    return card and ModelCard.load(card, ignore_metadata_errors=True)


def origin_of(base: str | None) -> str | None:
    """Return the repository that a model was made of: of a local checkpoint, the one that its card
    names, or None."""
    source, _ = split_gguf(base)
    if source is None:
        return None
    card, place = _card_of(str(source)), Path(source)
    # `owner/name` may also be a folder that was deleted: then its parent is usually still there.
    if not is_local(str(source)) and (card or place.parent == Path() or not place.parent.is_dir()):
        return source
    found = card and card.data.base_model
    found = found[0] if isinstance(found, list) else found
    return None if not found or is_local(found) else found


def notice(base: str | None, license: str) -> str | None:
    """Return the NOTICE file that the Gemma Terms of Use ask of derivatives (section 3.1), None for
    other licenses."""
    if license != "gemma":
        return None
    by_way = f", by way of {Path(base).name}" if base and Path(base).exists() else ""
    origin = (origin_of(base) or "a Gemma") + by_way
    return (
        f"{GEMMA_NOTICE}\n\nModified files: the weights (*.safetensors) and config.json are derived from {origin}: "
        "attention was changed, a pooler and a head were added, and the weights were trained further. tokenizer.json "
        "may carry another template.\nThe code (*.py) is not derived from Gemma and is under the Apache License 2.0, "
        "see LICENSE."
    )


def code_license() -> str:
    """Return the text of the Apache License, as installed with this package."""
    beside = Path(__file__).parent.parent.parent / "LICENSE"
    if beside.is_file():
        return beside.read_text()
    files = importlib.metadata.files("gemma-encoder") or []
    return next(file for file in files if file.name == "LICENSE").read_text()
