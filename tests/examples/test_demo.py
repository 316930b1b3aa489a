"""The demo's path from a decoder to reloaded encoders, in a few steps on a few passages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from demo import SIZES, make_lists, mean_reciprocal_rank, read_passages
from helpers import ROOT, run_script

DEMO = ROOT / "examples" / "demo.py"


def run(*flags: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DEMO), "--passages", "60", "--max_steps", "2", "--ranking_steps", "1"]
    command += ["--output_dir", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_MODULES_CACHE": str(folder)})


def test_the_demo_runs_and_its_models_reload(tmp_path):
    flags = ["--pooling", "query_probe", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
    result = run(*flags, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["classify"]["reload_difference"] < 1e-5
    for task in ("classify", "rank"):
        assert all(0 <= value <= 1 for value in report[task]["results"].values())
        assert len(report[task]["results"]) == 3 and report[task]["losses"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    for folder in ("classifier", "ranker"):
        assert (tmp_path / folder / "model.safetensors").exists()


def test_an_unknown_task_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script("examples/demo.py", "--tasks", "translate", "--output_dir", tmp_path)
    assert "--tasks must be one of classify, rank; got translate" in capsys.readouterr().err


def test_mean_reciprocal_rank_by_hand():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0, 0.0]])  # first, third, tied with one: second
    assert mean_reciprocal_rank(scores) == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)


def test_no_passage_is_both_learned_from_and_tested_on():
    passages = read_passages(50)
    assert passages["train"] and passages["test"] and not set(passages["train"]) & set(passages["test"])


def test_ranking_lists_put_the_right_document_first_and_each_document_once(nano_tokenizer):
    words = ("apple", "river", "stone", "cloud", "bird")
    passages = {
        f"All about the {word} and a {other}.\n\n" + f"The {word} is seen here, and a {other} too. " * 6: 0
        for word in words
        for other in words
    }
    passages |= {f"{text} Only the end, which is cut off, differs.": 0 for text in passages}
    lists, scores = make_lists(passages, nano_tokenizer, SIZES[0], how_many=(100, 4), seed=0)
    assert len(lists) == 25 and scores.shape == (25, 4)
    for row, of_bm25 in zip(lists, scores, strict=True):
        assert any(text.startswith(f"{row['query']}\n\n{row['documents'][0]}") for text in passages)
        assert len(set(row["documents"])) == 4 and list(of_bm25[1:]) == sorted(of_bm25[1:], reverse=True)


def test_a_continuation_is_what_follows_and_begins_with_a_word(nano_tokenizer):
    """A word that is cut in two would say by itself which document follows."""
    passages = {
        " ".join(f"{word}{place}" for place in range(60) for word in ("alpha", name)): 0 for name in ("beta", "gamma")
    }
    lists, _ = make_lists(passages, nano_tokenizer, SIZES[1], how_many=(9, 2), seed=0)
    assert len(lists) == 2
    for row in lists:
        right, wrong = row["documents"]
        (whole,) = (text for text in passages if text.startswith(row["query"] + right))
        assert right[0] == " " and len(row["query"].split()) > 2 and not whole.startswith(row["query"] + wrong)
        assert row["query"].split()[-1] in whole.split()
