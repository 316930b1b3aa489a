"""A judged collection: queries, passages, their judgments, and the candidates that are reranked.

Queries and passages are texts by id; all ids are strings. `reading.py` reads collections from files
and from the Hub.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .trec import Qrels, TrecRun, ranked

BM25_DEPTH = 100  # candidates of each query that BM25 retrieves by default


class Texts(Mapping[str, str]):
    """Map ids to texts that stay where they are, such as on disk in a data set of millions of
    passages.

    Raises:
        ValueError: an id is there twice.
    """

    def __init__(self, ids: Iterable, texts: Sequence[str]):
        self.ids = np.array([str(one) for one in ids])
        self.order = np.argsort(self.ids, kind="stable")
        self.sorted = self.ids[self.order]
        if len(self.sorted) > 1 and (same := self.sorted[1:] == self.sorted[:-1]).any():
            raise ValueError(f"The id {str(self.sorted[1:][same][0])!r} is there twice; ids must be unique.")
        self.texts = texts

    def __getitem__(self, one: str) -> str:
        # Bisection over sorted ids takes far less memory than a dictionary of millions of them.
        place = np.searchsorted(self.sorted, one)
        if place == len(self.sorted) or self.sorted[place] != one:
            raise KeyError(one)
        return self.texts[int(self.order[place])]

    def __iter__(self) -> Iterator[str]:
        return (str(one) for one in self.ids)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Collection:
    """
    Hold queries, passages, what was judged of them, and the candidates to rerank if there are any.

    Args:
        qrels: Query id -> passage id -> grade. The grade is 0 for passages that were judged
            irrelevant.
        run: The candidates of each query with their first scores. None: the judged passages are
            reranked.
        first_stage: The name of the run in tables.
        relevance_level: The least grade that counts as relevant.
        run_from: The file of the run, or `bm25`. None: the run came with the data, or there is
            none.
    """

    queries: Mapping[str, str]
    passages: Mapping[str, str]
    qrels: Qrels
    run: TrecRun | None = None
    first_stage: str = "first stage"
    relevance_level: int = 1
    run_from: str | None = None

    def candidates(self, depth: int | None = None) -> dict[str, list[str]]:
        """Return the passages to rerank for each judged query: the run's best `depth`, or the
        judged ones."""
        if self.run is None:
            return {qid: list(grades) for qid, grades in self.qrels.items()}
        return {qid: ranked(self.run.get(qid, {}))[:depth] for qid in self.qrels}

    def reranked(self, depth: int | None = None) -> dict:
        """Return where the candidates come from, `run`, and how many each query has, `depth`; None
        means all."""
        if self.run is None:
            return {"run": "judged pool", "depth": None}
        default = BM25_DEPTH if self.run_from == "bm25" else None
        return {"run": self.run_from or "its own", "depth": depth or default}

    def check(self, name: str) -> "Collection":
        """Return the collection, or raise ValueError with its name if nothing is judged or an id is
        unknown."""
        if not self.qrels:
            raise ValueError(f"{name}: no query was judged.")
        # Passages that were judged need a text only where they are reranked themselves.
        check_ids("qrels", self.qrels, self.queries, {} if self.run else self.passages, name)
        if self.run is not None:
            of_judged = {qid: passages for qid, passages in self.run.items() if qid in self.qrels}
            if not of_judged:
                raise ValueError(f"{name}: the run has none of the {len(self.qrels)} queries that were judged.")
            check_ids("run", of_judged, self.queries, self.passages, name)
        return self

    def without_incomparable(self, name: str) -> "Collection":
        """
        Return the collection without the queries for which all rankings are equally good.

        These have no grade above 0, or, where judged passages are reranked, only relevant passages
        or passages of one grade. Their number is printed, and that of the queries that count 0 in
        some or all measures.

        Raises:
            ValueError: no query is left.
        """
        kept = self.qrels
        for reason, incomparable in self._reasons().items():
            others = {qid: grades for qid, grades in kept.items() if not incomparable(grades.values())}
            if left_out := len(kept) - len(others):
                print(f"{name}: {left_out} of {len(self.qrels)} queries have {reason} and are left out")
            kept = others
        if not kept:
            raise ValueError(f"{name}: no query has both a relevant passage and another one; rerank a run, or `bm25`.")
        left = replace(self, qrels=kept)
        left._say_what_counts_zero(name)
        return left

    def _reasons(self) -> dict:
        """Return the reasons why all rankings of a query are equal, and a test of its grades for
        each."""
        reasons = {"no relevant passage": lambda grades: not any(grade > 0 for grade in grades)}
        if self.run is None:
            level = self.relevance_level
            reasons["only relevant passages judged"] = lambda grades: all(grade >= level for grade in grades)
            reasons["passages of one grade alone judged"] = lambda grades: len(set(grades)) == 1
        return reasons

    def _say_what_counts_zero(self, name: str) -> None:
        """Print how many queries are worth 0 to all rankings in binary measures, or have no
        candidates."""
        count, level = len(self.qrels), self.relevance_level
        if none := sum(max(grades.values()) < level for grades in self.qrels.values()):
            of_level = f"have no passage from grade {level} on, and count 0 in measures that know no grades"
            print(f"{name}: {none} of {count} queries {of_level}")
        if self.run is not None and (without := sum(not self.run.get(qid) for qid in self.qrels)):
            print(f"{name}: the run has no passages for {without} of {count} queries, which count 0")


def check_ids(what: str, table: dict, queries: Mapping, passages: Mapping, name: str) -> None:
    """Raise ValueError if a table of queries and their passages has an id that is not in the
    collection.

    Args:
        what: The table's name in the message, such as "qrels".
        passages: If empty, the ids of passages are not checked.
        name: Begins the message.
    """
    if unknown := [qid for qid in table if qid not in queries]:
        raise ValueError(f"{name}: the {what} name {some(unknown)}, not among the {len(queries)} queries.")
    known = {pid: pid in passages for of_query in table.values() for pid in of_query} if passages else {}
    if unknown := [pid for pid, found in known.items() if not found]:
        raise ValueError(f"{name}: the {what} name {some(unknown)}, not among the {len(passages)} passages.")


def some(ids: list[str]) -> str:
    """Return the first three ids as a text, and how many more there are."""
    first = ", ".join(map(repr, ids[:3]))
    return f"{first} and {len(ids) - 3} more ids" if len(ids) > 3 else first
