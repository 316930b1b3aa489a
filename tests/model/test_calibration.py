"""Laws of calibration: what was distorted by a known temperature and bias is found, and no order changes."""

import json
import sys

import calibrate
import numpy as np
import pytest
import torch
from helpers import build, encoder_config, jsonl, pad, texts
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.calibration import calibration_error, fit
from modeling_gemma_encoder.finetuning import model as finetuning
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.finetuning.tasks import Task
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template


def test_the_temperature_of_classes_is_found():
    draw = np.random.default_rng(0)
    true = draw.normal(size=(20_000, 3)) * 2
    labels = (true + draw.gumbel(size=true.shape)).argmax(-1)  # drawn from softmax(true)
    found = fit(true * 3.5, labels)
    assert found["calibration_temperature"] == pytest.approx(3.5, rel=0.05) and found["calibration_bias"] == 0


@pytest.mark.parametrize("shape", [(30_000,), (10_000, 3)])
def test_the_temperature_and_bias_of_single_scores_are_found(shape):
    draw = np.random.default_rng(0)
    true = draw.normal(size=shape) * 2 - 1
    labels = (draw.random(shape) < 1 / (1 + np.exp(-true))).astype(int)
    found = fit(true * 0.25 + 7, labels)
    assert found["calibration_temperature"] == pytest.approx(0.25, rel=0.05)
    assert found["calibration_bias"] == pytest.approx(7, abs=0.02)
    ignored = np.full(shape, -100)
    scores = np.concatenate([true * 0.25 + 7, draw.normal(size=shape) * 1e3])
    assert fit(scores, np.concatenate([labels, ignored])) == pytest.approx(found, rel=1e-3)


def test_what_cannot_be_fitted_is_said():
    with pytest.raises(ValueError, match="all"):
        fit(np.array([1.0, 2.0]), np.array([1, 1]))
    with pytest.raises(ValueError, match="not higher"):
        fit(np.array([1.0, 2.0]), np.array([1, 0]))
    with pytest.raises(ValueError, match="do not match"):
        fit(np.zeros((3, 2)), np.zeros(2))


def test_the_error_is_that_of_the_hand():
    # Two bins: confidence 0.8 right in 1 of 2, and 0.3 right in 0 of 2.
    confidences, right = np.array([0.8, 0.8, 0.3, 0.3]), np.array([1, 0, 0, 0])
    assert calibration_error(confidences, right, bins=2) == pytest.approx((0.3 + 0.3) / 2)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_probabilities_are_of_the_config_and_change_no_logit(tmp_path):
    batch, fields = pad(texts((5, 9, 3))), {"calibration_temperature": 2.0, "calibration_bias": 0.5}
    classifier = build(GemmaEncoderForSequenceClassification, encoder_config(num_labels=3))
    with torch.no_grad():
        logits = classifier(**batch).logits
        with pytest.raises(ValueError, match="is None: fit it"):
            classifier.probabilities(logits)
        classifier.config.update(fields)
        classifier.save_pretrained(tmp_path)
        again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(again(**batch).logits, logits)
    torch.testing.assert_close(again.probabilities(logits), torch.softmax(logits / 2, -1))
    again.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(again.probabilities(logits), torch.sigmoid((logits - 0.5) / 2))
    again.config.problem_type = "regression"
    with pytest.raises(ValueError, match="regression"):
        again.probabilities(logits)
    ranker = build(GemmaEncoderForRanking, encoder_config(**fields))
    torch.testing.assert_close(ranker.probabilities(logits[:, :1]), torch.sigmoid((logits[:, :1] - 0.5) / 2))
    for wrong in (0, -1.0, float("inf"), True):
        with pytest.raises(StrictDataclassError, match="calibration_temperature"):
            encoder_config(calibration_temperature=wrong)


def test_a_ranker_is_calibrated_from_the_command_line(decoder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).save_pretrained(tmp_path / "ranker")
    set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE).save_pretrained(tmp_path / "ranker")
    rows = [
        {"query": f"query {n}", "passage": f"text {i}", "label": int(i < 1 + n % 2)} for n in range(8) for i in range(4)
    ]
    jsonl(tmp_path / "pairs.jsonl", rows)
    flags = ["--model", tmp_path / "ranker", "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in ("calibrate", *flags, "--device", "cpu")])
    calibrate.main()
    assert "held-out judgments" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "calibration.json").read_text())
    model = GemmaEncoderForRanking.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.calibration_temperature == facts["calibration_temperature"] > 0
    assert model.config.calibration_bias == facts["calibration_bias"]
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 5000
    options = FineTuningArguments(model=str(tmp_path / "out"))
    task = Task(("query", "passage"), None, problem="choice")
    assert finetuning.build(task, options).config.calibration_temperature is None  # training makes the fit void
    with pytest.raises(SystemExit):
        calibrate.main()
    assert "is there already" in capsys.readouterr().err
