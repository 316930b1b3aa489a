"""Check the files of a published folder before any of its code runs: their names, hashes and the
code they name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from .._scripts.files import read
from ..peft_gemma_encoder import CROSS_ENCODER_FILES
from ..version import __version__
from .golden import GOLDEN_FILE, UNHASHED, hash_of
from .licenses import GEMMA_TERMS

PACKAGE = Path(__file__).parent.parent
STARRED = "_gemma_encoder.py"  # how the names of the code files end that travel with a checkpoint
CODE = sorted(path.name for path in PACKAGE.glob(f"*{STARRED}"))
# What a published folder may hold: the ends of names.
KINDS = (".py", ".json", ".jsonl", ".safetensors", ".md", ".txt", ".model", ".jinja", ".png", ".gitattributes")
KINDS += ("LICENSE", "NOTICE", GEMMA_TERMS, ".gitignore")
# Keys of a JSON file by which transformers loads code, from the folder or from elsewhere.
CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines", "configuration_files", "custom_generate")


@dataclass
class Check:
    """Hold the result of one check: one row of the table that `verify` prints."""

    name: str
    passed: bool
    found: str

    def __str__(self):
        return f"{'ok' if self.passed else 'FAILED':<12} {self.name:<24} {self.found}"


def published_code(golden: dict) -> list[str]:
    """Return the names of the code files that a checkpoint was published with; without a record, of
    those installed."""
    return sorted(name for name in golden["files"] if name.endswith(".py")) if golden else CODE


def check_files(folder: Path, names: list[str], golden: dict) -> Iterator[Check]:
    """Yield whether all files are there and of known kinds, whether they are as published, and
    whether a card is."""
    yield _check_names(names, golden)
    if not golden:
        yield Check("golden outputs", False, f"no sound {GOLDEN_FILE}: nothing to compare with")
        return
    yield _check_hashes(folder, names, golden["files"])
    yield _check_card(folder / "README.md")


def _check_names(names: list[str], golden: dict) -> Check:
    """Return whether all files that a model needs are there, and no others than known kinds."""
    is_adapter = "adapter_config.json" in names
    weights = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    # Large weights are several files with an index, adapters are always one.
    has_weights = weights in names or (not is_adapter and f"{weights}.index.json" in names)
    needed = [*published_code(golden), "README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json"]
    lost = [name for name in needed if name not in names]
    if not has_weights:
        lost.append(weights)
    unknown = [name for name in names if not name.endswith(KINDS)]
    found = [*(f"no {name}" for name in lost), *(f"of no kind known here: {name}" for name in unknown)]
    return Check("files", not found, ", ".join(found) or f"{len(names)} files, weights in safetensors only")


def _check_hashes(folder: Path, names: list[str], hashes: dict[str, str]) -> Check:
    """Return whether the files are those of the record, with the same contents."""
    missing = [name for name in hashes if not (folder / name).is_file()]
    changed = [name for name in hashes if name not in missing and hash_of(folder / name) != hashes[name]]
    new = [name for name in names if name not in hashes and name not in UNHASHED]
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} differs" for name in changed]
    wrong += [f"{name} is new" for name in new]
    return Check("hashes", not wrong, ", ".join(wrong) or f"{len(hashes)} as published")


def _check_card(card: Path) -> Check:
    """Return whether there is a card that names a license."""
    try:
        license = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except Exception as error:  # whatever the YAML library raises
        return Check("card", False, f"cannot be read: {type(error).__name__}")
    return Check("card", license is not None, f"license: {license}")


def check_code(folder: Path, config: dict, golden: dict, trusted: bool) -> Iterator[Check]:
    """Yield whether the code is the installed package's, unless it is `trusted`, and whether
    configs name only it."""
    python = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    yield _check_code_files(folder, python, golden, trusted)
    yield _check_code_names(folder, python, config)


def _check_code_files(folder: Path, python: list[str], golden: dict, trusted: bool) -> Check:
    """Return whether the code files of the record are there, and, unless `trusted`, are the
    installed ones."""
    lost = [name for name in published_code(golden) if name not in python]
    other = [name for name in python if name not in CODE or hash_of(folder / name) != hash_of(PACKAGE / name)]
    if lost:
        found = f"no {', '.join(lost)}"
    elif other:
        found = f"of version {golden.get('version', 'unknown')}, not of {__version__}: {', '.join(other)}"
    else:
        found = f"{len(python)} files, the same as in version {__version__}"
    return Check("code", not lost and (trusted or not other), found)


def _check_code_names(folder: Path, python: list[str], config: dict) -> Check:
    """Return whether no JSON file has transformers or sentence-transformers load code from
    elsewhere."""
    wrong = []
    if not _names_own_code(config, python):
        wrong.append(f"auto_map of config.json: {config.get('auto_map')}")
    if (path := folder / "modules.json").is_file() and read(path) != CROSS_ENCODER_FILES[path.name]:
        wrong.append("modules.json, by which sentence-transformers loads code, differs from this package's")
    for path in sorted(folder.rglob("*.json")):
        if path.name not in (GOLDEN_FILE, "tokenizer.json"):  # texts and a vocabulary may hold such words
            wrong += _code_named(path, allowed="auto_map" if path == folder / "config.json" else None)
    return Check("names in configs", not wrong, "; ".join(wrong) or "only this folder's own code")


def _names_own_code(config: dict, python: list[str]) -> bool:
    """Return whether every class that a config's `auto_map` names is in a code file of the folder."""
    classes = (config.get("auto_map") or {"AutoConfig": None}).values()
    return all(isinstance(name, str) and f"{name.rpartition('.')[0]}.py" in python for name in classes)


def _code_named(path: Path, allowed: str | None) -> list[str]:
    """Return the entries of a JSON file, at any depth, by which transformers loads code, save
    `allowed` at its top."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return [f"{path.name} is no JSON"]
    found, pending = [], [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            keys = [key for key in value if key in CODE_KEYS and not (value is content and key == allowed)]
            found += [f"{key} of {path.name}: {value[key]}" for key in keys]
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return found
