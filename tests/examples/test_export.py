"""Laws of export: ONNX and .pt2 score as the model does, any batch and length, without this package."""

import json
import re
import subprocess
import sys
import textwrap

import export
import numpy as np
import pytest
import torch
from helpers import build, encoder_config
from onnxruntime import InferenceSession
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

PAIRS = [("how do cats purr", "They vibrate. " * 5), ("how do cats purr", "Dogs bark.")]

# What a stranger runs, with nothing of ours and nothing of transformers.
SCORE = """
import json, sys
for name in ("modeling_gemma_encoder", "transformers"):
    sys.modules[name] = None
from tokenizers import Tokenizer
settings = json.load(open(sys.argv[1] + "/settings.json"))
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
tokenizer.enable_padding(pad_id=settings["pad_token_id"])
tokenizer.enable_truncation(settings["max_length"], strategy=settings["truncation"])
texts = tokenizer.encode_batch([tuple(text) if isinstance(text, list) else text for text in json.loads(sys.argv[2])])
inputs = {"input_ids": [text.ids for text in texts], "attention_mask": [text.attention_mask for text in texts]}
if sys.argv[3] == "onnx":
    from onnxruntime import InferenceSession
    logits = InferenceSession(sys.argv[1] + "/model.onnx").run(["logits"], inputs)[0]
else:
    import torch
    program = torch.export.load(sys.argv[1] + "/model.pt2").module()
    logits = program(**{name: torch.tensor(values) for name, values in inputs.items()})
names = settings["id2label"]
print(json.dumps([logits.tolist(), names and [names[str(int(row.argmax()))] for row in logits]]))
"""


def stranger(folder, texts: list, kind: str) -> tuple[np.ndarray, list[str] | None]:
    words = [sys.executable, "-c", SCORE, folder, json.dumps(texts), kind]
    printed = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True).stdout
    logits, labels = json.loads(printed.splitlines()[-1])
    return np.array(logits), labels


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
    export.main()


def check_what_the_docstring_says(folder, monkeypatch, ranker):
    monkeypatch.chdir(folder)
    *lines, last = textwrap.dedent(export.__doc__.partition("alone:\n\n")[2]).strip().splitlines()
    names = {"json": json, "Tokenizer": Tokenizer, "InferenceSession": InferenceSession}
    exec("\n".join(lines), names)
    expected = score_pairs(*load_ranker(str(ranker), device="cpu"), names["texts"])
    np.testing.assert_allclose(names["logits"][:, 0], expected, atol=1e-4)
    names["settings"]["id2label"] = {"0": "relevant"}  # a ranker has none
    exec(last, names)
    assert names["labels"] == ["relevant", "relevant"]


@pytest.mark.parametrize("kind", export.FILES)
def test_a_stranger_scores_with_what_is_exported(decoder, tmp_path, monkeypatch, capsys, kind):
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32, pooling="query_probe").save_pretrained(
        tmp_path / "ranker"
    )
    tokenizer = set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE)
    tokenizer.model_max_length = 24  # as training leaves it: the first pair's passage is cut, its query is not
    tokenizer.save_pretrained(tmp_path / "ranker")
    flags = ["--model", tmp_path / "ranker", "--output", tmp_path / "exported", "--format", kind]
    command(monkeypatch, *flags)
    assert len(list((tmp_path / "exported").glob("model.*"))) == 1  # weights included
    assert "scores differ by" in capsys.readouterr().out and not (tmp_path / "exported.part").exists()
    expected = score_pairs(*load_ranker(str(tmp_path / "ranker"), device="cpu"), PAIRS)
    logits, labels = stranger(tmp_path / "exported", PAIRS, kind)
    np.testing.assert_allclose(logits[:, 0], expected, atol=1e-4)
    assert labels is None
    if kind == "onnx":
        check_what_the_docstring_says(tmp_path, monkeypatch, tmp_path / "ranker")
    with pytest.raises(SystemExit):
        command(monkeypatch, *flags)
    assert "is there already" in capsys.readouterr().err


def test_a_stranger_reads_labels_and_lengths_of_a_classifier(decoder, tmp_path, monkeypatch):
    """As transformers' own pipeline does, which cuts texts where the tokenizer says."""
    torch.manual_seed(0)
    names = {0: "sad", 1: "glad", 2: "none"}
    form = {"dtype": torch.float32, "id2label": names, "label2id": {name: n for n, name in names.items()}}
    model = GemmaEncoderForSequenceClassification.from_pretrained(decoder, pooling="last_k", **form)
    model.save_pretrained(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.model_max_length = 9
    tokenizer.save_pretrained(tmp_path / "classifier")
    texts = ["It rains. " * 9, "A star.", "Dogs bark at strangers and at the moon all night."]
    classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer)
    expected = [row["label"] for row in classify(texts, truncation=True)]
    command(monkeypatch, "--model", tmp_path / "classifier", "--output", tmp_path / "out", "--format", "torch")
    logits, labels = stranger(tmp_path / "out", texts, "torch")
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert labels == expected
    found = [row["score"] for row in classify(texts, truncation=True)]
    np.testing.assert_allclose(shares.max(1), found, atol=1e-4)
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert saved["problem_type"] == "single_label_classification" and saved["max_length"] == 9
    assert saved["id2label"] == {"0": "sad", "1": "glad", "2": "none"}
    assert (
        not {"is_local", "local_files_only"}
        & json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()).keys()
    )


def test_a_regressors_number_has_no_labels(nano_tokenizer):
    config = encoder_config(num_labels=1, architectures=["GemmaEncoderForSequenceClassification"])
    config.id2label = {0: "stars"}
    found = export.settings(config, nano_tokenizer)
    assert (found["problem_type"], found["id2label"], found["max_length"]) == ("regression", None, 64)
    assert found["numbers"] == ["stars"]


def test_the_program_at_the_top_is_the_one_that_is_tested():
    """All that it asks of settings.json is there."""
    asked = set(re.findall(r'settings\["(\w+)"\]', export.__doc__))
    assert (
        asked
        == set(re.findall(r'settings\["(\w+)"\]', SCORE))
        == {"pad_token_id", "max_length", "truncation", "id2label"}
    )


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
    assert "not a trained classifier or ranker" in capsys.readouterr().err
    (tmp_path / "gemma.gguf").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, "--model", tmp_path / "gemma.gguf", "--output", tmp_path / "out")
    assert "gemma.gguf has no trained head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
