"""Laws of export: ONNX and .pt2 score as the model does, any batch and length, without this package."""

import json
import subprocess
import sys

import export
import numpy as np
import pytest
import torch
from conftest import build, encoder_config
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.ranking import load_ranker, score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

PAIRS = [("how do cats purr", "They vibrate. " * 5), ("how do cats purr", "Dogs bark.")]

# What a stranger runs, with nothing of ours and nothing of transformers.
SCORE = """
import json, sys
for name in ("modeling_gemma_encoder", "transformers"):
    sys.modules[name] = None
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
tokenizer.no_truncation()
tokenizer.enable_padding(pad_id=0)
pairs = tokenizer.encode_batch([tuple(pair) for pair in json.loads(sys.argv[2])])
inputs = {"input_ids": [pair.ids for pair in pairs], "attention_mask": [pair.attention_mask for pair in pairs]}
if sys.argv[3] == "onnx":
    from onnxruntime import InferenceSession
    scores = InferenceSession(sys.argv[1] + "/model.onnx").run(["logits"], inputs)[0]
else:
    import torch
    program = torch.export.load(sys.argv[1] + "/model.pt2").module()
    scores = program(**{name: torch.tensor(values) for name, values in inputs.items()})
print(json.dumps(scores.tolist()))
"""


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
    export.main()


@pytest.mark.parametrize("kind", export.FILES)
def test_a_stranger_scores_with_what_is_exported(decoder, tmp_path, monkeypatch, capsys, kind):
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32, pooling="query_probe").save_pretrained(
        tmp_path / "ranker"
    )
    set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE).save_pretrained(tmp_path / "ranker")
    flags = ["--model", tmp_path / "ranker", "--output", tmp_path / "out", "--format", kind]
    command(monkeypatch, *flags)
    assert len(list((tmp_path / "out").glob("model.*"))) == 1  # weights included
    assert "scores differ by" in capsys.readouterr().out and not (tmp_path / "out.part").exists()
    words = [sys.executable, "-c", SCORE, tmp_path / "out", json.dumps(PAIRS), kind]
    printed = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True).stdout
    expected = score_pairs(*load_ranker(str(tmp_path / "ranker"), device="cpu"), PAIRS)
    np.testing.assert_allclose(np.array(json.loads(printed.splitlines()[-1]))[:, 0], expected, atol=1e-4)
    with pytest.raises(SystemExit):
        command(monkeypatch, *flags)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("family,pooling", [("gemma", "last_k"), ("gemma4_text", "kv_probe")])
def test_other_families_and_poolers_export_to_onnx(tmp_path, family, pooling):
    model = build(GemmaEncoderForSequenceClassification, encoder_config(family, pooling=pooling, num_labels=3))
    model.set_attn_implementation("eager")
    logits = export.Logits(model).eval()
    export.export(logits, tmp_path / "model.onnx", "onnx", max_batch=64)
    assert export.difference(logits, tmp_path / "model.onnx", "onnx") < 1e-4


def test_what_has_no_trained_head_is_refused(decoder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--model", decoder, "--output", tmp_path / "out")
    assert "no trained classifier or ranker" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
