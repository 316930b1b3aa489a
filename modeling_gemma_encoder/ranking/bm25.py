"""Candidates of a first stage, which are reranked: those of BM25 (bm25s), or of a file in TREC's
format.

BM25 is Lucene's with k1 1.5 and b 0.75; texts are in lower case, without stemming or stop words.
"""

from collections.abc import Iterator
from pathlib import Path

import bm25s
import numpy as np

from .collection import BM25_DEPTH, Collection
from .trec import TrecRun, read_run


def bm25(collection: Collection, depth: int | None = None) -> TrecRun:
    """Score the collection's candidates by BM25, with statistics of all passages; see
    `Collection.candidates`."""
    candidates, pids = collection.candidates(depth), list(collection.passages)
    needed = {pid for of_query in candidates.values() for pid in of_query}
    places = {pid: place for place, pid in enumerate(pids) if pid in needed}
    return {
        qid: {pid: float(scores[places[pid]]) for pid in candidates[qid]}
        for qid, scores in bm25_scores(collection, pids)
    }


def retrieve(collection: Collection, depth: int = BM25_DEPTH) -> TrecRun:
    """Return the best `depth` of all passages by BM25 for each judged query."""
    pids, trec_run = list(collection.passages), {}
    depth = min(depth, len(pids))
    for qid, scores in bm25_scores(collection, pids):
        best = np.argpartition(-scores, depth - 1)[:depth]
        trec_run[qid] = {pids[i]: float(scores[i]) for i in best}
    return trec_run


def bm25_scores(collection: Collection, pids: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each judged query and the BM25 scores of these passages, (num_passages,)."""
    words = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([collection.passages[pid] for pid in pids], **words), show_progress=False)
    for qid in collection.qrels:
        tokens = bm25s.tokenize(collection.queries[qid], return_ids=False, **words)[0]
        yield qid, index.get_scores(tokens) if tokens else np.zeros(len(pids))


def add_run(collection: Collection, run: str, depth: int | None = None) -> None:
    """
    Give a collection candidates to rerank.

    Args:
        run: A file in TREC's format, or `bm25` for the best of all passages.
        depth: The number of BM25's candidates, 100 by default. A file's are all taken.

    Raises:
        ValueError: the run has none of the judged queries, or an id that is not in the collection.
    """
    if run == "bm25":
        collection.run, collection.first_stage = retrieve(collection, depth or BM25_DEPTH), "BM25"
    else:
        collection.run = read_run(Path(run))
    collection.run_from = run
    collection.check(run)
