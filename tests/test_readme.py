"""The README's code runs as it stands, with the nano decoder in the place of the one it names."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from gguf_files import Q8_0, write_gguf
from helpers import NANO, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

README = ROOT / "README.md"


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma").symlink_to(NANO)
    rows = ["text,label", "It rains.,wet", "The sun is out.,dry", "Snow and a longer text.,cold", ""]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "test.csv").write_text("\n".join([*rows[:3], ""]))  # a class is missing: ids must not shift
    # What `examples/msmarco.py` leaves, untrained.
    GemmaEncoderForRanking.from_pretrained(NANO, dtype=torch.float32).save_pretrained(tmp_path / "my-ranker")
    set_template(AutoTokenizer.from_pretrained(NANO), pair=RANKING_TEMPLATE).save_pretrained(tmp_path / "my-ranker")
    (tmp_path / "folder").mkdir()
    decoder = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    write_gguf(decoder, tmp_path / "folder" / "gemma-3-1b-Q8_0.gguf", kind=Q8_0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 9
    for block in (block for block in blocks if "langchain" not in block):  # not installed here
        exec(re.sub("google/gemma-[23]-\\w+", "gemma", block), names)
    assert names["logits"].shape == (2, 3)
    assert type(names["model"]).__name__ == "GemmaEncoderForSequenceClassification"
    assert names["model"].config.id2label == {0: "cold", 1: "dry", 2: "wet"}
    assert names["dataset"]["test"]["labels"][:] == [2, 1]
    assert (tmp_path / "my-encoder" / "attention_gemma_encoder.py").exists()
    assert sorted(names["best_first"].tolist()) == [0, 1] and names["loss"].item() > 0
    assert names["trainer"].state.global_step == 3  # the ranker's, one list an epoch
    assert GemmaEncoderForRanking.from_pretrained("my-ranker").dtype == torch.float32
    assert AutoTokenizer.from_pretrained("my-ranker").model_max_length == 256
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert type(names["merged"]).__name__ == "GemmaEncoderForSequenceClassification"
    assert names["merged"].config.pooling == "kv_probe"


def test_the_readmes_own_loss_is_worked_out_by_hand_and_has_no_parts():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    block = next(block for block in blocks if "own_loss" in block)
    assert len(block.splitlines()) <= 12
    names = {"torch": torch}
    exec(block.partition("\n\n\nTrainer(")[0], names)
    probabilities = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]
    logits, labels = torch.tensor(probabilities).log(), torch.tensor([0, 2])
    rows = []
    for (of_row, label), weight in zip(((probabilities[0], 0), (probabilities[1], 2)), (1, 5), strict=True):
        smoothed = [0.9 * (number == label) + 0.1 / 3 for number in range(3)]
        cross_entropy = -sum(share * math.log(p) for share, p in zip(smoothed, of_row, strict=True))
        rows.append(weight * (1 - of_row[label]) ** 2 * cross_entropy)
    whole = names["own_loss"](SimpleNamespace(logits=logits), labels, 2)
    parts = [names["own_loss"](SimpleNamespace(logits=logits[n : n + 1]), labels[n : n + 1], 2) for n in (0, 1)]
    assert whole.item() == pytest.approx(sum(rows) / 2) == sum(parts).item()
