"""The queries that a ranker was trained on and those that were held out, as digests of their texts.

A training writes them to `queries.json` beside the model, so that an evaluation can count the
queries it has seen.
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
    """Return the first 16 hexadecimal digits of the SHA-256 of a query's text."""
    return sha256(query.encode()).hexdigest()[:16]


def write_queries(folder: Path, trained_on: Iterable[str], held_out: Iterable[str], base: str) -> None:
    """
    Write the digests of a training's queries into its folder.

    Args:
        base: The model that the training begins with. The queries that it was trained on are added.
    """
    found = {"trained_on": set(map(digest, trained_on)), "held_out": set(map(digest, held_out))}
    found["trained_on"] |= read_queries(base).get("trained_on", set())
    write(folder / FILE, json.dumps({name: sorted(digests) for name, digests in found.items()}))


def read_queries(model: str | Path) -> dict[str, set[str]]:
    """Read the digests in a model's folder, or in the folder around a checkpoint; return {} if
    there are none."""
    folder = Path(model)
    places = [folder, folder.resolve().parent] if folder.name.startswith("checkpoint-") else [folder]
    found = next(filter(None, (read(place / FILE) for place in places)), {})
    return {name: set(digests) for name, digests in found.items()}


def count_trained_on(model: str | Path, collection: Collection) -> int | None:
    """Return how many of the judged queries a model was trained on, or None if its folder does not
    say."""
    known = read_queries(model).get("trained_on")
    if known is None:
        return None
    return sum(digest(collection.queries[qid]) in known for qid in collection.qrels)


def say_trained_on(count: int | None) -> str:
    """Return in words what `count_trained_on` found, to follow the number of queries."""
    if count is None:
        return f"trained on or not is unknown (no {FILE})"
    return f"{count} of them trained on"


def only_held_out(collection: Collection, folder: str, name: str) -> Collection:
    """
    Return the collection with only the queries that the training in `folder` held out.

    Queries are compared by their texts.

    Raises:
        ValueError: the folder has no list of such queries, or the collection has none of them.
    """
    known = read_queries(folder)
    if not known:
        raise ValueError(f"{folder} has no {FILE}, which msmarco.py writes; give the folder of a training.")
    if not known["held_out"]:
        raise ValueError(f"The training in {folder} held out no queries: train with --held_out.")
    digests = {qid: digest(collection.queries[qid]) for qid in collection.qrels}
    kept = {qid: grades for qid, grades in collection.qrels.items() if digests[qid] in known["held_out"]}
    if not kept:
        raise ValueError(f"{name} has none of the {len(known['held_out'])} queries that {folder} held out.")
    return replace(collection, qrels=kept)
