"""First stages whose candidates are reranked: BM25 (bm25s), or the run of another system."""

from collections.abc import Iterator
from pathlib import Path

import bm25s
import numpy as np

from .collection import BM25_DEPTH, Collection
from .trec import TrecRun, read_run


def _bm25(collection: Collection, pids: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each judged query and its scores of these passages."""
    words = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([collection.passages[pid] for pid in pids], **words), show_progress=False)
    for qid in collection.qrels:
        tokens = bm25s.tokenize(collection.queries[qid], return_ids=False, **words)[0]
        yield qid, index.get_scores(tokens) if tokens else np.zeros(len(pids))


def bm25(collection: Collection, depth: int | None = None) -> TrecRun:
    """
    The collection's candidates by BM25 (bm25s: Lucene's, k1 1.5, b 0.75, lower case, no stemming, no stop words),
    whose statistics are those of all passages; `depth` as for `candidates`.
    """
    chosen, pids = collection.candidates(depth), list(collection.passages)
    needed = {pid for of_query in chosen.values() for pid in of_query}
    places = {pid: place for place, pid in enumerate(pids) if pid in needed}
    return {qid: {pid: float(s[places[pid]]) for pid in chosen[qid]} for qid, s in _bm25(collection, pids)}


def retrieve(collection: Collection, depth: int = BM25_DEPTH) -> TrecRun:
    """The best `depth` of all passages by BM25, for each query that was judged."""
    pids, run = list(collection.passages), {}
    depth = min(depth, len(pids))
    for qid, scores in _bm25(collection, pids):
        best = np.argpartition(-scores, depth - 1)[:depth]
        run[qid] = {pids[i]: float(scores[i]) for i in best}
    return run


def add_run(collection: Collection, run: str, depth: int | None = None) -> None:
    """
    Give a collection candidates: a TREC run file's, or with `bm25` the best `depth`, by default 100, of all passages.

    Raises:
        ValueError: the run has none of the judged queries, or names what is not there.
    """
    if run == "bm25":
        collection.run, collection.first_stage = retrieve(collection, depth or BM25_DEPTH), "BM25"
    else:
        collection.run = read_run(Path(run))
    collection.run_from = run
    collection.check(run)
