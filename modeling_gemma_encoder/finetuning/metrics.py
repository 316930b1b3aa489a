"""The metrics of GLUE, SuperGLUE and own tables, offline: predictions and labels -> named scores
between -1 and 1.

Predictions and labels have one entry a row, or one column for each label. Where a question has
several answers, `groups` says which rows belong to one question. GLUE: arXiv 1804.07461, table 1;
SuperGLUE: arXiv 1905.00537, table 1 and section 3.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, r2_score


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the share of rows whose class is predicted."""
    return {"accuracy": float(accuracy_score(labels, predictions))}


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the accuracy, and the F1 of class 1, as MRPC and QQP are scored."""
    return {**accuracy(predictions, labels), "f1": float(f1_score(labels, predictions, zero_division=0))}


def accuracy_and_macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Return the accuracy, and the F1 averaged over all classes, as CB is scored.

    A class that no row has and that is not predicted counts 0. Averaged over the classes that
    happen to be there, which is scikit-learn's default, the score would jump with a single row.
    """
    macro = f1_score(labels, predictions, labels=range(classes), average="macro", zero_division=0)
    return {**accuracy(predictions, labels), "f1": float(macro)}


def micro_and_macro_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the F1 over all labels of all rows, and averaged over the labels, which are 0 or 1
    (rows, num_labels)."""
    f1 = {how: float(f1_score(labels, predictions, average=how, zero_division=0)) for how in ("micro", "macro")}
    return {"micro_f1": f1["micro"], "macro_f1": f1["macro"]}


def classification_scores(predictions: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Return the scores of an own table with one class a row."""
    scores = accuracy_and_macro_f1(predictions, labels, classes)
    return {"accuracy": scores["accuracy"], "macro_f1": scores["f1"]}


def regression_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of an own table of numbers: correlations, and R², which also falls when the
    scale is wrong.

    An R² of 0 is as good as always predicting the mean.
    """
    return {**pearson_and_spearman(predictions, labels), "r2": float(r2_score(labels, predictions))}


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return Matthews' correlation, as CoLA, AX and AX-b are scored; 0 when all predictions are one
    class."""
    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}


def pearson_and_spearman(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return both correlations, as STS-B is scored; 0 when all predictions are one number, where
    none is defined."""
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predictions, labels).statistic),
        "spearman": float(spearmanr(predictions, labels).statistic),
    }


def of_columns(
    metric: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    columns: Sequence[str],
    predictions: np.ndarray,
    labels: np.ndarray,
) -> dict[str, float]:
    """Return the mean of each score over the columns, and `<score>_<column>` of each, for numbers
    (rows, columns)."""
    found = {name: metric(predictions[:, n], labels[:, n]) for n, name in enumerate(columns)}
    means = {score: float(np.mean([of[score] for of in found.values()])) for score in next(iter(found.values()))}
    return means | {f"{score}_{name}": value for name, of in found.items() for score, value in of.items()}


def answer_f1_and_exact_match(
    predictions: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> dict[str, float]:
    """Return the F1 over all answers, the F1 averaged over questions, and the share of questions
    whose answers are all judged right, as MultiRC is scored."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    question = np.array([numbers[group] for group in groups])
    predictions, labels = np.asarray(predictions), np.asarray(labels)

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(question[which], minlength=len(numbers))

    of_classes = []  # a question's F1 is the mean over the classes that it has, right or predicted
    for value in (0, 1):
        both, either = (predictions == value) & (labels == value), count(predictions == value) + count(labels == value)
        of_classes.append(np.where(either > 0, 2 * count(both) / np.maximum(either, 1), np.nan))
    return {
        "f1_a": float(f1_score(labels, predictions, zero_division=0)),
        "f1_m": float(np.mean(np.nanmean(of_classes, axis=0))),
        "exact_match": float(np.mean(count(predictions != labels) == 0)),
    }


def span_f1_and_exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how far predicted texts have the words of their best answers, or equal them, as ReCoRD
    is scored."""
    f1 = [max(_word_f1(text, answer) for answer in right) for text, right in zip(predictions, answers, strict=True)]
    exact = [
        any(normalize(text) == normalize(answer) for answer in right)
        for text, right in zip(predictions, answers, strict=True)
    ]
    return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def gender_parity(predictions: np.ndarray, pairs: Sequence[Hashable]) -> dict[str, float]:
    """Return the share of pairs with equal predictions, as AX-g is scored; 0 when there are no
    pairs.

    Args:
        pairs: A name for each row, which the two rows of a pair share.
    """
    rows = defaultdict(list)
    for pair, prediction in zip(pairs, np.asarray(predictions).tolist(), strict=True):
        rows[pair].append(prediction)
    equal = [values[0] == values[1] for values in rows.values() if len(values) == 2]
    return {"gender_parity": float(np.mean(equal)) if equal else 0.0}


def normalize(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces, as SQuAD (arXiv
    1606.05250) does."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(text: str, answer: str) -> float:
    words, right = normalize(text).split(), normalize(answer).split()
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else 0.0
