"""Lists to train a ranker on: from the forms that MS MARCO has on the Hub, and from judged folders and files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from zlib import crc32

import numpy as np
from datasets import Dataset, load_dataset

from ..losses_gemma_encoder import DISTILLATION_LOSSES
from .bm25 import add_run
from .collection import Collection, Texts, lists_of, read_collection
from .data import RankingDataset

CONFIGS = {"sentence-transformers/msmarco-bm25": "triplet-50", "sentence-transformers/msmarco": "labeled-list"}
CORPORA = {"Tevatron/msmarco-passage-new": "Tevatron/msmarco-passage-corpus-new"}


class Rows(Sequence):
    """Rows of a data set as lists, each made when it is read."""

    def __init__(self, rows: Dataset, read: Callable[[dict], dict]):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.read(self.rows[number])


def of_texts(row: dict) -> dict:
    negatives = [text for name, text in row.items() if name.startswith("negative") and text]
    return {"query": row["query"], "documents": [row["positive"], *negatives], "labels": [1] + [0] * len(negatives)}


def of_labels(row: dict) -> dict:
    return {"query": str(row["query_id"]), "documents": list(map(str, row["doc_ids"])), "labels": row["labels"]}


def of_ids(row: dict) -> dict:
    positive, negative = row["positive_document_ids"], row["negative_document_ids"]
    labels = [1] * len(positive) + [0] * len(negative)
    return {
        "query": row.get("query") or row["query_text"],
        "documents": [str(one) for one in (*positive, *negative)],
        "labels": labels,
    }


def of_passages(row: dict) -> dict:
    positive, negative = row["positive_passages"], row["negative_passages"]
    texts = [f"{one.get('title') or ''} {one['text']}".strip() for one in (*positive, *negative)]
    return {"query": row["query"], "documents": texts, "labels": [1] * len(positive) + [0] * len(negative)}


def of_margins(row: dict) -> dict:
    documents = [str(row["positive_id"]), str(row["negative_id"])]
    return {"query": str(row["query_id"]), "documents": documents, "labels": [row["score"], 0.0]}


READERS = {  # by the columns that tell them
    ("query", "positive", "negative"): of_texts,
    ("query", "positive", "negative_1"): of_texts,
    ("query_id", "doc_ids", "labels"): of_labels,
    ("query_id", "positive_document_ids", "negative_document_ids"): of_ids,
    ("query", "positive_passages", "negative_passages"): of_passages,
    ("query_id", "positive_id", "negative_id", "score"): of_margins,
}


def hub_lists(
    source: str, list_size: int, seed: int, from_teacher: bool, limit: int | None = None
) -> tuple[RankingDataset, list[str], str]:
    """Lists of a data set on the Hub, at most `limit` of them, their queries' texts, and a digest of the rows."""
    name, config, split = [*source.split(":"), None, None][:3]
    rows = load_dataset(name, config or CONFIGS.get(name), split=split or "train")
    read = next((read for columns, read in READERS.items() if set(columns) <= set(rows.column_names)), None)
    if read is None:
        forms = "; ".join(", ".join(columns) for columns in READERS)
        raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}. Lists have one of: {forms}.")
    if (read is of_margins) != from_teacher:
        names = " and ".join(DISTILLATION_LOSSES)
        raise ValueError(f"{source}: a teacher's scores go with --ranking_loss {names}, labels with others.")
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    texts = {}
    if read in (of_labels, of_margins):
        corpus, queries = load_dataset(name, "corpus", split="train"), load_dataset(name, "queries", split="train")
        texts["passages"] = Texts(corpus["passage_id"], corpus["passage"])
        texts["queries"] = Texts(queries["query_id"], queries["query"])
    elif read is of_ids:
        corpus = load_dataset(CORPORA.get(name, f"{name}-corpus"), split="train")
        texts["passages"] = Texts(corpus["docid"], corpus["text"])
    lists = RankingDataset(Rows(rows, read), list_size, seed, from_teacher=from_teacher, **texts)
    column = next(column for column in ("query", "query_text", "query_id") if column in rows.column_names)
    asked = [texts["queries"][str(one)] for one in rows[column]] if "queries" in texts else list(rows[column])
    return lists, asked, rows._fingerprint


def local_lists(
    sources: Sequence[str],
    list_size: int,
    seed: int,
    limit: int | None = None,
    pairs: tuple[str, str, str] | None = None,
    run: str | None = None,
    held_out: float = 0.0,
    eval_run: str | None = None,
    eval_depth: int | None = None,
) -> tuple[RankingDataset, list[str], str, Collection]:
    """
    Lists of all queries of folders and files, their queries' texts, a digest of them, and what is held out.

    Args:
        pairs: Columns of query, passage and label in files of pairs.
        run: A TREC run file whose passages are candidates too, or `bm25`, the 100 best.
        held_out: About this share of the queries, drawn by their texts, comes back as a collection instead.
        eval_run: Candidates of what is held out, each query's from its own folder or file; as for `add_run`.
    """
    rows, rest = [], Collection({}, {}, {})
    for number, source in enumerate(sources):
        found = read_collection(source, pairs)
        found.run = None
        mark = f"{number}-" if len(sources) > 1 else ""
        held = _hold_out(found, held_out, source)
        if eval_run and held.qrels:
            add_run(held, eval_run, eval_depth)
        _add_marked(rest, held, mark)
        if run:
            add_run(found, run)
        lists, without = lists_of(found, found.run)
        if without:
            print(f"{source}: {without} of {len(found.qrels)} queries have no relevant passage or no other: left out")
        for row in lists:
            rows.append({**row, "query": mark + row["query"], "documents": [mark + pid for pid in row["documents"]]})
    if not rows:
        how = "" if run else "; --train_run bm25 finds others"
        raise ValueError(f"{', '.join(sources)}: no query has both a relevant passage and another one{how}.")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:limit]]
    lists = RankingDataset(rows, list_size, seed, rest.passages, rest.queries)
    asked = [rest.queries[row["query"]] for row in rows]
    return lists, asked, sha256(json.dumps(rows).encode()).hexdigest()[:16], rest


def _hold_out(found: Collection, share: float, name: str) -> Collection:
    """Take about a share of the judged queries, drawn by their texts, out of a collection, and say how many."""
    out = {qid for qid in found.qrels if crc32(found.queries[qid].encode()) % 1000 < 1000 * share}
    held = replace(found, qrels={qid: grades for qid, grades in found.qrels.items() if qid in out})
    if share:
        how = f"about {share} of them, drawn by their texts"
        print(f"{name}: held out {len(out)} of {len(found.qrels)} queries ({how})")
    found.qrels = {qid: grades for qid, grades in found.qrels.items() if qid not in out}
    return held


def _add_marked(rest: Collection, held: Collection, mark: str) -> None:
    """Adds a collection to another one, its ids after a mark, so that ids of several folders stay apart."""

    def marked(table: dict[str, dict]) -> dict[str, dict]:
        return {
            mark + qid: {mark + pid: value for pid, value in table[qid].items()} for qid in held.qrels if qid in table
        }

    rest.passages |= {mark + pid: text for pid, text in held.passages.items()}
    rest.queries |= {mark + qid: text for qid, text in held.queries.items()}
    rest.qrels |= marked(held.qrels)
    if held.run is not None:
        rest.run = (rest.run or {}) | marked(held.run)
        rest.first_stage, rest.run_from = held.first_stage, held.run_from
