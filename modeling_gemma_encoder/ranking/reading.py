"""Readers of judged collections: TREC-style and BEIR-style folders, files of labeled pairs, and the
Hub.

A folder has queries and passages (.jsonl, .json, .csv, .tsv, .parquet) and qrels (.txt, .tsv). A
data set on the Hub has the configs `queries`, `corpus` and `qrels`, as NanoBEIR and MTEB do.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, get_dataset_config_names, get_dataset_split_names, load_dataset

from .._scripts.files import is_local, read_lines
from .._scripts.tables import FORMATS, read_file
from .collection import Collection, Texts
from .trec import Qrels, TrecRun, read_qrels

PAIRS = ("query", "passage", "label")  # default columns of a file of labeled pairs

# Names of files and columns in TREC-style and BEIR-style folders and on the Hub.
FILES = {"queries": ("queries",), "passages": ("passages", "corpus", "collection"), "qrels": ("qrels",)}
ID = ("qid", "pid", "query_id", "passage_id", "docid", "doc_id", "_id", "id")
TEXT = ("text", "query", "passage", "contents", "body")


def read_collection(source: str, pairs: tuple[str, str, str] | None = None) -> Collection:
    """
    Read a judged collection from a folder, a file of labeled pairs, or the Hub.

    Args:
        source: A folder with queries, passages and qrels, a file of labeled pairs, or a data set on
            the Hub with configs `queries`, `corpus` and `qrels` (or `default`). A config `bm25` on
            the Hub has the candidates. One of several splits follows a colon: `folder:test` in the
            folder `qrels/` of a BEIR-style folder, `name:NanoMSMARCO` on the Hub.
        pairs: The columns of query, passage and label in a file of pairs.

    Raises:
        ValueError: something is missing or contradictory; the message names it and the place.
    """
    pairs = pairs or PAIRS
    if len(pairs) != 3:
        raise ValueError(f"The columns of pairs must be three, of query, passage and label; got {' '.join(pairs)}.")
    name, split = name_and_split(source)
    path = Path(name)
    if path.is_dir():
        found = Collection(*read_texts(source), read_qrels(find_file(path, "qrels", split)))
    elif path.suffix in FORMATS:
        found = group_pairs(read_file(path, pairs[:2]), name, pairs)
    elif is_local(name):
        raise ValueError(f"{name} is neither a folder nor a file of {', '.join(FORMATS)}.")
    else:
        found = read_hub(name, split)
    return found.check(source)


def name_and_split(source: str) -> tuple[str, str]:
    """Return the name of a source and the split after its colon, which is "" where there is none."""
    if Path(source).exists():
        return source, ""
    name, _, split = source.partition(":")
    return name, split


# Folders


def read_texts(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Read the queries and passages of `folder` or `folder:test`; raise ValueError if it lacks them
    or the split."""
    name, split = name_and_split(source)
    path = Path(name)
    if split:
        find_file(path, "qrels", split)
    return texts_by_id(find_file(path, "queries")), texts_by_id(find_file(path, "passages"))


def find_file(folder: Path, what: str, split: str = "") -> Path:
    """
    Return the path of a folder's queries, passages or qrels, the latter perhaps of one split.

    Raises:
        ValueError: there is no such file, or there are several splits and `split` is empty.
    """
    suffixes = (".txt", ".tsv") if what == "qrels" else (*FORMATS, ".txt")
    names = (f"qrels/{split}",) if split else FILES[what]
    places = [folder / f"{name}{suffix}" for name in names for suffix in suffixes]
    if what == "qrels" and not split and not any(place.exists() for place in places):
        splits = sorted(place.stem for place in (folder / "qrels").glob("*.tsv"))
        if len(splits) > 1:
            raise ValueError(f"{folder}/qrels has the splits {', '.join(splits)}: say which, as {folder}:{splits[0]}.")
        places += [folder / "qrels" / f"{one}.tsv" for one in splits]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        tried = ", ".join(str(place.relative_to(folder)) for place in places)
        raise ValueError(f"{folder} has no {what}: none of {tried}.")
    return found


def texts_by_id(path: Path) -> dict[str, str]:
    """Read a file of ids and texts; raise ValueError if an id is there twice or has no text."""
    if path.suffix in (".tsv", ".txt"):
        rows = id_and_text(path)
    else:
        table = read_file(path, None)  # all columns as text, or the id 007 would become 7
        rows = zip(ids_of(table, path), texts_of(table, path), strict=True)
    found = {}
    for one, text in rows:
        if one in found:
            raise ValueError(f"{path}: the id {one!r} is there twice; ids must be unique.")
        if not isinstance(text, str):
            raise ValueError(f"{path}: {one!r} must have a text; got {text!r}.")
        found[one] = text
    return found


def id_and_text(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ids and texts of a file without a header, separated by a tab, as MS MARCO has them."""
    for line, where in read_lines(path):
        one, tab, text = line.partition("\t")
        if not tab:
            raise ValueError(f"{where}: {one!r} is not an id, a tab and a text.")
        yield one, text


def ids_of(rows: Dataset, where: Path | str) -> list[str]:
    """Return the column of ids as strings."""
    return [str(one) for one in rows[find_column(rows, ID, where)]]


def texts_of(rows: Dataset, where: Path | str) -> Sequence[str]:
    """Return the column of texts, each after its title if there is one."""
    texts = rows[find_column(rows, TEXT, where)]
    if "title" not in rows.column_names:
        return texts
    return [f"{title} {text}".strip() if title else text for title, text in zip(rows["title"], texts, strict=True)]


def find_column(rows: Dataset, names: tuple[str, ...], where: Path | str) -> str:
    """Return the first of the names that is a column; raise ValueError if none is."""
    column = next((name for name in names if name in rows.column_names), None)
    if column is None:
        there, wanted = ", ".join(rows.column_names), ", ".join(names)
        raise ValueError(f"{where} has the columns {there}. It needs one of these: {wanted}.")
    return column


# Labeled pairs


def group_pairs(rows: Dataset, where: str, columns: tuple[str, str, str]) -> Collection:
    """Make a collection of labeled pairs: equal texts become one query or one passage, numbered in
    order.

    Raises:
        ValueError: a column is missing, or a row does not have two texts and a whole number.
    """
    for column in columns:
        find_column(rows, (column,), where)
    queries, passages, qrels = {}, {}, defaultdict(dict)
    for row, (query, passage, label) in enumerate(zip(*(rows[column] for column in columns), strict=True)):
        grade = as_grade(label)
        if not isinstance(query, str) or not isinstance(passage, str) or grade is None:
            raise ValueError(
                f"{where}, row {row}: a row must have two texts and a grade; got {query!r}, {passage!r}, {label!r}."
            )
        qid = queries.setdefault(query, f"q{len(queries)}")
        pid = passages.setdefault(passage, f"p{len(passages)}")
        qrels[qid][pid] = max(grade, qrels[qid].get(pid, 0))  # a pair that is there twice keeps its better grade
    swapped = ({one: text for text, one in texts.items()} for texts in (queries, passages))
    return Collection(*swapped, dict(qrels))


def as_grade(label) -> int | None:
    """Return a label as a whole number, or None if it is not one."""
    try:  # one label that is not a number makes a whole column of a .csv file text
        grade = float(label)
    except (TypeError, ValueError):
        return None
    return int(grade) if grade.is_integer() else None  # false for NaN and infinity


# The Hub


def read_hub(name: str, split: str) -> Collection:
    """Read a collection from the Hub; raise ValueError if a config is missing or the split is not
    clear."""
    configs = get_dataset_config_names(name)
    judged = "qrels" if "qrels" in configs else "default"
    if missing := [config for config in ("queries", "corpus", judged) if config not in configs]:
        raise ValueError(f"{name} has the configs {', '.join(configs)}; {', '.join(missing)} is missing.")
    qrels = qrels_of(load_config(name, judged, split))
    trec_run = run_of(load_config(name, "bm25", split)) if "bm25" in configs else None
    queries, corpus = load_config(name, "queries", split), load_config(name, "corpus", split)
    texts = dict(zip(ids_of(queries, name), texts_of(queries, name), strict=True))
    return Collection(texts, Texts(ids_of(corpus, name), texts_of(corpus, name)), qrels, trec_run)


def load_config(name: str, config: str, split: str) -> Dataset:
    """Load a config's rows: of `split`, else of `test`, else of the split that is named like the
    config."""
    splits = get_dataset_split_names(name, config)
    wanted = next((one for one in (split, "test", config) if one in splits), None)
    if wanted is None and len(splits) > 1:
        raise ValueError(f"{name} ({config}) has the splits {', '.join(splits)}: say which, as {name}:{splits[0]}.")
    return load_dataset(name, config, split=wanted or splits[0])


def qrels_of(rows: Dataset) -> Qrels:
    """Return judgments; a row has one passage or a list of them, and is relevant if it has no
    score."""
    qrels = defaultdict(dict)
    for row in rows.to_list():
        passages = row["corpus-id"] if isinstance(row["corpus-id"], list) else [row["corpus-id"]]
        for pid in passages:
            qrels[str(row["query-id"])][str(pid)] = int(row.get("score", 1))
    return dict(qrels)


def run_of(rows: Dataset) -> TrecRun:
    """Return a ranking with negative ranks as scores, as the Hub's candidates have an order and no
    scores."""
    ranks = {str(row["query-id"]): row["corpus-ids"] for row in rows.to_list()}
    return {qid: {str(pid): -float(rank) for rank, pid in enumerate(pids)} for qid, pids in ranks.items()}
