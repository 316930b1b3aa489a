"""The demo's path from a raw decoder to a reloaded encoder, in a few steps on a few passages."""

import json
import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def run(*flags: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DEMO), "--passages", "60", "--max_steps", "2", "--output_dir", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_MODULES_CACHE": str(folder)})


def test_the_demo_runs_and_its_model_reloads(tmp_path):
    result = run("--pooling", "query_probe", "--eval_strategy", "no", folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["reload_difference"] < 1e-5 and set(report["passages"]) == {"train", "test"}
    assert all(0 <= accuracy <= 1 for accuracy in report["accuracy"].values()) and len(report["accuracy"]) == 3
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert (tmp_path / "encoder" / "model.safetensors").exists()
