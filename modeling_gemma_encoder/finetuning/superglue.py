"""The tasks of SuperGLUE (Wang et al., 2019, arXiv 1905.00537)."""

import re
from functools import partial

import numpy as np
from datasets import Dataset

from .metrics import (
    accuracy,
    accuracy_and_macro_f1,
    answer_f1_and_exact_match,
    gender_parity,
    matthews_correlation,
    span_f1_and_exact_match,
)
from .tasks import Task, by_label
from .truncation import mark

RTE = ("entailment", "not_entailment")

PRONOUNS = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)


def copa(row: dict) -> dict:
    """Return the premise with its question, and the two choices."""
    read = {"first": f"{row['premise']} What was the {row['question']}?", "second": [row["choice1"], row["choice2"]]}
    return {**read, "label": [int(row["label"] == choice) for choice in (0, 1)]} if "label" in row else read


def multirc(row: dict) -> dict:
    """Return the question and the answer as one text."""
    return {"second": f"{row['question']} {row['answer']}"}


def record(row: dict) -> dict:
    """Return the passage, and the query with each entity in its gap, where truncation spares it."""
    before, gap, after = row["query"].partition("@placeholder")
    if not gap or not row["entities"]:
        raise ValueError(f"Row {row['idx']} of ReCoRD must have a @placeholder in its query, and entities.")
    read = {
        "first": row["passage"].replace("@highlight", ""),
        "second": [before + entity + after for entity in row["entities"]],
        "keep": [{"second": (len(before), len(before) + len(entity))} for entity in row["entities"]],
    }
    return {**read, "label": [int(e in row["answers"]) for e in row["entities"]]} if row.get("answers") else read


def wic(row: dict) -> dict:
    """Return both sentences with the word in brackets, which truncation spares."""
    first, keep_first = mark(row["sentence1"], (row["start1"], row["end1"]))
    second, keep_second = mark(row["sentence2"], (row["start2"], row["end2"]))
    return {"first": first, "second": second, "keep": {"first": keep_first, "second": keep_second}}


def wsc(row: dict) -> dict:
    """Return the text with the noun and the pronoun in brackets, which truncation spares."""
    spans = [find_words(row["text"], row[f"span{n}_index"], row[f"span{n}_text"]) for n in (1, 2)]
    text, keep = mark(row["text"], *spans)
    return {"first": text, "keep": {"first": keep}}


def find_words(text: str, index: int, words: str) -> tuple[int, int]:
    """Return the first character of a phrase in a text, and the one after its last.

    Of several places it is the one nearest to the word number `index`, as WSC's numbers and case
    are not always right. A few phrases, such as "Kamenev and Zinoviev", are not in one piece in the
    text: the place is then the word at `index`.

    Raises:
        ValueError: The text has no such word number.
    """
    each = [match.span() for match in re.finditer(r"\S+", text)]
    if not 0 <= index < len(each):
        raise ValueError(f"The word number {index} is not in WSC's text {text!r}.")
    places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)]
    return min(places or [each[index]], key=lambda place: abs(place[0] - each[index][0]))


def score_multirc(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Return the two scores of MultiRC that the benchmark counts."""
    questions = [(index["paragraph"], index["question"]) for index in rows["idx"]]
    scores = answer_f1_and_exact_match(predictions, np.array(rows["label"]), questions)
    return {name: scores[name] for name in ("f1_a", "exact_match")}


def score_record(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Return the scores of the chosen entities."""
    texts = [entities[choice] for entities, choice in zip(rows["entities"], predictions, strict=True)]
    return span_f1_and_exact_match(texts, rows["answers"])


def score_winogender(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Return the accuracy, and the parity over pairs of rows that differ only in the gender of a
    pronoun."""
    sentences = zip(rows["premise"], rows["hypothesis"], strict=True)
    alike = [(PRONOUNS.sub("_", premise), hypothesis) for premise, hypothesis in sentences]
    return {**by_label(accuracy)(predictions, rows), **gender_parity(predictions, alike)}


TASKS = {
    "boolq": Task(
        ("question", "passage"),
        by_label(accuracy),
        ("false", "true"),
        template="{first}?\n{second}",
        group="passage",
        max_length=256,
    ),
    "cb": Task(
        ("premise", "hypothesis"),
        by_label(partial(accuracy_and_macro_f1, classes=3)),
        ("entailment", "contradiction", "neutral"),
        max_length=256,
        epochs=20,
    ),
    "copa": Task(
        ("premise", "choice1", "choice2"),
        by_label(accuracy),
        ("choice1", "choice2"),
        problem="choice",
        prepare=copa,
        columns=("question",),
        epochs=20,
    ),
    "multirc": Task(
        ("paragraph",),
        score_multirc,
        ("false", "true"),
        prepare=multirc,
        columns=("question", "answer", "idx"),
        group="paragraph",
        max_length=512,
    ),
    "record": Task(
        ("passage", "query"),
        score_record,
        problem="choice",
        prepare=record,
        columns=("entities", "idx"),
        label=None,
        group="passage",
        max_length=512,
        epochs=2,
        batch_size=4,  # lists
    ),
    "rte": Task(("premise", "hypothesis"), by_label(accuracy), RTE, max_length=256, epochs=10),
    "wic": Task(
        ("sentence1", "sentence2"),
        by_label(accuracy),
        ("false", "true"),
        prepare=wic,
        columns=("start1", "end1", "start2", "end2"),
        epochs=10,
    ),
    "wsc": Task(
        ("text",),
        by_label(accuracy),
        ("false", "true"),
        prepare=wsc,
        columns=("span1_index", "span1_text", "span2_index", "span2_text"),
        config="wsc.fixed",
        epochs=20,
    ),
    "axb": Task(
        ("sentence1", "sentence2"),
        by_label(matthews_correlation),
        RTE,
        train_on="rte",
        validation=(),
        max_length=256,
    ),
    "axg": Task(("premise", "hypothesis"), score_winogender, RTE, train_on="rte", validation=(), max_length=256),
}

# Diagnostics do not count in the average.
UNSCORED = ("axb", "axg")
