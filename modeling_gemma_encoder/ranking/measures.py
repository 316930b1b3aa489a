"""Measures of rankings, as `ir_measures` names and computes them: qrels and a `TrecRun` -> a value
for each query."""

from collections.abc import Sequence

import ir_measures
import numpy as np
from ir_measures import Measure

from ..losses_gemma_encoder import IGNORE
from .trec import Qrels, TrecRun, ranked

MEASURES = ("nDCG@10", "RR@10", "AP", "R@100")


def parse_measures(names: Sequence[str], relevance_level: int = 1) -> list[Measure]:
    """
    Return measures by their names.

    Args:
        relevance_level: The least grade that binary measures count as relevant, unless a name has
            `(rel=...)`.

    Raises:
        ValueError: `ir_measures` has no measure of that name.
    """
    found = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError) as error:
            known = ", ".join(MEASURES)
            raise ValueError(f"{name!r} is not a measure of ir_measures, such as {known}: {error}") from error
        if relevance_level != 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
            measure = measure(rel=relevance_level)
        found.append(measure)
    return found


def measure(qrels: Qrels, run: TrecRun, measures: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """
    Compute measures of a ranking, as measure -> query -> value.

    All queries of `qrels` have a value; one that the ranking lacks is worth 0, as for `trec_eval
    -c`.
    """
    # The libraries behind ir_measures break ties differently, so that they are given ranks in place
    # of scores.
    ranks = {
        qid: {pid: -float(rank) for rank, pid in enumerate(ranked(scores))} for qid, scores in run.items() if scores
    }
    found = {str(one): dict.fromkeys(qrels, 0.0) for one in measures}
    for one in measures:  # each in a call of its own, or the gains of one nDCG would be used for all
        for value in ir_measures.iter_calc([_with_gains(one, qrels)], qrels, ranks):
            found[str(one)][value.query_id] = value.value
    return found


def _with_gains(measure: Measure, qrels: Qrels) -> Measure:
    """Return the measure, with explicit gains if it is an nDCG of exponential gain."""
    if gain_of(measure) != "exponential":
        return measure
    # Without explicit gains, ir_measures would leave it to a program that needs numbers as ids.
    grades = {grade for of_query in qrels.values() for grade in of_query.values() if grade > 0}
    return measure(dcg="log2", gains={grade: 2**grade - 1 for grade in sorted(grades)})


def gain_of(measure: Measure) -> str | None:
    """Return the name of an nDCG's gain, which is what a passage of grade g is worth before the
    discount by its rank.

    "linear" is g, as in trec_eval and `nDCG@10`; "exponential" is 2^g - 1, as in
    `nDCG(dcg='exp-log2')@10`; "own" are gains given in the measure's name. Other measures have
    None.
    """
    if measure.NAME != "nDCG":
        return None
    if "gains" in measure.params:
        return "own"
    return "exponential" if measure.params.get("dcg") == "exp-log2" else "linear"


def heading(name: str) -> str:
    """Return a measure's name for the head of a column, with the gain of an nDCG."""
    gain = gain_of(ir_measures.parse_measure(name))
    return f"{name} ({gain} gain)" if gain else name


def measure_lists(scores: np.ndarray, labels: np.ndarray, measures: Sequence[Measure]) -> dict[str, float]:
    """
    Compute means over lists, from scores and labels (num_lists, num_docs).

    Documents labeled -100 are padding and do not count.
    """
    places = [np.flatnonzero(row != IGNORE) for row in labels]
    qrels = {str(n): {str(i): int(labels[n, i]) for i in of_list} for n, of_list in enumerate(places)}
    trec_run = {str(n): {str(i): float(scores[n, i]) for i in of_list} for n, of_list in enumerate(places)}
    return {name: float(np.mean([*found.values()])) for name, found in measure(qrels, trec_run, measures).items()}
