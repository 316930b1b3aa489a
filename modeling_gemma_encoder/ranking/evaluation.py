"""Evaluation of rankings: baselines, significance of differences, and the report that is left in a
folder.

A report compares the first ranking with each other one and has the runs in TREC's format, tables
and a plot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from ir_measures import Measure
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import bootstrap, permutation_test

from .._scripts.files import write
from .bm25 import bm25
from .collection import Collection
from .measures import gain_of, heading, measure
from .queries import say_trained_on
from .trec import TrecRun, write_run

MIN_QUERIES = 10  # our choice: with fewer, neither a p-value nor an interval says anything


# 1. What a ranking is compared with


def baselines(collection: Collection, depth: int | None = None, seed: int = 0) -> dict[str, TrecRun]:
    """
    Return other rankings of the same candidates, by name.

    These are BM25 of the whole collection, the order of the run that they come from if it is
    another one, and a random order.
    """
    found = {}
    if collection.run is not None:
        run = collection.run
        found[collection.first_stage] = {
            qid: {pid: run[qid][pid] for pid in pids} for qid, pids in collection.candidates(depth).items()
        }
    if "BM25" not in found:
        found = {"BM25": bm25(collection, depth), **found}
    return {**found, "random order": random_order(collection, depth, seed)}


def random_order(collection: Collection, depth: int | None = None, seed: int = 0) -> TrecRun:
    """Return random scores of the candidates, which depend on the seed and the ids, and not on
    their order."""
    trec_run = {}
    for qid, pids in collection.candidates(depth).items():
        draw = np.random.default_rng([seed, crc32(qid.encode())])
        trec_run[qid] = dict(zip(sorted(pids), draw.random(len(pids)).tolist(), strict=True))
    return trec_run


def compare(ours: dict[str, float], theirs: dict[str, float], seed: int = 0) -> dict:
    """
    Compare two rankings by their values of each query.

    Returns:
        The mean `difference`, its 95 % bootstrap `interval`, and the `p` of a paired randomization
        test with 9,999 permutations (Smucker et al., CIKM 2007). With fewer than ten queries,
        `too_few`, and where no query differs, the last two are None.
    """
    differences = np.array([ours[qid] - theirs[qid] for qid in ours])
    result = {"difference": float(differences.mean()), "queries": len(differences), "p": None, "interval": None}
    result["too_few"] = len(differences) < MIN_QUERIES
    if result["too_few"] or not np.ptp(differences):
        return result
    test = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    draw = np.random.default_rng(seed)
    interval = bootstrap((differences,), np.mean, method="percentile", batch=100, rng=draw).confidence_interval
    return {**result, "p": float(test.pvalue), "interval": [float(bound) for bound in interval]}


def describe_pool(collection: Collection, candidates: TrecRun, means: dict[str, float]) -> dict:
    """Count the candidates and the relevant ones among them, and tell whether differences can be
    trusted.

    Args:
        means: The means of the main measure, by the names of the rankings.

    Returns:
        The counts, and a `warning` if the order of the candidates means little, else None: random
        order beats BM25, or most of what was judged is relevant. Most of a run's candidates may be
        relevant.
    """
    level = collection.relevance_level
    grades = [collection.qrels[qid].get(pid, 0) for qid, passages in candidates.items() for pid in passages]
    relevant = sum(grade >= level for grade in grades)
    share, reasons = relevant / max(1, len(grades)), []
    if collection.run is None and share > 0.5:
        reasons.append(f"{share:.1%} of the judged pool is relevant")
    if means.get("random order", 0) > means.get("BM25", np.inf):
        reasons.append("random order beats BM25")
    warning = f"{' and '.join(reasons)}, so that no difference is claimed" if reasons else None
    if warning and collection.run is None:
        warning += "; rerank a run of the whole collection, such as bm25"
    counts = {"candidates": len(grades), "relevant": relevant, "relevant_share": share, "relevance_level": level}
    return {**counts, "warning": warning}


# 2. The report


def evaluate(
    collection: Collection,
    runs: dict[str, TrecRun],
    measures: Sequence[Measure],
    folder: Path,
    facts: dict | None = None,
) -> dict:
    """
    Measure rankings of a collection, compare the first with each other one, and write a report.

    The folder gets each ranking in TREC's format, `results.json`, `results.md`, and
    `per_query.png`, the first ranking against the second. Differences have no p and no interval if
    `describe_pool` warns.

    Args:
        measures: The first one is what rankings are compared by.
        facts: Further entries of `results.json`. `results.md` tells about `queries_trained_on`.

    Returns:
        The content of `results.json` without each query's values, and the `table`.
    """
    values = {name: measure(collection.qrels, run, measures) for name, run in runs.items()}
    means = {name: {m: float(np.mean([*v.values()])) for m, v in found.items()} for name, found in values.items()}
    first, *others = runs
    main = str(measures[0])
    pool = describe_pool(collection, runs[first], {name: found[main] for name, found in means.items()})
    compared = {name: compare(values[first][main], values[name][main]) for name in others}
    if pool["warning"]:
        compared = {name: {**found, "p": None, "interval": None} for name, found in compared.items()}
    named = {f"{main}, {first} - {name}": found for name, found in compared.items()}
    gains = {str(one): gain for one in measures if (gain := gain_of(one))}
    result = {**(facts or {}), "means": means, "compared": named}
    result |= {"queries": len(collection.qrels), "pool": pool, "gains": gains}
    table = "\n".join([markdown(means), "", *conclusions(compared, main, pool, collection.run is None)])
    write_report(runs, values, {**result, "table": table}, folder)
    return {**result, "table": table}


def write_report(runs: dict[str, TrecRun], values: dict[str, dict], result: dict, folder: Path) -> None:
    """Write what `evaluate` found, `result`, with the rankings and their values, name -> measure ->
    query -> value."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, trec_run in runs.items():
        tag = name.replace(" ", "-")
        write_run(trec_run, folder / f"{tag}.run", tag)
    if len(runs) > 1:
        first, second, *_ = runs
        main = next(iter(values[first]))
        pair = QueryValues(main, {name: values[name][main] for name in (first, second)})
        plot_queries(pair, folder / "per_query.png", result["pool"]["warning"])
    facts = {name: value for name, value in result.items() if name != "table"}
    write(folder / "results.md", f"{result['table']}\n{trained_on_line(result)}".rstrip())
    write(folder / "results.json", json.dumps({**facts, "per_query": values}, indent=2))


def trained_on_line(result: dict) -> str:
    """Return a line on how many queries were trained on, or "" if the result does not have their
    number."""
    if "queries_trained_on" not in result:
        return ""
    return f"\n{result['queries']} queries, {say_trained_on(result['queries_trained_on'])}"


def markdown(means: dict[str, dict[str, float]]) -> str:
    """Return a table in Markdown, a row for each ranking and a column for each measure."""
    measures = list(next(iter(means.values())))
    lines = [f"| x 100 | {' | '.join(map(heading, measures))} |", f"| --- |{' ---: |' * len(measures)}"]
    for name, found in means.items():
        cells = [f"{100 * found[measure]:.1f}" for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conclusions(compared: dict[str, dict], main: str, pool: dict, judged: bool) -> list[str]:
    """Return lines on what was ranked, and on how much better the first ranking is or why that is
    not claimed."""
    of_what = "judged pool" if judged else "a run's candidates"
    level = f", from grade {pool['relevance_level']} on" if pool["relevance_level"] != 1 else ""
    share = f"{pool['relevant']:,} of them relevant ({pool['relevant_share']:.1%}{level})"
    lines = [f"Ranked: {of_what}, {pool['candidates']:,} passages, {share}"]
    if pool["warning"]:
        return [*lines, f"\nWARNING: {pool['warning']}."]
    for name, found in compared.items():
        line = f"\n{main} against {name}: {100 * found['difference']:+.1f} over {found['queries']} queries"
        if found["p"] is not None:
            low, high = found["interval"]
            line += f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {found['p']:.4f}"
        elif found["too_few"]:
            line += ", too few for more"
        lines.append(line)
    return lines


@dataclass(frozen=True)
class QueryValues:
    """Hold a measure's values of each query for two rankings, by their names."""

    measure: str
    rankings: dict[str, dict[str, float]]


def plot_queries(values: QueryValues, path: Path, warning: str | None = None) -> None:
    """Plot the difference of each query as a bar, sorted, below the warning if there is one."""
    (ours, our_values), (theirs, their_values) = values.rankings.items()
    differences = np.sort([our_values[qid] - their_values[qid] for qid in our_values])[::-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not differences.any():
        axes.text(0.5, 0.6, "no query differs", transform=axes.transAxes, ha="center")
    axes.bar(range(len(differences)), differences, width=1, color=np.where(differences > 0, "C0", "C3"))
    axes.axhline(differences.mean(), color="black", linestyle="--", label=f"mean {differences.mean():+.3f}")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    title = f"{ours} better on {better} of {len(differences)} queries, {theirs} on {worse}"
    axes.set(xlabel="query, sorted", ylabel=f"{heading(values.measure)}, {ours} - {theirs}")
    axes.set_title(warning.replace("; ", "\n") if warning else title)
    axes.legend()
    figure.savefig(path, dpi=120)
