"""Which queries a ranker was trained on and which were held out: digests of their texts in its folder.

A training writes them to `queries.json` beside the model.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from .._scripts.files import read, write
from .collection import Collection

FILE = "queries.json"


def digest(query: str) -> str:
    return sha256(query.encode()).hexdigest()[:16]


def write_queries(folder: Path, trained_on: Iterable[str], held_out: Iterable[str], base: str) -> None:
    """Write down the queries of a training, and those that `base`, the model that it begins with, was trained on."""
    found = {"trained_on": set(map(digest, trained_on)), "held_out": set(map(digest, held_out))}
    found["trained_on"] |= read_queries(base).get("trained_on", set())
    write(folder / FILE, json.dumps({name: sorted(digests) for name, digests in found.items()}))


def read_queries(model: str | Path) -> dict[str, set[str]]:
    """Read the digests of the queries that a model's folder, or of a checkpoint the one around it, has; {} if none."""
    folder = Path(model)
    places = [folder, folder.resolve().parent] if folder.name.startswith("checkpoint-") else [folder]
    found = next(filter(None, (read(place / FILE) for place in places)), {})
    return {name: set(digests) for name, digests in found.items()}


def count_trained_on(model: str | Path, collection: Collection) -> int | None:
    """Count the judged queries that a model was trained on; None where its folder does not say."""
    known = read_queries(model).get("trained_on")
    return None if known is None else sum(digest(collection.queries[qid]) in known for qid in collection.qrels)


def say_trained_on(count: int | None) -> str:
    """Put what `count_trained_on` found into words, after the number of queries."""
    return f"{count} of them trained on" if count is not None else f"trained on or not is unknown (no {FILE})"


def only_held_out(collection: Collection, folder: str, name: str) -> Collection:
    """
    Keep the judged queries that the training in `folder` held out, by their texts.

    Raises:
        ValueError: the folder does not say which, or none of them is here.
    """
    known = read_queries(folder)
    if not known:
        raise ValueError(f"{folder} has no {FILE}, which msmarco.py writes: give the folder of a training.")
    if not known["held_out"]:
        raise ValueError(f"The training in {folder} held out no queries: train with --held_out.")
    kept = {
        qid: grades for qid, grades in collection.qrels.items() if digest(collection.queries[qid]) in known["held_out"]
    }
    if not kept:
        raise ValueError(f"{name} has none of the {len(known['held_out'])} queries that {folder} held out.")
    return replace(collection, qrels=kept)
