"""Compare a published model with the record of its making, in a process that has only torch and
transformers.

Outputs are (inputs, num_labels) logits, or (inputs, hidden) for an encoder without a head: see
`fresh_process.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from .._scripts.files import read
from ..configuration_gemma_encoder import GemmaEncoderConfig
from .file_checks import Check, check_code, check_files
from .golden import INPUTS, dtypes, files_of, read_golden

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
TOLERANCE = 2e-4  # of outputs, times the largest of them; other machines add up in another order
LOADS = "loads in a fresh process"


def verify(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> list[Check]:
    """Load a published folder or repository in a fresh process, and compare it with its golden
    outputs.

    Code that is not this package's own runs only with `trust_remote_code`.

    Raises:
        ValueError: there is no config of a Gemma Encoder.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision cannot be read.
    """
    folder, names, commit = fetch(source, revision, token)
    config = _read_config(source, folder)
    golden = read_golden(folder)
    checks = [Check("commit", True, commit)] if commit else []
    checks += check_files(folder, names, golden)
    checks += check_code(folder, config, golden, trust_remote_code)
    if not all(check.passed for check in checks if check.name in ("code", "names in configs")):
        why = "not run: `trust_remote_code` runs code that is not this package's own"
        return [*checks, Check(LOADS, False, why)]
    found = run_in_fresh_process(folder, golden.get("inputs", INPUTS), device, token)
    if error := found.get("error"):
        return [*checks, Check(LOADS, False, error)]
    return [*checks, Check(LOADS, not found["new"], _describe_model(found)), *compare(found, golden, folder)]


def fetch(source: str | Path, revision: str | None, token: str | None) -> tuple[Path, list[str], str | None]:
    """Return the folder, the names of all its files, and the commit. Pickles of a repository are
    not downloaded."""
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


def _read_config(source: str | Path, folder: Path) -> dict:
    """Return config.json as it is. Raise ValueError if it is missing or of another model."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json, so it is no Gemma Encoder.")
    config = read(folder / "config.json")
    if config.get("model_type") != GemmaEncoderConfig.model_type:
        raise ValueError(f"{source} is no Gemma Encoder: its config.json has model_type={config.get('model_type')!r}.")
    return config


def run_in_fresh_process(folder: Path, inputs: list, device: str, token: str | None = None) -> dict:
    """
    Return what `fresh_process.py` prints of a folder, or {"error": ...}.

    The process has no access to this package, the network and the user's token. The base of an
    adapter is fetched before it starts.
    """
    code = Path(__file__).with_name("fresh_process.py").read_text()
    _fetch_base(folder, token)
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "inputs.json").write_text(json.dumps(inputs))
        result = subprocess.run(
            [sys.executable, "-c", code, str(folder), "inputs.json", device],
            env=_isolated_environment(Path(empty)),
            cwd=empty,
            stdin=subprocess.DEVNULL,  # a question ends the process instead of waiting for an answer
            capture_output=True,
            text=True,
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"error": lines[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def _fetch_base(folder: Path, token: str | None) -> None:
    """Download the base of an adapter to the cache, from which the fresh process loads it offline."""
    adapter = read(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    if base and not Path(base).is_dir():
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        snapshot_download(base, revision=adapter.get("revision"), token=token, allow_patterns=patterns)


def _isolated_environment(empty: Path) -> dict[str, str]:
    """Return this process's environment without places to import from, the network and tokens."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(empty / "modules"), "PYTHONWARNINGS": "ignore"}
    for name in ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        environment.pop(name, None)
    return environment | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


def _describe_model(found: dict) -> str:
    """Return what was loaded, or which weights were missing."""
    if found["new"]:
        return f"random weights: {', '.join(found['new'])}"
    return f"{found['class']} over {found['decoder']}, transformers {found['versions']['transformers']}"


def compare(found: dict, golden: dict, folder: Path) -> Iterator[Check]:
    """Yield how what a fresh process `found` compares with the record; without one, only what holds
    by itself."""
    attention = found["attention"]
    yield Check("attention as configured", attention is None, attention or "in every layer, by its behavior")
    published = golden.get("outputs", found["outputs"])
    tolerance = TOLERANCE * max(1.0, *(abs(value) for row in published for value in row))
    changed = found["padding_changes"]
    yield Check("padding, batches", changed <= tolerance, f"change outputs by {changed:.1e} at most")
    if not golden:
        return
    yield _compare_settings(found, golden)
    yield _compare_tokens(found["tokens"], golden["tokens"])
    yield _compare_outputs(found["outputs"], golden["outputs"], tolerance)
    now = dtypes(folder)
    yield Check("dtype", now == golden["dtypes"], ", ".join(f"{count} {name}" for name, count in now.items()))


def _compare_settings(found: dict, golden: dict) -> Check:
    """Return whether config and tokenizer have the settings that were recorded."""
    now, right = (
        {**of["settings"], "class": of["class"], "decoder": of["decoder"], "reach": of["reach"]}
        for of in (found, golden)
    )
    # Fields that only one of them has are passed over: another version may have added or dropped
    # some.
    differing = [name for name in right if name in now and now[name] != right[name]]
    wrong = "; ".join(f"{name}={now[name]!r}, published {right[name]!r}" for name in differing)
    return Check("settings", not differing, wrong or f"{now['attention']}, pooling {now['pooling']}, and all others")


def _compare_tokens(found: list[list[int]], published: list[list[int]]) -> Check:
    """Return whether the golden inputs have the same token ids."""
    same = sum(now == then for now, then in zip(found, published, strict=False))
    return Check("tokens and template", same == len(published), f"{same} of {len(published)} inputs read as published")


def _compare_outputs(found: list, published: list, tolerance: float) -> Check:
    """Return whether the outputs are within `tolerance` of those that were recorded."""
    try:
        difference = (torch.tensor(found) - torch.tensor(published)).abs().max().item()
    except (ValueError, RuntimeError, TypeError):
        return Check("outputs", False, "of another shape than published")
    return Check("outputs", difference <= tolerance, f"differ by {difference:.1e} at most")
