"""Laws of checkpoints that an earlier version published: they load, score as they did, and verify.

`checkpoint_0.1.0.zip` is a ranker of random weights (Gemma 2, 3 layers, 300 tokens) as version 0.1.0 published it, with
the code of that version and the scores that it gave then.
"""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.hub.golden import GOLDEN_FILE, hash_of
from modeling_gemma_encoder.hub.verification import verify


@pytest.fixture
def folder(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "checkpoint_0.1.0.zip") as archive:
        archive.extractall(tmp_path / "ranker")
    return tmp_path / "ranker"


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, GemmaEncoderForRanking])
def test_an_earlier_checkpoint_scores_as_it_did(folder, auto_class):
    """By the code that is installed; `verify` runs the checkpoint's own."""
    golden = json.loads((folder / GOLDEN_FILE).read_text())
    model, tokenizer = auto_class.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, tokens, output in zip(golden["inputs"], golden["tokens"], golden["outputs"], strict=True):
        pair = [text] if isinstance(text, str) else text
        batch = tokenizer(*pair, truncation=True, max_length=256, return_tensors="pt")
        assert batch["input_ids"].tolist() == [tokens]
        torch.testing.assert_close(model(**batch).logits, torch.tensor([output]), atol=1e-5, rtol=1e-5)


def test_an_earlier_checkpoint_verifies_by_its_own_record(folder):
    """Whatever files the installed version has: those of the record are looked for, and run when they are trusted."""
    dropped = folder / "calibration_gemma_encoder.py"
    used = folder / "modeling_gemma_encoder.py"
    used.write_text(
        used.read_text().replace("from .calibration_gemma_encoder import probabilities", "probabilities = 0")
    )
    golden = json.loads((folder / GOLDEN_FILE).read_text())
    dropped.unlink()
    del golden["files"][dropped.name]
    golden["files"][used.name] = hash_of(used)
    (folder / GOLDEN_FILE).write_text(json.dumps(golden))
    checks = {check.name: check for check in verify(folder, trust_remote_code=True)}
    assert [check for check in checks.values() if not check.passed] == []
    assert "of version 0.1.0, not of" in checks["code"].found and used.name in checks["code"].found
    failed = {check.name for check in verify(folder) if not check.passed}
    assert failed == {"code", "loads in a fresh process"}
