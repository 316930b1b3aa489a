"""Laws of pretraining: what it leaves loads everywhere, says the truth about itself, and survives interruption."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretrain
import pytest
import torch
from helpers import NANO, ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.pretraining.blocks import pack

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 32,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on this repository's own prose with a decoder of a few thousand parameters."""
    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    text.write_text((ROOT / "LICENSE").read_text())
    held_out.write_text((ROOT / "README.md").read_text())

    def run(*flags: str, family: str = "gemma2", folder: Path = tmp_path / "decoder") -> Path:
        AutoConfig.for_model(family, **SHAPE).save_pretrained(tmp_path / "config")
        command = ["pretrain.py", "--text", str(text), "--validation_text", str(held_out), "--output_dir", str(folder)]
        command += ["--config", str(tmp_path / "config"), "--block_size", "16", "--max_steps", "8", "--save_steps", "4"]
        command += ["--eval_steps", "4", "--logging_steps", "4", "--learning_rate", "1e-2", "--disable_tqdm", "true"]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        pretrain.main()
        return folder

    run.held_out = held_out
    return run


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_a_pretrained_decoder_loads_and_its_perplexity_is_upstreams(family, run):
    folder = run("--bf16", family=family)
    decoder, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert decoder.config.model_type == family and decoder.dtype == torch.bfloat16 and decoder.config.use_cache
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, info = GemmaEncoderForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"} and not info["unexpected_keys"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    paragraphs = [text for text in run.held_out.read_text().split("\n\n") if text.strip()]
    blocks = torch.tensor(np.array(pack({"text": paragraphs}, tokenizer, 16, join=False)["input_ids"])).long()
    decoder.float().eval()
    with torch.no_grad():
        loss = decoder(blocks, labels=blocks).loss.item()
    report = json.loads((folder / "results.json").read_text())
    of_held_out = report["perplexity"]["held_out"]
    assert of_held_out["decoder"] == pytest.approx(math.exp(loss), rel=0.01)  # ours was measured under bf16 autocast
    assert of_held_out["trigram"] < of_held_out["unigram"] < 400
    assert report["parameters"] == decoder.num_parameters() and report["tokens"] == 8 * 32 * 16
    assert (folder / "training.png").stat().st_size > 10_000
    assert any("eval_held_out_loss" in entry for entry in json.loads((folder / "training_log.json").read_text()))


def test_an_interrupted_run_ends_with_the_same_weights(run, tmp_path, capsys):
    whole = load_file(run() / "model.safetensors")
    folder = tmp_path / "decoder"
    for name in ("checkpoint-8", "results.json", "model.safetensors"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = load_file(run("--resume_from_checkpoint", "True") / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (folder / "results.json").exists()
    with pytest.raises(SystemExit):
        run("--block_size", "32")
    assert re.search("holds another run .*block_size: 16 -> 32", capsys.readouterr().err)


def test_half_a_checkpoint_is_not_resumed_from_and_another_run_is_not_harmed(run, capsys):
    folder = run("--max_steps", "4")
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit):
        run("--seed", "1")
    assert re.search("holds another run .*seed: 42 -> 1", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        run("--tokenizer", str(NANO))
    assert "holds another run" in capsys.readouterr().err
    assert (folder / "tokenizer.json").read_text() == tokenizer
    assert json.loads((run() / "results.json").read_text())["steps"] == 8


def test_two_processes_train_the_same_decoder_as_one(run, tmp_path):
    def losses(folder: Path) -> list[float]:
        history = json.loads((folder / "training_log.json").read_text())
        return [entry["loss"] for entry in history if "loss" in entry]

    one = losses(run("--logging_steps", "1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "examples" / "pretrain.py"), *sys.argv[1:], "--per_device_train_batch_size", "16"]
    command += ["--output_dir", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-3)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["batch_size"] == 32


def test_streaming_trains(run):
    folder = run("--streaming", "--ngram_tokens", "0", "--save_dtype", "float32")
    assert list(json.loads((folder / "results.json").read_text())["perplexity"]["held_out"]) == ["decoder"]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32


def test_a_checkpoint_is_trained_further(run, tmp_path, monkeypatch):
    first = run()
    before = json.loads((first / "results.json").read_text())["perplexity"]["held_out"]["decoder"]
    text, folder = str(run.held_out), str(tmp_path / "further")
    command = ["pretrain.py", "--model", str(first), "--text", text, "--validation_text", text, "--output_dir", folder]
    command += ["--block_size", "16", "--max_steps", "8", "--learning_rate", "1e-2", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", command)
    pretrain.main()
    report = json.loads((tmp_path / "further" / "results.json").read_text())
    assert report["perplexity"]["held_out"]["decoder"] < before  # on the text that it now reads
    assert (tmp_path / "further" / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()


def test_tokens_stay_within_words_and_any_text_comes_back(nano_tokenizer):
    for text in ("It's 2024: naïve cafés, “quotes” (and 汉字)!", "a_b = [1, 2]\n\nNext  line\t"):
        ids = nano_tokenizer(text)["input_ids"]
        assert ids[0] == nano_tokenizer.bos_token_id
        assert nano_tokenizer.decode(ids[1:]) == text
    for token in nano_tokenizer.get_vocab():
        word = token.lstrip("▁")
        assert token.startswith("<") or word.isalpha() or not any(c.isalpha() for c in word) or len(word) < 2, token


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "me/somewhere"], "either --config"),
        (["--block_size", "2"], "--block_size must be at least 3"),
    ],
)
def test_flags_that_cannot_be_are_named(flags, message, run, capsys):
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capsys.readouterr().err


def test_other_families_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run(family="mistral")
    assert "model_type must be one of gemma, gemma2, gemma3_text; got 'mistral'" in capsys.readouterr().err
