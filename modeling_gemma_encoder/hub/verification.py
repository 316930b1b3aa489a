"""Is what was published what was trained? Golden inputs and outputs travel with a model, and anyone can repeat them.

`verification.json` holds texts, their tokens and fp32 outputs, the settings that decide scores, and every file's hash.
It shows accidents and careless changes. Whoever can write to a repository can write a new one: see SECURITY.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._scripts.files import read, write
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..peft_gemma_encoder import CROSS_ENCODER_FILES
from ..version import __version__
from .fresh_process import observe
from .licenses import GEMMA_TERMS

FILE = "verification.json"
PACKAGE = Path(__file__).parent.parent
STARRED = "_gemma_encoder.py"  # how the names of code files end that travel with a checkpoint
CODE = sorted(path.name for path in PACKAGE.glob(f"*{STARRED}"))
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
# What a published folder may hold.
KINDS = (".py", ".json", ".jsonl", ".safetensors", ".md", ".txt", ".model", ".jinja", ".png", ".gitattributes")
KINDS += ("LICENSE", "NOTICE", GEMMA_TERMS, ".gitignore")
# Keys of a JSON file that have transformers load code, from here or elsewhere.
OF_CODE = ("auto_map", "auto_mapping", "custom_pipelines", "configuration_files", "custom_generate")
UNHASHED = (FILE, "README.md", ".gitattributes")  # the first says the hashes, people edit the second
TOLERANCE = 2e-4  # of outputs, times the largest of them; other machines add up in another order

# Longer than many a window, shorter than what small models read; single texts, and pairs in the template.
LONG = " ".join(
    f"In {1800 + 7 * n} the {kind} of the old harbour was {done} for the {n + 2}th time."
    for n, (kind, done) in enumerate(
        (kind, done)
        for done in ("painted", "sold", "repaired", "forgotten")
        for kind in ("lighthouse", "customs house", "dry dock", "chapel", "rope walk", "crane", "quay", "school")
    )
)
INPUTS = [
    "It works.",
    "A gripping, funny and humane film, and the best of its year; I would not have missed a minute of it.",
    LONG,
    ["how do cats purr", "Cats purr by vibrating the muscles of their larynx some 25 to 150 times a second."],
    ["how do cats purr", "The harbour froze in January."],
    ["a query", ""],
]


@dataclass
class Check:
    """One row of the table."""

    name: str
    passed: bool
    found: str

    def __str__(self):
        return f"{'ok' if self.passed else 'FAILED':<12} {self.name:<22} {self.found}"


def hash_of(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def dtypes(folder: Path) -> dict[str, int]:
    """How many tensors of each dtype the weights hold."""
    found = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return dict(sorted(found.items()))


def files_of(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] not in (".cache", ".git"))


def write_golden(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: list | None = None
) -> None:
    """
    Writes `verification.json` of a folder that is otherwise complete.

    Args:
        model: As loaded from `folder` in fp32.
        inputs: Texts and pairs of texts, besides our own.
    """
    inputs = [*INPUTS, *(inputs or [])]
    found = observe(model, tokenizer, GemmaEncoderConfig.from_pretrained(folder), inputs)
    golden = {"version": __version__, "inputs": inputs, **found, "dtypes": dtypes(folder)}
    golden["files"] = {name: hash_of(folder / name) for name in files_of(folder) if name not in UNHASHED}
    write(folder / FILE, json.dumps(golden, indent=1))


def verify(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> list[Check]:
    """
    Loads a published folder or repository as a stranger would, in a fresh process, and compares it with its golden
    outputs. Code that is not this package's own runs only with `trust_remote_code`.

    Raises:
        ValueError: there is no config of a Gemma Encoder.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision cannot be read.
    """
    folder, names, commit = fetch(source, revision, token)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: it is no Gemma Encoder.")
    config = read(folder / "config.json")
    if config.get("model_type") != GemmaEncoderConfig.model_type:
        raise ValueError(f"{source} is of model_type={config.get('model_type')!r}, no Gemma Encoder.")
    golden, checks = read_golden(folder), []
    if commit:
        checks.append(Check("commit", True, commit))
    checks += check_files(folder, names, golden)
    checks += check_code(folder, config, golden, trust_remote_code)
    safe = all(check.passed for check in checks if check.name in ("code", "names in configs"))
    if not safe:
        why = "not run: `trust_remote_code` runs code that is not this package's own"
        return [*checks, Check("loads as a stranger", False, why)]
    found = run_stranger(folder, golden.get("inputs", INPUTS), device, token)
    if error := found.get("error"):
        return [*checks, Check("loads as a stranger", False, error)]
    return [*checks, Check("loads as a stranger", not found["new"], said(found)), *compare(found, golden, folder)]


def fetch(source: str | Path, revision: str | None, token: str | None) -> tuple[Path, list[str], str | None]:
    """The folder, the names of all its files, and the commit; pickles of a repository are not downloaded."""
    if Path(source).is_dir():
        return Path(source).resolve(), files_of(Path(source)), None
    pickled = [f"*{end}" for end in PICKLED]
    try:
        info = HfApi().model_info(str(source), revision=revision, token=token)
        folder = snapshot_download(str(source), revision=info.sha, token=token, ignore_patterns=pickled)
        return Path(folder), [file.rfilename for file in info.siblings], info.sha
    except OfflineModeIsEnabled:
        folder = Path(snapshot_download(str(source), revision=revision, token=token))
        return folder, files_of(folder), folder.name


def read_golden(folder: Path) -> dict:
    """What `write_golden` wrote, or {} where that is missing or something else."""
    try:
        golden = read(folder / FILE)
    except ValueError:
        return {}
    kinds = {"inputs": list, "settings": dict, "reach": list, "tokens": list, "outputs": list, "dtypes": dict}
    kinds |= {"files": dict, "class": str, "decoder": str}
    return golden if isinstance(golden, dict) and all(isinstance(golden.get(n), k) for n, k in kinds.items()) else {}


def published_code(golden: dict) -> list[str]:
    """Return the names of the code files that a checkpoint was published with; without a record, of those installed."""
    return sorted(name for name in golden["files"] if name.endswith(".py")) if golden else CODE


def check_files(folder: Path, names: list[str], golden: dict) -> Iterator[Check]:
    adapter = "adapter_config.json" in names
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    whole = weights in names or (not adapter and f"{weights}.index.json" in names)
    needed = [*published_code(golden), "README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json"]
    lost = [name for name in needed if name not in names] + ([] if whole else [weights])
    pickled = [name for name in names if not name.endswith(KINDS)]
    found = ", ".join([*(f"no {name}" for name in lost), *(f"of no kind known here: {name}" for name in pickled)])
    yield Check("files", not (lost or pickled), found or f"{len(names)} files, weights in safetensors only")
    if not golden:
        yield Check("golden outputs", False, f"no sound {FILE}: nothing to compare with")
        return
    hashes = golden["files"]
    wrong = [f"{name} is missing" for name in hashes if not (folder / name).is_file()]
    wrong += [f"{n} differs" for n in hashes if (folder / n).is_file() and hash_of(folder / n) != hashes[n]]
    wrong += [f"{n} is new" for n in names if n not in hashes and n not in UNHASHED]
    yield Check("hashes", not wrong, ", ".join(wrong) or f"{len(hashes)} as published")
    card = folder / "README.md"
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
        yield Check("card", licence is not None, f"licence: {licence}")
    except Exception as error:  # whatever the YAML library raises
        yield Check("card", False, f"cannot be read: {type(error).__name__}")


def check_code(folder: Path, config: dict, golden: dict, trusted: bool) -> Iterator[Check]:
    """Compare the code with what is installed before anything runs, and see that no config names code elsewhere."""
    python = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    lost = [name for name in published_code(golden) if name not in python]
    other = [name for name in python if name not in CODE or hash_of(folder / name) != hash_of(PACKAGE / name)]
    if lost:
        found = f"no {', '.join(lost)}"
    elif other:
        found = f"of version {golden.get('version', 'unknown')}, not of {__version__}: {', '.join(other)}"
    else:
        found = f"{len(python)} files, the same as in version {__version__}"
    yield Check("code", not lost and (trusted or not other), found)
    wrong = [] if names_own_code(config, python) else [f"auto_map of config.json: {config.get('auto_map')}"]
    if (path := folder / "modules.json").is_file() and read(path) != CROSS_ENCODER_FILES[path.name]:
        wrong.append("modules.json, by which sentence-transformers loads code, is none of ours")
    for path in sorted(folder.rglob("*.json")):
        if path.name not in (FILE, "tokenizer.json"):  # texts and a vocabulary may hold such words
            wrong += code_named(path, allowed="auto_map" if path == folder / "config.json" else None)
    yield Check("names in configs", not wrong, "; ".join(wrong) or "only this folder's own code")


def names_own_code(config: dict, python: list[str]) -> bool:
    """Return whether every class that a config's `auto_map` names is in a code file of the folder."""
    classes = (config.get("auto_map") or {"AutoConfig": None}).values()
    return all(isinstance(name, str) and f"{name.rpartition('.')[0]}.py" in python for name in classes)


def code_named(path: Path, allowed: str | None) -> list[str]:
    """Where a JSON file, at any depth, has a key by which transformers would load code; `allowed` is one at its top."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return [f"{path.name} is no JSON"]
    found, open_ends = [], [(content, True)]
    while open_ends:
        value, top = open_ends.pop()
        if isinstance(value, dict):
            found += [
                f"{key} of {path.name}: {value[key]}"
                for key in value
                if key in OF_CODE and not (top and key == allowed)
            ]
            open_ends += [(inner, False) for inner in value.values()]
        elif isinstance(value, list):
            open_ends += [(inner, False) for inner in value]
    return found


def run_stranger(folder: Path, inputs: list, device: str, token: str | None = None) -> dict:
    """Return what `fresh_process.py` prints in a process without this package, the network and the user's token, or
    {"error": ...}. The base of an adapter is fetched before."""
    source, adapter = Path(__file__).with_name("fresh_process.py").read_text(), read(folder / "adapter_config.json")
    if (base := adapter.get("base_model_name_or_path")) and not Path(base).is_dir():
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        snapshot_download(base, revision=adapter.get("revision"), token=token, allow_patterns=patterns)
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(empty) / "modules"), "PYTHONWARNINGS": "ignore"}
        for name in ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            environment.pop(name, None)
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        (Path(empty) / "inputs.json").write_text(json.dumps(inputs))
        result = subprocess.run(
            [sys.executable, "-c", source, str(folder), "inputs.json", device],
            env=environment,
            cwd=empty,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"error": lines[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def said(found: dict) -> str:
    if found["new"]:
        return f"random weights: {', '.join(found['new'])}"
    return f"{found['class']} over {found['decoder']}, transformers {found['versions']['transformers']}"


def compare(found: dict, golden: dict, folder: Path) -> Iterator[Check]:
    attention = found["attention"]
    yield Check("attention as configured", attention is None, attention or "in every layer, by its behaviour")
    published = golden.get("outputs", found["outputs"])
    scale = max(1.0, *(abs(value) for row in published for value in row))
    changed = found["padding_changes"]
    yield Check("padding, batches", changed <= TOLERANCE * scale, f"change outputs by {changed:.1e} at most")
    if not golden:
        return
    now = {**found["settings"], "class": found["class"], "decoder": found["decoder"], "reach": found["reach"]}
    right = {**golden["settings"], "class": golden["class"], "decoder": golden["decoder"], "reach": golden["reach"]}
    wrong = [f"{n}={now[n]!r}, published {right[n]!r}" for n in right if n in now and now[n] != right[n]]
    yield Check(
        "settings", not wrong, "; ".join(wrong) or f"{now['attention']}, pooling {now['pooling']}, and all others"
    )
    same = [ids == published for ids, published in zip(found["tokens"], golden["tokens"], strict=False)]
    count = f"{sum(same)} of {len(golden['tokens'])} inputs read as published"
    yield Check("tokens and template", sum(same) == len(golden["tokens"]), count)
    try:
        difference = (torch.tensor(found["outputs"]) - torch.tensor(golden["outputs"])).abs().max().item()
        yield Check("outputs", difference <= TOLERANCE * scale, f"differ by {difference:.1e} at most")
    except (ValueError, RuntimeError, TypeError):
        yield Check("outputs", False, "of another shape than published")
    now = dtypes(folder)
    yield Check("dtype", now == golden["dtypes"], ", ".join(f"{count} {name}" for name, count in now.items()))
