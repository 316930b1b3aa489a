"""Laws of the metrics: values worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from modeling_gemma_encoder.finetuning import metrics

LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1])
PREDICTIONS = np.array([1, 1, 0, 0, 0, 1, 0, 1])  # 3 true positives, 3 true negatives, one false of each


def test_accuracy_and_f1_by_hand():
    assert metrics.accuracy_and_f1(PREDICTIONS, LABELS) == {"accuracy": 6 / 8, "f1": pytest.approx(3 / 4)}
    assert metrics.accuracy_and_f1(np.zeros(8, int), LABELS) == {"accuracy": 0.5, "f1": 0}


def test_macro_f1_by_hand():
    # Class 0: precision 1/2, recall 1. Class 1: precision 1, recall 1/2. Class 2: both 1.
    scores = metrics.accuracy_and_macro_f1(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]), classes=3)
    assert scores == {"accuracy": 3 / 4, "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}
    # A class that these rows do not have counts all the same, whether it is given wrongly or never.
    for predictions in ([0, 0, 1, 2], [0, 0, 1, 1]):
        scores = metrics.accuracy_and_macro_f1(np.array(predictions), np.array([0, 0, 1, 1]), classes=3)
        assert scores["f1"] == pytest.approx((1 + {2: 2 / 3, 1: 1}[predictions[-1]]) / 3)


def test_matthews_correlation_by_hand():
    # (3 * 3 - 1 * 1) / sqrt(4 * 4 * 4 * 4)
    assert metrics.matthews_correlation(PREDICTIONS, LABELS)["matthews_correlation"] == pytest.approx(8 / 16)
    assert metrics.matthews_correlation(np.ones(8), LABELS)["matthews_correlation"] == 0


def test_correlations_by_hand():
    scores = metrics.pearson_and_spearman(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    # Deviations (-4, -1, 5) / 3 and (-1, 1, 0): -(-4) - 1 over sqrt(42) sqrt(2). Ranks (1, 2, 3) and (1, 3, 2): 1/2.
    assert scores["pearson"] == pytest.approx(3 / (42 * 2) ** 0.5) and scores["spearman"] == pytest.approx(0.5)
    assert metrics.pearson_and_spearman(np.ones(3), np.array([1.0, 2, 3])) == {"pearson": 0, "spearman": 0}


def test_multirc_by_hand():
    labels, predictions = np.array([1, 0, 1, 0, 1]), np.array([1, 0, 1, 1, 1])
    scores = metrics.answer_f1_and_exact_match(predictions, labels, ["a", "a", "b", "b", "b"])
    # All answers: 3 right of 4 found and of 3 wanted. Question b: class 1 has 2 of 3 found and 2 of 2; class 0 none.
    assert scores["f1_a"] == pytest.approx(6 / 7) and scores["exact_match"] == 0.5
    assert scores["f1_m"] == pytest.approx((1 + (0.8 + 0) / 2) / 2)


def test_multirc_is_sklearns_question_by_question():
    rng = np.random.default_rng(0)
    groups = [(n % 7, "q") for n in range(40)]
    for predictions, labels in rng.integers(0, 2, size=(20, 2, 40)):
        rows = [[n for n, group in enumerate(groups) if group[0] == number] for number in range(7)]
        of_questions = [f1_score(labels[row], predictions[row], average="macro", zero_division=0) for row in rows]
        scores = metrics.answer_f1_and_exact_match(predictions, labels, groups)
        assert scores["f1_m"] == pytest.approx(np.mean(of_questions))
        assert scores["exact_match"] == np.mean([np.array_equal(labels[row], predictions[row]) for row in rows])


def test_record_by_hand():
    answers = [["West Brom", "West Bromwich Albion"], ["the Cat."]]
    scores = metrics.span_f1_and_exact_match(["West Bromwich", "a cat"], answers)
    # "west bromwich" shares two words with a text of three; articles, case and punctuation do not count.
    assert scores == {"f1": pytest.approx((2 * 2 / 5 + 1) / 2), "exact_match": 0.5}
    assert metrics.span_f1_and_exact_match(["dog"], [["cat"]]) == {"f1": 0, "exact_match": 0}
