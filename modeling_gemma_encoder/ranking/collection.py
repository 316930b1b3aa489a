"""Judged collections: queries, passages, who judged what relevant, and runs, the rankings of a retrieval system.

Read from a TREC-style folder, a BEIR-style one, a file of labelled pairs, or the Hub; ids are strings throughout.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, get_dataset_config_names, get_dataset_split_names, load_dataset

from .._scripts.files import is_local, read_lines
from .._scripts.tables import FORMATS, read_file
from .trec import TrecRun, ranked, read_qrels

BM25_DEPTH = 100  # of all passages, where nobody says how many

# What columns are called, in TREC-style and BEIR-style files and on the Hub.
ID = ("qid", "pid", "query_id", "passage_id", "docid", "doc_id", "_id", "id")
TEXT = ("text", "query", "passage", "contents", "body")
FILES = {"queries": ("queries",), "passages": ("passages", "corpus", "collection"), "qrels": ("qrels",)}


class Texts(Mapping[str, str]):
    """Texts by id, left where they are: on disk, where millions of passages belong."""

    def __init__(self, ids: Iterable, texts):
        self.ids = np.array([str(one) for one in ids])
        self.order = np.argsort(self.ids, kind="stable")
        self.sorted = self.ids[self.order]
        if len(self.sorted) > 1 and (same := self.sorted[1:] == self.sorted[:-1]).any():
            raise ValueError(f"the id {str(self.sorted[1:][same][0])!r} is there twice")
        self.texts = texts

    def __getitem__(self, one: str) -> str:
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
    """Queries and passages by their ids, what was judged of them, and perhaps candidates to rerank.

    Args:
        qrels: Query id -> passage id -> grade, 0 for what was judged and found irrelevant.
        run: Candidates of each query to be reranked, with their first scores. None: what was judged.
        first_stage: What the run is called in a table.
        relevance_level: Least grade that counts as relevant.
        run_from: The run file's name, or `bm25`. None: the run came with the data, or there is none.
    """

    queries: Mapping[str, str]
    passages: Mapping[str, str]
    qrels: dict[str, dict[str, int]]
    run: TrecRun | None = None
    first_stage: str = "first stage"
    relevance_level: int = 1
    run_from: str | None = None

    def candidates(self, depth: int | None = None) -> dict[str, list[str]]:
        """Passages of each judged query that are to be ranked: the best `depth` of the run, or what was judged."""
        if self.run is None:
            return {qid: list(grades) for qid, grades in self.qrels.items()}
        return {qid: ranked(self.run.get(qid, {}))[:depth] for qid in self.qrels}

    def reranked(self, depth: int | None = None) -> dict:
        """Say where the candidates are from, as `run`, and as `depth` how many of each query's best; None: all."""
        if self.run is None:
            return {"run": "judged pool", "depth": None}
        default = BM25_DEPTH if self.run_from == "bm25" else None
        return {"run": self.run_from or "its own", "depth": depth or default}

    def check(self, name: str) -> "Collection":
        """Raises ValueError, naming the collection, where an id is not known, or nothing is judged."""
        if not self.qrels:
            raise ValueError(f"{name}: no query was judged.")
        check_ids("qrels", self.qrels, self.queries, {} if self.run else self.passages, name)
        if self.run is not None:  # then judged passages that are not reranked need no text
            of_run = {qid: passages for qid, passages in self.run.items() if qid in self.qrels}
            if not of_run:
                raise ValueError(f"{name}: the run has none of the {len(self.qrels)} queries that were judged.")
            check_ids("run", of_run, self.queries, self.passages, name)
        return self

    def without_incomparable(self, name: str) -> "Collection":
        """
        Without queries for which no ranking is better than another: without a grade above 0, or, in a judged pool,
        with relevant passages alone, or those of one grade. Says how many, how many have a grade above 0 and no
        relevant passage, and how many the run has no passages for.

        Raises:
            ValueError: no query is left.
        """
        level, kept = self.relevance_level, self.qrels
        reasons = {"no relevant passage": lambda grades: not any(grade > 0 for grade in grades)}
        if self.run is None:
            reasons["only relevant passages judged"] = lambda grades: all(grade >= level for grade in grades)
            reasons["passages of one grade alone judged"] = lambda grades: len(set(grades)) == 1
        for reason, holds in reasons.items():
            others = {qid: grades for qid, grades in kept.items() if not holds(grades.values())}
            if left_out := len(kept) - len(others):
                print(f"{name}: {left_out} of {len(self.qrels)} queries have {reason} and are left out")
            kept = others
        if not kept:
            raise ValueError(f"{name}: no query has both a relevant passage and another one; rerank a run, or `bm25`.")
        if none := sum(max(grades.values()) < level for grades in kept.values()):
            of_level = f"have no passage from grade {level} on, and count 0 in measures that know no grades"
            print(f"{name}: {none} of {len(kept)} queries {of_level}")
        if self.run is not None and (without := [qid for qid in kept if not self.run.get(qid)]):
            print(f"{name}: the run has no passages for {len(without)} of {len(kept)} queries, which count 0")
        return replace(self, qrels=kept)


def check_ids(what: str, table: dict, queries: Mapping, passages: Mapping, name: str) -> None:
    """Raises ValueError where a table of queries and their passages names one that is not there."""
    if unknown := [qid for qid in table if qid not in queries]:
        raise ValueError(f"{name}: the {what} name {some(unknown)}, not among the {len(queries)} queries.")
    known = {pid: pid in passages for of_query in table.values() for pid in of_query} if passages else {}
    if unknown := [pid for pid, found in known.items() if not found]:
        raise ValueError(f"{name}: the {what} name {some(unknown)}, not among the {len(passages)} passages.")


def some(ids: list[str]) -> str:
    return f"{', '.join(map(repr, ids[:3]))}{f' and {len(ids) - 3} more ids' if len(ids) > 3 else ''}"


# Reading


def read_collection(source: str, pairs: tuple[str, str, str] | None = None) -> Collection:
    """
    Args:
        source: A folder with queries, passages and qrels (.jsonl, .tsv; qrels .txt, .tsv); or a file of labelled pairs;
            or a data set on the Hub with configs `queries`, `corpus` and `qrels` (or `default`), and perhaps `bm25`,
            the candidates, as NanoBEIR and MTEB have. After a colon one of several splits, `folder:test` of a BEIR
            folder's `qrels/`, `name:NanoMSMARCO` of the Hub's configs.
        pairs: Columns of query, passage and label in a file of pairs.

    Raises:
        ValueError: names what is missing or contradictory, and where.
    """
    if len(pairs := pairs or PAIRS) != 3:
        raise ValueError(f"Columns of pairs are three, of query, passage and label, got {' '.join(pairs)}.")
    name, split = name_and_split(source)
    path = Path(name)
    if path.is_dir():
        found = Collection(*read_texts(source), read_qrels(_file(path, "qrels", split)))
    elif path.suffix in FORMATS:
        found = _pairs(read_file(path, pairs[:2]), name, pairs)
    elif is_local(name):
        raise ValueError(f"{name} is neither a folder nor a file of {', '.join(FORMATS)}.")
    else:
        found = _hub(name, split)
    return found.check(source)


PAIRS = ("query", "passage", "label")


def name_and_split(source: str) -> tuple[str, str]:
    """Part what a source names from the split after its colon, "" where there is none."""
    if Path(source).exists():
        return source, ""
    name, _, split = source.partition(":")
    return name, split


def read_texts(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Read queries and passages of a folder, or of `folder:test`. Raises ValueError where it has no such split."""
    name, split = name_and_split(source)
    path = Path(name)
    if split:
        _file(path, "qrels", split)
    return _texts(_file(path, "queries")), _texts(_file(path, "passages"))


def _file(path: Path, what: str, split: str = "") -> Path:
    suffixes = (".txt", ".tsv") if what == "qrels" else (*FORMATS, ".txt")
    names = (f"qrels/{split}",) if split else FILES[what]
    places = [path / f"{name}{suffix}" for name in names for suffix in suffixes]
    if what == "qrels" and not split and not any(place.exists() for place in places):
        splits = sorted(place.stem for place in (path / "qrels").glob("*.tsv"))
        if len(splits) > 1:
            raise ValueError(f"{path}/qrels has the splits {', '.join(splits)}: say which, {path}:{splits[0]}.")
        places += [path / "qrels" / f"{one}.tsv" for one in splits]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ValueError(f"{path} has no {what}: none of {', '.join(str(p.relative_to(path)) for p in places)}.")
    return found


def _texts(path: Path) -> dict[str, str]:
    if path.suffix in (".tsv", ".txt"):  # id, tab, text, without a header, as MS MARCO's
        texts = _lines(path)
    else:
        rows = read_file(path, None)  # ids are text
        texts = zip(_ids(rows, path), _read(rows, path), strict=True)
    found = {}
    for one, text in texts:
        if one in found:
            raise ValueError(f"{path}: the id {one!r} is there twice.")
        if not isinstance(text, str):
            raise ValueError(f"{path}: the text of {one!r} is {text!r}.")
        found[one] = text
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for line, where in read_lines(path):
        one, tab, text = line.partition("\t")
        if not tab:
            raise ValueError(f"{where}: {one!r} is not an id, a tab and a text.")
        yield one, text


def _ids(rows: Dataset, where) -> list[str]:
    return [str(one) for one in rows[_column(rows, ID, where)]]


def _read(rows: Dataset, where):
    """Texts, after their titles where there are any."""
    texts = rows[_column(rows, TEXT, where)]
    if "title" not in rows.column_names:
        return texts
    return [f"{title} {text}".strip() if title else text for title, text in zip(rows["title"], texts, strict=True)]


def _column(rows: Dataset, names: tuple[str, ...], where) -> str:
    column = next((name for name in names if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"{where} has the columns {', '.join(rows.column_names)}, none of {', '.join(names)}.")
    return column


def _pairs(rows: Dataset, where: str, columns: tuple[str, str, str]) -> Collection:
    """Labelled pairs: equal texts are one query or one passage, numbered as they come."""
    for column in columns:
        _column(rows, (column,), where)
    queries, passages, qrels = {}, {}, defaultdict(dict)
    for row, (query, passage, label) in enumerate(zip(*(rows[column] for column in columns), strict=True)):
        qid = queries.setdefault(query, f"q{len(queries)}")
        pid = passages.setdefault(passage, f"p{len(passages)}")
        try:  # one that is no number makes a column of a .csv file text
            grade = float(label)
        except (TypeError, ValueError):
            grade = math.nan
        if not isinstance(query, str) or not isinstance(passage, str) or not grade.is_integer():
            raise ValueError(f"{where}, row {row}: {query!r}, {passage!r}, {label!r} are not two texts and a grade.")
        qrels[qid][pid] = max(int(grade), qrels[qid].get(pid, 0))  # the same pair twice: once relevant is relevant
    swapped = ({one: text for text, one in texts.items()} for texts in (queries, passages))
    return Collection(*swapped, dict(qrels))


def _hub(name: str, split: str) -> Collection:
    configs = get_dataset_config_names(name)
    judged = "qrels" if "qrels" in configs else "default"
    if missing := [config for config in ("queries", "corpus", judged) if config not in configs]:
        raise ValueError(f"{name} has the configs {', '.join(configs)}; {', '.join(missing)} is missing.")

    def load(config: str) -> Dataset:
        splits = get_dataset_split_names(name, config)
        wanted = split if split in splits else next((one for one in ("test", config) if one in splits), None)
        if wanted is None and len(splits) > 1:
            raise ValueError(f"{name} ({config}) has the splits {', '.join(splits)}: say which.")
        return load_dataset(name, config, split=wanted or splits[0])

    qrels, run = defaultdict(dict), None
    rows = load(judged)
    for row in rows.to_list():
        passages = row["corpus-id"] if isinstance(row["corpus-id"], list) else [row["corpus-id"]]
        for pid in passages:
            qrels[str(row["query-id"])][str(pid)] = int(row.get("score", 1))
    if "bm25" in configs:
        ranks = {str(row["query-id"]): row["corpus-ids"] for row in load("bm25").to_list()}
        run = {qid: {str(pid): -float(rank) for rank, pid in enumerate(pids)} for qid, pids in ranks.items()}
    queries, corpus = load("queries"), load("corpus")
    passages = Texts(_ids(corpus, name), _read(corpus, name))
    return Collection(dict(zip(_ids(queries, name), _read(queries, name), strict=True)), passages, dict(qrels), run)


# Rankings


def lists_of(collection: Collection, run: TrecRun | None = None) -> tuple[list[dict], int]:
    """
    Of each query all that was judged, and a run's passages, which are irrelevant where nobody judged them.

    Returns:
        Rows for a `RankingDataset`, and how many queries have none: without a relevant passage, or nothing else.
    """
    rows = []
    for qid, judged in collection.qrels.items():
        grades = {pid: max(grade, 0) for pid, grade in judged.items() if pid in collection.passages}
        grades = {**dict.fromkeys((run or {}).get(qid, ()), 0), **grades}
        if any(grades.values()) and len(set(grades.values())) > 1:
            rows.append({"query": qid, "documents": list(grades), "labels": list(grades.values())})
    return rows, len(collection.qrels) - len(rows)
