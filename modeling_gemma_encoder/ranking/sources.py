"""Lists to train a ranker on: from the forms that MS MARCO has on the Hub, and from judged folders
and files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from zlib import crc32

import numpy as np
from datasets import Dataset, load_dataset

from ..losses_gemma_encoder import DISTILLATION_LOSSES
from .arguments import RankingArguments
from .bm25 import add_run
from .collection import Collection, Texts
from .data import RankingDataset
from .reading import read_collection
from .trec import TrecRun


@dataclass(frozen=True)
class TrainingLists:
    """
    Hold lists to train on, and what they were made of.

    Args:
        queries: The text of each list's query.
        digest: A hash of the rows that lists are drawn from. It tells whether a later run has the
            same data.
        held_out: The queries that are evaluated instead; empty if there are none.
    """

    dataset: RankingDataset
    queries: list[str]
    digest: str
    held_out: Collection = field(default_factory=lambda: Collection({}, {}, {}))


# 1. Data sets on the Hub

CONFIGS = {"sentence-transformers/msmarco-bm25": "triplet-50", "sentence-transformers/msmarco": "labeled-list"}
CORPORA = {"Tevatron/msmarco-passage-new": "Tevatron/msmarco-passage-corpus-new"}


class Rows(Sequence):
    """View rows of a data set as lists; each is made when it is read."""

    def __init__(self, rows: Dataset, read: Callable[[dict], dict]):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.read(self.rows[number])


def of_texts(row: dict) -> dict:
    """Return the list of a row with the texts of one positive and any number of negatives."""
    negatives = [text for name, text in row.items() if name.startswith("negative") and text]
    labels = [1] + [0] * len(negatives)
    return {"query": row["query"], "documents": [row["positive"], *negatives], "labels": labels}


def of_labels(row: dict) -> dict:
    """Return the list of a row with ids of passages and their labels."""
    return {"query": str(row["query_id"]), "documents": list(map(str, row["doc_ids"])), "labels": row["labels"]}


def of_ids(row: dict) -> dict:
    """Return the list of a row with the ids of positive and of negative passages."""
    positive, negative = row["positive_document_ids"], row["negative_document_ids"]
    return {
        "query": row.get("query") or row["query_text"],
        "documents": [str(one) for one in (*positive, *negative)],
        "labels": [1] * len(positive) + [0] * len(negative),
    }


def of_passages(row: dict) -> dict:
    """Return the list of a row with positive and negative passages, each a title and a text."""
    positive, negative = row["positive_passages"], row["negative_passages"]
    texts = [f"{one.get('title') or ''} {one['text']}".strip() for one in (*positive, *negative)]
    return {"query": row["query"], "documents": texts, "labels": [1] * len(positive) + [0] * len(negative)}


def of_margins(row: dict) -> dict:
    """Return the list of a row with two passages and the margin that a teacher puts between them."""
    documents = [str(row["positive_id"]), str(row["negative_id"])]
    return {"query": str(row["query_id"]), "documents": documents, "labels": [row["score"], 0.0]}


READERS = {  # by the columns that a form has
    ("query", "positive", "negative"): of_texts,
    ("query", "positive", "negative_1"): of_texts,
    ("query_id", "doc_ids", "labels"): of_labels,
    ("query_id", "positive_document_ids", "negative_document_ids"): of_ids,
    ("query", "positive_passages", "negative_passages"): of_passages,
    ("query_id", "positive_id", "negative_id", "score"): of_margins,
}


def hub_lists(source: str, list_size: int, seed: int, from_teacher: bool, limit: int | None = None) -> TrainingLists:
    """
    Load lists from a data set on the Hub, `name[:config[:split]]`, at most `limit` of them.

    Raises:
        ValueError: the columns are those of no form, or a teacher's scores meet a loss of labels or
            the reverse.
    """
    name, config, split = [*source.split(":"), None, None][:3]
    rows = load_dataset(name, config or CONFIGS.get(name), split=split or "train")
    read = find_reader(rows, source)
    if (read is of_margins) != from_teacher:
        losses = " and ".join(DISTILLATION_LOSSES)
        raise ValueError(
            f"{source}: a teacher's scores are for --ranking_loss {losses}, and labels are for the other losses."
        )
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    texts = load_texts(name, read)
    dataset = RankingDataset(Rows(rows, read), list_size, seed, from_teacher=from_teacher, **texts)
    column = next(column for column in ("query", "query_text", "query_id") if column in rows.column_names)
    queries = list(rows[column])
    if "queries" in texts:
        queries = [texts["queries"][str(one)] for one in queries]
    return TrainingLists(dataset, queries, rows._fingerprint)


def find_reader(rows: Dataset, source: str) -> Callable[[dict], dict]:
    """Return the function that reads rows with these columns; raise ValueError if there is none."""
    for columns, read in READERS.items():
        if set(columns) <= set(rows.column_names):
            return read
    forms = "; ".join(", ".join(columns) for columns in READERS)
    raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}. Lists have one of: {forms}.")


def load_texts(name: str, read: Callable[[dict], dict]) -> dict[str, Texts]:
    """Load the texts of the ids in a form's rows, as `passages` and `queries`; a form of texts
    needs none."""
    if read in (of_labels, of_margins):
        corpus, queries = load_dataset(name, "corpus", split="train"), load_dataset(name, "queries", split="train")
        return {
            "passages": Texts(corpus["passage_id"], corpus["passage"]),
            "queries": Texts(queries["query_id"], queries["query"]),
        }
    if read is of_ids:
        corpus = load_dataset(CORPORA.get(name, f"{name}-corpus"), split="train")
        return {"passages": Texts(corpus["docid"], corpus["text"])}
    return {}


# 2. Judged folders and files


def local_lists(ranking: RankingArguments, seed: int, limit: int | None = None) -> TrainingLists:
    """Make lists of all queries in `ranking.train_data`, folders and files, but those that are
    held out.

    A held-out query reranks candidates from its own folder or file.

    Raises:
        ValueError: no query has both a relevant passage and another one, or a collection cannot be
            read.
    """
    rows, merged = [], Collection({}, {}, {})
    for number, source in enumerate(ranking.train_data):
        found = read_collection(source, tuple(ranking.pair_columns))
        found.run = None
        held_out = _hold_out(found, ranking.held_out, source)
        eval_run = ranking.trec_runs()[0]
        if eval_run and held_out.qrels:
            add_run(held_out, eval_run, ranking.eval_depth)
        # Ids of several folders may be the same, so that each has the folder's number before it.
        prefix = f"{number}-" if len(ranking.train_data) > 1 else ""
        _merge(merged, held_out, prefix)
        for row in _rows_of(found, ranking.train_run, source):
            documents = [prefix + pid for pid in row["documents"]]
            rows.append({**row, "query": prefix + row["query"], "documents": documents})
    if not rows:
        places, hint = ", ".join(ranking.train_data), "" if ranking.train_run else "; --train_run bm25 finds others"
        raise ValueError(f"{places}: no query has both a relevant passage and another one{hint}.")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:limit]]
    dataset = RankingDataset(rows, ranking.list_size, seed, merged.passages, merged.queries)
    queries = [merged.queries[row["query"]] for row in rows]
    return TrainingLists(dataset, queries, sha256(json.dumps(rows).encode()).hexdigest()[:16], merged)


def lists_of(collection: Collection, run: TrecRun | None = None) -> tuple[list[dict], int]:
    """
    Make a row for a `RankingDataset` of each query: all that was judged, and a run's passages.

    Passages of the run that nobody judged are labeled irrelevant.

    Returns:
        The rows, and the number of queries without a row, which lack a relevant passage or another
        one.
    """
    rows = []
    for qid, judged in collection.qrels.items():
        grades = {pid: max(grade, 0) for pid, grade in judged.items() if pid in collection.passages}
        grades = {**dict.fromkeys((run or {}).get(qid, ()), 0), **grades}
        if any(grades.values()) and len(set(grades.values())) > 1:
            rows.append({"query": qid, "documents": list(grades), "labels": list(grades.values())})
    return rows, len(collection.qrels) - len(rows)


def _rows_of(found: Collection, run: str | None, name: str) -> list[dict]:
    """Return the rows of a collection, perhaps with further candidates, and print how many queries
    have none."""
    if run:
        add_run(found, run)
    rows, without = lists_of(found, found.run)
    if without:
        print(f"{name}: {without} of {len(found.qrels)} queries have no relevant passage or no other: left out")
    return rows


def _hold_out(found: Collection, share: float, name: str) -> Collection:
    """Move about a share of the judged queries, drawn by their texts, to another collection, and
    print how many."""
    # By the text's hash the same query is held out of every folder, whatever its id.
    out = {qid for qid in found.qrels if crc32(found.queries[qid].encode()) % 1000 < 1000 * share}
    held_out = replace(found, qrels={qid: grades for qid, grades in found.qrels.items() if qid in out})
    if share:
        how = f"about {share} of them, drawn by their texts"
        print(f"{name}: held out {len(out)} of {len(found.qrels)} queries ({how})")
    found.qrels = {qid: grades for qid, grades in found.qrels.items() if qid not in out}
    return held_out


def _merge(into: Collection, other: Collection, prefix: str) -> None:
    """Add a collection's texts and held-out queries to another one, with a prefix before its ids."""

    def prefixed(table: dict[str, dict]) -> dict[str, dict]:
        return {
            prefix + qid: {prefix + pid: value for pid, value in table[qid].items()}
            for qid in other.qrels
            if qid in table
        }

    into.passages |= {prefix + pid: text for pid, text in other.passages.items()}
    into.queries |= {prefix + qid: text for qid, text in other.queries.items()}
    into.qrels |= prefixed(other.qrels)
    if other.run is not None:
        into.run = (into.run or {}) | prefixed(other.run)
        into.first_stage, into.run_from = other.first_stage, other.run_from
