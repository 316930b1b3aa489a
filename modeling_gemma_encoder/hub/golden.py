"""Record what a model does when it is published, in `verification.json`, so that anyone can repeat
it.

The record holds texts (golden inputs), their tokens and fp32 outputs, the settings that decide
scores, and the hash of every file. It shows accidents and careless changes. Whoever can write to a
repository can write a new record: see SECURITY.md.
"""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._scripts.files import read, write
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..version import __version__
from .fresh_process import observe

GOLDEN_FILE = "verification.json"
# The record cannot hold its own hash, and people edit the card.
UNHASHED = (GOLDEN_FILE, "README.md", ".gitattributes")
# The type of every field that a comparison reads.
GOLDEN_FIELDS = {
    "inputs": list,
    "settings": dict,
    "reach": list,
    "tokens": list,
    "outputs": list,
    "dtypes": dict,
    "files": dict,
    "class": str,
    "decoder": str,
}

# Longer than many a window, shorter than what small models read.
LONG_TEXT = " ".join(
    f"In {1800 + 7 * n} the {kind} of the old harbour was {done} for the {n + 2}th time."
    for n, (kind, done) in enumerate(
        (kind, done)
        for done in ("painted", "sold", "repaired", "forgotten")
        for kind in ("lighthouse", "customs house", "dry dock", "chapel", "rope walk", "crane", "quay", "school")
    )
)
# Single texts, and pairs, which are put into the tokenizer's template.
INPUTS = [
    "It works.",
    "A gripping, funny and humane film, and the best of its year; I would not have missed a minute of it.",
    LONG_TEXT,
    ["how do cats purr", "Cats purr by vibrating the muscles of their larynx some 25 to 150 times a second."],
    ["how do cats purr", "The harbour froze in January."],
    ["a query", ""],
]


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in parts of 1 MiB."""
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def dtypes(folder: Path) -> dict[str, int]:
    """Return how many tensors of each dtype the weights hold."""
    found = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return dict(sorted(found.items()))


def files_of(folder: Path) -> list[str]:
    """Return the names of all files of a folder, without those that git and downloads keep for
    themselves."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] not in (".cache", ".git"))


def write_golden(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: list | None = None
) -> None:
    """
    Write `verification.json` into a folder that is otherwise complete.

    Args:
        model: As loaded from `folder` in fp32.
        inputs: Texts and pairs of texts, besides `INPUTS`.
    """
    inputs = [*INPUTS, *(inputs or [])]
    found = observe(model, tokenizer, GemmaEncoderConfig.from_pretrained(folder), inputs)
    golden = {"version": __version__, "inputs": inputs, **found, "dtypes": dtypes(folder)}
    golden["files"] = {name: hash_of(folder / name) for name in files_of(folder) if name not in UNHASHED}
    write(folder / GOLDEN_FILE, json.dumps(golden, indent=1))


def read_golden(folder: Path) -> dict:
    """Return what `write_golden` wrote, or {} if it is missing or malformed."""
    try:
        golden = read(folder / GOLDEN_FILE)
    except ValueError:
        return {}
    if not isinstance(golden, dict):
        return {}
    is_sound = all(isinstance(golden.get(name), kind) for name, kind in GOLDEN_FIELDS.items())
    return golden if is_sound else {}
