"""Laws of the benchmarks: they run, say what they ran, and run nothing twice."""

import json
import os
import subprocess
import sys

import evidence
import list_memory
import pretraining
import pretraining_speed
import pytest
import ranking_losses
import speed
from helpers import NANO, decoder_config, run_here
from measures import models, scoring
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16


@pytest.fixture
def glue(tmp_path):
    """A folder of SST-2 and STS-B."""
    for task in ("sst2", "stsb"):
        (tmp_path / "glue" / task).mkdir(parents=True)
        for split, number in (("train", 1040), ("validation", 12)):
            rows = [
                {"sentence": f"a {word} film", "label": label}
                if task == "sst2"
                else {"sentence1": "It rains.", "sentence2": f"It {word} {row}.", "label": 5.0 * label + row % 3}
                for row, (word, label) in enumerate([("good", 1), ("bad", 0)] * (number // 2))
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "glue" / task / f"{split}.jsonl").write_text(text)
    return tmp_path / "glue"


@pytest.fixture
def run(glue, decoder, tmp_path, monkeypatch):
    def run(*flags: str) -> dict:
        command = ["pretraining.py", "--models", str(decoder), "scratch", "--data_dir", str(glue)]
        command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--disable_tqdm", "true"]
        command += ["--seeds", "1", "2", "--learning_rates", "1e-3", "--per_device_eval_batch_size", "500", *flags]
        monkeypatch.setattr(sys, "argv", command)
        pretraining.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    run.cells = tmp_path / "out" / "cells"
    return run


def test_pretraining_is_compared_with_random_weights(run, decoder, capsys):
    report = run()
    assert set(report["results"]) == {"sst2", "stsb"}
    for task in report["results"].values():
        assert set(task) == {str(decoder), "scratch"}
        assert all(len(of_model["scores"]) == 2 for of_model in task.values())
    assert "| scratch |" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in run.cells.iterdir()}
    assert len(written) == 2 * 2 * 3
    assert run() == report
    assert {path: path.stat().st_mtime_ns for path in run.cells.iterdir()} == written  # nothing ran again
    run("--weight_decay", "0.5", "--tasks", "sst2", "--models", str(decoder), "--seeds", "1")
    assert len(list(run.cells.iterdir())) == 2 * 2 * 3 + 2  # other options are other cells


def test_evidence_is_one_table_of_all_tasks(glue, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        evidence, "SIZES", {"sst2": evidence.Size(8, 1, 4, evaluated=6), "stsb": evidence.Size(8, 2, 4)}
    )
    variants = {"attention": ["causal", "bidirectional"], "baselines": ["TF-IDF on all rows", "Gemma Encoder"]}
    monkeypatch.setattr(evidence, "QUESTIONS", {"attention": variants})
    command = ["evidence.py", "--model", str(decoder), "--data_dir", str(glue), "--learning_rates", "1e-3"]
    command += ["--seeds", "1", "--output_dir", str(tmp_path / "out"), "--max_length", "16"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(evidence.subprocess, "run", run_here)
    evidence.main()
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert set(report["studies"]["attention"]) == {"sst2", "stsb"} == set(report["commands"])
    for study, names in variants.items():
        assert all(list(of_task) == names for of_task in report["studies"][study].values())
    assert "--max_train_samples 8 --num_train_epochs 2" in report["commands"]["stsb"]
    cell = tmp_path / "out" / "attention" / "stsb" / report["studies"]["attention"]["stsb"]["bidirectional"]["cells"][0]
    assert json.loads((cell / "results.json").read_text())["steps"] == 4  # two epochs of two batches
    tables = (tmp_path / "out" / "attention.md").read_text()
    assert (
        "| bidirectional - causal |" in tables
        and "| TF-IDF on all rows - Gemma Encoder |" in tables
        and tables in capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", [*command, "--tables_only"])
    monkeypatch.setattr(evidence.subprocess, "run", None)  # nothing runs
    evidence.main()
    assert (tmp_path / "out" / "attention.md").read_text() == tables and (tmp_path / "out" / "gain.png").exists()

    # On a machine that has only what was written, the table is the same.
    earlier = tmp_path / "out" / "attention.json"
    others = ["--tables_only", "--earlier", str(earlier), "--output_dir", str(tmp_path / "elsewhere")]
    monkeypatch.setattr(sys, "argv", [*command, *others])
    evidence.main()
    assert (tmp_path / "elsewhere" / "attention.md").read_text() == tables
    again = json.loads((tmp_path / "elsewhere" / "attention.json").read_text())
    assert all(again[key] == report[key] for key in ("seeds", "sizes", "commands", "studies"))
    earlier.write_text(json.dumps({**report, "seeds": [2]}))
    with pytest.raises(ValueError, match=r"Seeds \[2\] and \[1\]"):
        evidence.collect("attention", ["sst2"], tmp_path / "out", [earlier])


def test_the_gain_of_compiling_is_printed(tmp_path, monkeypatch, capsys):
    decoder_config("gemma2", num_hidden_layers=1, layer_types=["full_attention"]).save_pretrained(tmp_path / "tiny")
    command = [
        "pretraining_speed.py",
        "--config",
        str(tmp_path / "tiny"),
        "--batch_size",
        "1",
        "--block_size",
        "16",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path)])
    pretraining_speed.main()
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["gain"] > 0
    assert set(report["tokens_per_second"]) == {"eager", "compiled"}
    assert "times as fast (median of 2)" in capsys.readouterr().out


def test_losses_are_gathered_over_seeds(tmp_path):
    for loss, values in (("pair", (0.1, 0.3)), ("softmax", (0.5, 0.5))):
        for seed, value in zip((1, 2), values, strict=True):
            folder = tmp_path / loss / f"seed-{seed}" / "dev"
            folder.mkdir(parents=True)
            means = {"Gemma Encoder": {"nDCG@10": value}, "BM25": {"nDCG@10": 0.4}, "random order": {"nDCG@10": 0.2}}
            (folder / "results.json").write_text(json.dumps({"means": means}))
    table = ranking_losses.markdown(ranking_losses.collect(tmp_path, ["pair", "softmax"], [1, 2]), [1, 2])
    assert "| BM25 | 40.0 |" in table and "| pair | 20.0 ± 14.1 |" in table and "| softmax | 50.0 ± 0.0 |" in table


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_and_time_of_a_list_are_measured(decoder):
    found = []
    for size in ("4", "64"):  # in processes of their own: freed memory of this one would be used first
        words = [sys.executable, list_memory.__file__, "--model", str(decoder), "--cell", size, "0"]
        printed = subprocess.run(words, check=True, capture_output=True, env={**os.environ, **list_memory.GIVE_BACK})
        found.append(json.loads(printed.stdout.splitlines()[-1]))
    assert found[1]["megabytes"] > found[0]["megabytes"] + 10 and found[1]["seconds"] > found[0]["seconds"] > 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_what_is_timed_gives_the_same_scores(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.SHAPES, "270m", (32, 48, 2, 4, 1))
    if family != "gemma2":  # compiling takes long, and once is enough
        monkeypatch.setattr(scoring.shutil, "which", lambda name: None)
    for name in ("head_dim", "query_pre_attn_scalar"):
        monkeypatch.setitem(models.COMMON, name, 16)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, (kind, fields) in models.PEERS.items():
        monkeypatch.setitem(models.PEERS, name, (kind, {**fields, **small}))
    command = ["speed.py", "--layers", "2", "--rounds", "1", "--pairs", "8", "--vocab_size", "8192", "--quick"]
    dtypes = ["float32", "bfloat16"] if family == "gemma2" and computes_in_bf16("cpu") else ["float32"]
    given = ["--families", family, "--only", *speed.TABLES, "growth"]
    if family != "gemma2":  # by a checkpoint, with its own weights and tokenizer
        config = decoder_config(family, vocab_size=8192, max_position_embeddings=512)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
        AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path / "gemma3")
        given = ["--model", str(tmp_path / "gemma3"), "--dtypes", *dtypes]
    words = [*given, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    speed.main()
    found = json.loads((tmp_path / "results.json").read_text())
    for row in found["scoring"]:
        close = {"float32": 1e-5, "bfloat16": 3e-2}[row["dtype"]] * max(1.0, row["largest score"])
        assert row["largest difference of scores"] < close
        assert row["x stock sorted"] > 0 and row["x stock unsorted"] > 0 and row["int8 x ours"] > 0
        assert row["correlation of int8"] > 0.95
        assert family != "gemma2" or (row["ModernBERT-base / ours"] > 0 and row["BERT-base / ours"] > 0)
    (row,) = found["others"]
    assert row["largest difference of scores"] < 0.1 and row["x stock"] > 0 and row["x LM head"] > 0
    assert [row["dtype"] for row in found["training"]] == [row["dtype"] for row in found["short"]] == dtypes
    assert all(row["ours / least"] > 0 for row in found["short"])
    assert found["growth"]["tokens"] == sorted(found["growth"]["tokens"])
    if family != "gemma2":  # two processes: on a busy machine either can take longer
        score, imports, beyond = (found["start"][name] for name in ("first score", "imports", "beyond imports"))
        assert min(score, imports) > 0 and beyond == pytest.approx(score - imports)
    assert (tmp_path / "growth.png").exists() and "| x stock sorted |" in capsys.readouterr().out
