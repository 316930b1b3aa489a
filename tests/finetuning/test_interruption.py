"""Laws of Ctrl-C: one line says what is kept and what to do, and the same command then goes on and says so."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablations
import calibrate
import classify
import demo
import evaluate_ranking
import msmarco
import pretrain
import pytest
import rerank
import uptrain
from helpers import ROOT
from transformers import Trainer
from transformers.utils import logging

from modeling_gemma_encoder._scripts.command_line import ScriptParser, interruptible
from modeling_gemma_encoder._scripts.training import replacing_weights
from modeling_gemma_encoder.finetuning import run as runs
from modeling_gemma_encoder.finetuning import suite as suites

ROWS = 40


@pytest.fixture
def flags(decoder, tmp_path):
    """Of a training of 150 steps with a checkpoint at every 40th."""
    rows = [{"text": f"text number {n}", "label": ("odd", "even")[n % 2]} for n in range(ROWS)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", decoder, "--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "dev.jsonl"]
    words += [
        "--output_dir",
        tmp_path / "out",
        "--seed",
        1,
        "--max_steps",
        150,
        "--max_length",
        16,
        "--use_cpu",
        "true",
    ]
    words += ["--save_strategy", "steps", "--save_steps", 40, "--eval_strategy", "no", "--disable_tqdm", "true"]
    return [*map(str, words), "--per_device_train_batch_size", "2"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def end(call, capsys) -> str:
    """The one line that an interrupted script says, which ends with the code 130."""
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Interrupted")]
    assert len(said) == 1
    return said[0]


def test_an_interrupted_training_says_its_step_and_goes_on_there(flags, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "out" / "seed-1"
    # Of a shell's background job SIGINT is ignored, and so it would be of this process.
    with subprocess.Popen(
        [sys.executable, classify.__file__, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not [*folder.glob("checkpoint-*/trainer_state.json")]:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = (text.decode() for text in process.communicate())
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "newly initialized" in errors  # of the fresh head: the first time it is news
    whole = max(int(path.parent.name[11:]) for path in folder.glob("checkpoint-*/trainer_state.json"))
    line = errors.splitlines()[-1]
    assert line == f"Interrupted: the same command goes on from step {whole}, {folder}/checkpoint-{whole}."
    assert not (folder / "results.json").exists() and 40 <= whole < 150

    monkeypatch.setattr(sys, "argv", ["classify.py", *flags])
    capfd.readouterr()
    classify.main()
    said, errors = capfd.readouterr()
    assert re.findall("Resuming from step .*", said) == [f"Resuming from step {whole}, {folder}/checkpoint-{whole}"]
    assert "newly initialized" not in errors and "LOAD REPORT" not in errors
    assert json.loads((folder / "results.json").read_text())["steps"] == 150


def test_an_interruption_before_the_first_checkpoint_says_that_nothing_is_saved(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classify.py", *flags])
    monkeypatch.setattr(runs.Trainer, "training_step", interrupt)
    line = end(classify.main, capsys)
    assert line == f"Interrupted: nothing was saved in {tmp_path}/out/seed-1 yet, so the same command begins anew."


def test_after_the_training_an_interruption_says_that_it_is_not_lost(flags, tmp_path, monkeypatch, capsys):
    flags[flags.index("--max_steps") + 1] = "4"
    flags[flags.index("--save_steps") + 1] = "4"
    monkeypatch.setattr(sys, "argv", ["classify.py", *flags])
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "predict", interrupt)
        assert "goes on from step 4, " in end(classify.main, capsys)
    classify.main()
    monkeypatch.setattr(
        sys, "argv", ["classify.py", *flags, "--do_predict", "--test_file", str(tmp_path / "dev.jsonl")]
    )
    monkeypatch.setattr(runs.Trainer, "predict", interrupt)
    assert end(classify.main, capsys).startswith(f"Interrupted: the model in {tmp_path}/out/seed-1 is trained, and")


def after(steps: int):
    """Training steps of which the next one is interrupted."""
    step, left = Trainer.training_step, iter(range(steps))
    return lambda *args: step(*args) if next(left, None) is not None else interrupt()


@pytest.mark.parametrize("script", [uptrain, pretrain, msmarco])
def test_scripts_with_loops_of_their_own_say_where_they_go_on(script, decoder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    texts = ["--text", text, "--validation_text", text, "--block_size", 32]
    texts += ["--ngram_tokens", 0] if script is pretrain else []
    (tmp_path / "pairs.csv").write_text("query,passage,label\n" + "rain,It rains.,1\nrain,It snows.,0\n")
    lists = [
        "--train_data",
        tmp_path / "pairs.csv",
        "--max_length",
        32,
        "--gradient_accumulation_steps",
        1,
        "--use_cpu",
    ]
    flags = ["--model", decoder, "--output_dir", tmp_path / "out", "--max_steps", 4, "--save_steps", 2]
    flags += ["--per_device_train_batch_size", 2, "--disable_tqdm", "true", *(lists if script is msmarco else texts)]
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", after(3))
        place = f"step 2, {tmp_path}/out/checkpoint-2"
        assert end(script.main, capsys) == f"Interrupted: the same command goes on from {place}."
    script.main()
    assert f"Resuming from {place}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", [ablations, calibrate, classify, demo, evaluate_ranking, msmarco, pretrain, rerank, uptrain, suites]
)
def test_every_script_ends_with_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(ScriptParser, "parse_known_args", interrupt)
    main = script.main if script is not suites else lambda: suites.run_suite(suites.Suite({}, "", None), "")
    assert end(main, capsys) == "Interrupted: nothing new was saved; give the same command again."


def test_scripts_that_start_processes_say_it_too():
    """Those that are not imported here: what they need is not always installed."""
    scripts = Path(classify.__file__).parent.glob("*.py")
    mains = {path.name: path.read_text() for path in scripts if "ScriptParser(" in path.read_text()}
    assert {"convert_gguf.py", "export.py", "publish.py"} <= mains.keys()
    assert not [name for name, text in mains.items() if not re.search(r"@interruptible\(.*\)\ndef main", text)]


def test_one_process_of_several_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended, interruptible():
        raise KeyboardInterrupt("the same command goes on")
    assert ended.value.code == 130 and not capsys.readouterr().err


def test_other_warnings_come_back_after_loading():
    before = logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), replacing_weights("checkpoint-20"):
        assert logging.get_verbosity() == logging.ERROR
        raise ZeroDivisionError
    assert logging.get_verbosity() == before
    with replacing_weights(None):
        assert logging.get_verbosity() == before
