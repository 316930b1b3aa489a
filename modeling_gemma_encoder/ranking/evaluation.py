"""How good a ranking is: scores -> nDCG and its like, beside BM25 and random order, and whether a difference is one."""

import json
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import ir_measures
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import bootstrap, permutation_test

from .._scripts.files import write
from ..losses_gemma_encoder import IGNORE
from .bm25 import bm25
from .collection import Collection
from .queries import say_trained_on
from .trec import TrecRun, ranked, write_run

MEASURES = ("nDCG@10", "RR@10", "AP", "R@100")  # what `ir_measures` calls them


def parse_measures(names: Sequence[str], relevance_level: int = 1) -> list:
    """
    `ir_measures` by name, those of relevance yes or no from `relevance_level` on, unless the name says `(rel=...)`.

    Raises:
        ValueError: it knows no such measure.
    """
    found = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{name!r} is no measure of ir_measures, such as {', '.join(MEASURES)}: {error}"
            ) from error
        if relevance_level != 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
            measure = measure(rel=relevance_level)
        found.append(measure)
    return found


def measure(qrels: dict[str, dict[str, int]], run: TrecRun, measures: Sequence) -> dict[str, dict[str, float]]:
    """
    Measure -> query -> value, of all queries of `qrels`; one the run does not have is worth 0, as `trec_eval -c` says.

    The libraries behind `ir_measures` break ties each in its own way; here they see ranks, in the order of `ranked`.
    An nDCG of exponential gain is given its gains: `ir_measures` would leave it to a program that takes no ids of text.
    """
    places = {
        qid: {pid: -float(rank) for rank, pid in enumerate(ranked(scores))} for qid, scores in run.items() if scores
    }
    found = {str(one): dict.fromkeys(qrels, 0.0) for one in measures}
    for one in measures:  # alone: in one call with gains, other nDCGs would be given them too
        for value in ir_measures.iter_calc([_with_gains(one, qrels)], qrels, places):
            found[str(one)][value.query_id] = value.value
    return found


def _with_gains(measure, qrels: dict[str, dict[str, int]]):
    if gain_of(measure) != "exponential":
        return measure
    grades = {grade for of_query in qrels.values() for grade in of_query.values() if grade > 0}
    return measure(dcg="log2", gains={grade: 2**grade - 1 for grade in sorted(grades)})


def gain_of(measure) -> str | None:
    """
    Say what a passage of grade g is worth to an nDCG before the discount by its rank: "linear", g, as trec_eval has it
    and so `nDCG@10`; "exponential", 2^g - 1, of `nDCG(dcg='exp-log2')@10`; "own", where the name gives gains. None of
    other measures.
    """
    if measure.NAME != "nDCG":
        return None
    if "gains" in measure.params:
        return "own"
    return "exponential" if measure.params.get("dcg") == "exp-log2" else "linear"


def heading(name: str) -> str:
    """A measure's name as the head of a column, an nDCG's with its gain."""
    gain = gain_of(ir_measures.parse_measure(name))
    return f"{name} ({gain} gain)" if gain else name


def measure_lists(scores: np.ndarray, labels: np.ndarray, measures: Sequence) -> dict[str, float]:
    """Means over lists: scores and labels (num_lists, num_docs), -100 where there is no document."""
    there = [np.flatnonzero(row != IGNORE) for row in labels]
    qrels = {str(n): {str(i): int(labels[n, i]) for i in places} for n, places in enumerate(there)}
    run = {str(n): {str(i): float(scores[n, i]) for i in places} for n, places in enumerate(there)}
    return {name: float(np.mean([*found.values()])) for name, found in measure(qrels, run, measures).items()}


def baselines(collection: Collection, depth: int | None = None, seed: int = 0) -> dict[str, TrecRun]:
    """What the same candidates are worth by BM25 of the whole collection, in random order, and, if they are another
    run's, as they came."""
    rows = {}
    if collection.run is not None:
        chosen = collection.candidates(depth)
        run = {qid: collection.run.get(qid, {}) for qid in chosen}
        rows[collection.first_stage] = {qid: {pid: run[qid][pid] for pid in pids} for qid, pids in chosen.items()}
    if "BM25" not in rows:
        rows = {"BM25": bm25(collection, depth), **rows}
    return {**rows, "random order": random_order(collection, depth, seed)}


def random_order(collection: Collection, depth: int | None = None, seed: int = 0) -> TrecRun:
    """A draw for each query by its id, of passages in the order of theirs: the same wherever they were read."""
    run = {}
    for qid, pids in collection.candidates(depth).items():
        draw = np.random.default_rng([seed, crc32(qid.encode())])
        run[qid] = dict(zip(sorted(pids), draw.random(len(pids)).tolist(), strict=True))
    return run


def compare(ours: dict[str, float], theirs: dict[str, float], seed: int = 0) -> dict[str, float]:
    """
    The mean difference over queries, its 95 % bootstrap interval, and the p of a paired randomization test, 9,999
    drawn (Smucker et al., CIKM 2007); None below ten queries, our choice, where neither says anything: `too_few`.
    """
    differences = np.array([ours[qid] - theirs[qid] for qid in ours])
    result = {"difference": float(differences.mean()), "queries": len(differences), "p": None, "interval": None}
    result["too_few"] = len(differences) < 10
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
    interval = bootstrap((differences,), np.mean, method="percentile", batch=100, rng=np.random.default_rng(seed))
    bounds = [float(bound) for bound in interval.confidence_interval]
    return {**result, "p": float(test.pvalue), "interval": bounds}


def describe_pool(collection: Collection, candidates: TrecRun, means: dict[str, float]) -> dict:
    """
    Count the candidates and the relevant ones, by the collection's level, and say as `warning`, else None, why their
    order tells little: random order beats BM25, or most of what was judged is relevant. Of a run's most may be.

    Args:
        means: Of one measure, by the names of the runs.
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


def evaluate(
    collection: Collection, runs: dict[str, TrecRun], measures: Sequence, folder: Path, facts: dict | None = None
) -> dict:
    """
    Measures runs of a collection, the first against each other one, and leaves in `folder` `<name>.run` of each,
    `results.json` with every query's values, `results.md` and `per_query.png`, the first against the second. Where
    `describe_pool` warns, differences have neither p nor interval.

    Args:
        facts: Go into `results.json` as they are; of `queries_trained_on` the table on disk says what it means.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: measure(collection.qrels, run, measures) for name, run in runs.items()}
    means = {name: {m: float(np.mean([*v.values()])) for m, v in found.items()} for name, found in values.items()}
    first, *others = runs
    main = str(measures[0])
    pool = describe_pool(collection, runs[first], {name: found[main] for name, found in means.items()})
    compared = {name: compare(values[first][main], values[name][main]) for name in others}
    if pool["warning"]:
        compared = {name: {**found, "p": None, "interval": None} for name, found in compared.items()}
    for name, run in runs.items():
        write_run(run, folder / f"{name.replace(' ', '-')}.run", tag=name.replace(" ", "-"))
    result = {**(facts or {}), "means": means, "compared": {f"{main}, {first} - {n}": c for n, c in compared.items()}}
    result |= {"queries": len(collection.qrels), "pool": pool}
    result["gains"] = {str(one): gain for one in measures if (gain := gain_of(one))}
    table = "\n".join([markdown(means), "", *conclusions(compared, main, pool, collection.run is None)])
    if others:
        names, path = (first, others[0]), folder / "per_query.png"
        plot_queries(values[first][main], values[others[0]][main], names, main, path, pool["warning"])
    write(folder / "results.md", f"{table}\n{trained_on_line(result)}".rstrip())
    write(folder / "results.json", json.dumps({**result, "per_query": values}, indent=2))
    return {**result, "table": table}


def trained_on_line(result: dict) -> str:
    """Say how many of the queries were trained on; "" where nobody asked."""
    if "queries_trained_on" not in result:
        return ""
    return f"\n{result['queries']} queries, {say_trained_on(result['queries_trained_on'])}"


def markdown(means: dict[str, dict[str, float]]) -> str:
    measures = list(next(iter(means.values())))
    lines = [f"| x 100 | {' | '.join(map(heading, measures))} |", "| --- |" + " ---: |" * len(measures)]
    lines += [f"| {name} | {' | '.join(f'{100 * found[m]:.1f}' for m in measures)} |" for name, found in means.items()]
    return "\n".join(lines)


def conclusions(compared: dict[str, dict], main: str, pool: dict, judged: bool) -> list[str]:
    """Lines on what was ranked and by how much the first run is better, or why that is not said."""
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


def plot_queries(
    ours: dict[str, float],
    theirs: dict[str, float],
    names: tuple[str, str],
    main: str,
    path: Path,
    warning: str | None = None,
):
    """Each query's difference as a bar, sorted; under the warning, where there is one."""
    differences = np.sort([ours[qid] - theirs[qid] for qid in ours])[::-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not differences.any():
        axes.text(0.5, 0.6, "no query differs", transform=axes.transAxes, ha="center")
    axes.bar(range(len(differences)), differences, width=1, color=np.where(differences > 0, "C0", "C3"))
    axes.axhline(differences.mean(), color="black", linestyle="--", label=f"mean {differences.mean():+.3f}")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    title = f"{names[0]} better on {better} of {len(differences)} queries, {names[1]} on {worse}"
    ylabel = f"{heading(main)}, {names[0]} - {names[1]}"
    axes.set(xlabel="query, sorted", ylabel=ylabel)
    axes.set_title(warning.replace("; ", "\n") if warning else title)
    axes.legend()
    figure.savefig(path, dpi=120)
