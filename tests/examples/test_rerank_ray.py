"""A worker dies on the way, and still every row is scored once, as one process scores it."""

import os
import subprocess
import sys
import time

import numpy as np
import pandas
import psutil
import pytest
import torch
from helpers import ROOT, jsonl
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

rerank_ray = pytest.importorskip("rerank_ray", reason="needs ray", exc_type=ImportError)
SCRIPT = ROOT / "examples" / "rerank_ray.py"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


def workers(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in parent.children(recursive=True):
        try:
            if "MapWorker" in "".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_worker_is_killed_and_every_row_is_scored_once(decoder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "ranker"
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE).save_pretrained(folder)
    rows = [{"id": n, "query": f"query {n % 7}", "passage": "some words " * (n * 5 % 13)} for n in range(1500)]
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", rows[:500])
    jsonl(tmp_path / "in" / "b.jsonl", rows[500:])
    words = [
        "--model",
        folder,
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--workers",
        "2",
        "--dtype",
        "float32",
    ]
    words += ["--rows_per_batch", "50", "--tokens_per_batch", "200", "--max_length", "64", "--cpus_per_worker", "0.5"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], env=ENVIRONMENT, stdout=log, stderr=log)
    part, killed, parent = tmp_path / "out.part", None, psutil.Process(process.pid)
    began = time.time()
    while (
        process.poll() is None and killed is None and time.time() - began < 200
    ):  # until something is written, and both are at work
        alive = workers(parent)
        if part.exists() and list(part.glob("*.parquet")) and len(alive) == 2:
            killed = alive[0]
            killed.kill()
        time.sleep(0.05)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert killed is not None

    found = pandas.read_parquet(tmp_path / "out").sort_values("id")
    assert found["id"].tolist() == list(range(1500)) and found["passage"].tolist() == [row["passage"] for row in rows]
    model, tokenizer = load_ranker(str(folder), device="cpu")
    expected = score_pairs(model, tokenizer, [(row["query"], row["passage"]) for row in rows], max_length=64)
    np.testing.assert_allclose(found["score"], expected, atol=1e-5)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit):
        rerank_ray.main()
    assert "is there already" in capsys.readouterr().err
