"""Laws of the package as a whole: what imports need, where files may stand, and that the wheel holds all of it."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers import NANO, ROOT

import modeling_gemma_encoder

EXTRAS = ("accelerate", "bm25s", "datasets", "evaluate", "gguf", "ir_measures", "matplotlib", "pandas", "peft")
EXTRAS += ("ray", "scipy", "sentence_transformers", "sklearn", "gradio", "onnxruntime", "bitsandbytes")
USE = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # not to be had
import modeling_gemma_encoder
import modeling_gemma_encoder.ranking, modeling_gemma_encoder.finetuning, modeling_gemma_encoder.pretraining
import modeling_gemma_encoder.ablations, modeling_gemma_encoder.hub, modeling_gemma_encoder.ranking.trec
for name in modeling_gemma_encoder.__all__:
    getattr(modeling_gemma_encoder, name)
"""


def test_the_package_needs_torch_and_transformers_alone():
    result = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_listed_and_no_other_is_known():
    assert set(modeling_gemma_encoder.__all__) <= set(dir(modeling_gemma_encoder))
    with pytest.raises(AttributeError, match="has no attribute 'rerank_everything'"):
        modeling_gemma_encoder.rerank_everything  # noqa: B018


def test_files_that_travel_stand_in_the_package_itself():
    package = ROOT / "modeling_gemma_encoder"
    assert not [path for path in package.rglob("*_gemma_encoder.py") if path.parent != package]


def test_no_script_imports_another():
    scripts = {path.stem for path in ROOT.glob("examples/*.py")}
    for path in [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        lines = [line.split() for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not {words[1] for words in lines} & scripts, path


def test_the_wheel_holds_every_file_and_runs_the_quickstart(tmp_path):
    """Built and installed beside what it needs, in an environment that does not know of this folder."""
    source = tmp_path / "source"
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modeling_gemma_encoder", source / "modeling_gemma_encoder", ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True, cwd=tmp_path)
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True, cwd=tmp_path
    ).strip()
    (Path(purelib) / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--ignore-installed", *tmp_path.glob("*.whl")],
        check=True,
        cwd=tmp_path,
    )
    there = {path.relative_to(purelib) for path in Path(purelib).glob("modeling_gemma_encoder/**/*.*")}
    package = [*ROOT.glob("modeling_gemma_encoder/**/*.py"), ROOT / "modeling_gemma_encoder" / "py.typed"]
    assert {path for path in there if path.suffix != ".pyc"} == {path.relative_to(ROOT) for path in package}
    where = "import modeling_gemma_encoder; print(modeling_gemma_encoder.__file__)"
    quickstart = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    quickstart = quickstart.replace("examples/nano", str(NANO))
    result = subprocess.run(
        [python, "-I", "-c", f"{where}\n{quickstart}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(purelib)) and "positive" in result.stdout.splitlines()[-2]
