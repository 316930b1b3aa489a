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

from .files import write
from .losses_gemma_encoder import IGNORE
from .retrieval import Collection, Run, bm25, ranked, write_run

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


def measure(qrels: dict[str, dict[str, int]], run: Run, measures: Sequence) -> dict[str, dict[str, float]]:
    """
    Measure -> query -> value, of all queries of `qrels`; one the run does not have is worth 0, as `trec_eval -c` says.

    The libraries behind `ir_measures` break ties each in its own way; here they see ranks, in the order of `ranked`.
    """
    places = {
        qid: {pid: -float(rank) for rank, pid in enumerate(ranked(scores))} for qid, scores in run.items() if scores
    }
    found = {str(one): dict.fromkeys(qrels, 0.0) for one in measures}
    for value in ir_measures.iter_calc(list(measures), qrels, places):
        found[str(value.measure)][value.query_id] = value.value
    return found


def measure_lists(scores: np.ndarray, labels: np.ndarray, measures: Sequence) -> dict[str, float]:
    """Means over lists: scores and labels (num_lists, num_docs), -100 where there is no document."""
    there = [np.flatnonzero(row != IGNORE) for row in labels]
    qrels = {str(n): {str(i): int(labels[n, i]) for i in places} for n, places in enumerate(there)}
    run = {str(n): {str(i): float(scores[n, i]) for i in places} for n, places in enumerate(there)}
    return {name: float(np.mean([*found.values()])) for name, found in measure(qrels, run, measures).items()}


def baselines(collection: Collection, depth: int | None = None, seed: int = 0) -> dict[str, Run]:
    """What the same candidates are worth by BM25, in random order, and, if they are a run's, as they came."""
    first = {}
    if collection.run is not None:
        chosen = collection.candidates(depth)
        first["first stage"] = {qid: {pid: collection.run[qid][pid] for pid in pids} for qid, pids in chosen.items()}
    return {"BM25": bm25(collection, depth), **first, "random order": random_order(collection, depth, seed)}


def random_order(collection: Collection, depth: int | None = None, seed: int = 0) -> Run:
    """A draw for each query by its id, of passages in the order of theirs: the same wherever they were read."""
    run = {}
    for qid, pids in collection.candidates(depth).items():
        draw = np.random.default_rng([seed, crc32(qid.encode())])
        run[qid] = dict(zip(sorted(pids), draw.random(len(pids)).tolist(), strict=True))
    return run


def compare(ours: dict[str, float], theirs: dict[str, float], seed: int = 0) -> dict[str, float]:
    """
    The mean difference over queries, its 95 % bootstrap interval, and the p of a paired randomization test, 9,999
    drawn (Smucker et al., CIKM 2007); None below ten queries, our choice, where neither says anything.
    """
    differences = np.array([ours[qid] - theirs[qid] for qid in ours])
    result = {"difference": float(differences.mean()), "queries": len(differences), "p": None, "interval": None}
    if len(differences) < 10 or not np.ptp(differences):
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


def evaluate(
    collection: Collection, runs: dict[str, Run], measures: Sequence, folder: Path, facts: dict | None = None
) -> dict:
    """
    Measures runs of a collection, the first against each other one, and leaves in `folder` `<name>.run` of each,
    `results.json` with every query's values, `results.md` and `per_query.png`, the first against the second.

    Args:
        facts: Go into `results.json` as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: measure(collection.qrels, run, measures) for name, run in runs.items()}
    means = {name: {m: float(np.mean([*v.values()])) for m, v in found.items()} for name, found in values.items()}
    first, *others = runs
    main = str(measures[0])
    compared = {name: compare(values[first][main], values[name][main]) for name in others}
    for name, run in runs.items():
        write_run(run, folder / f"{name.replace(' ', '-')}.run", tag=name.replace(" ", "-"))
    result = {**(facts or {}), "means": means, "compared": {f"{main}, {first} - {n}": c for n, c in compared.items()}}
    result["queries"] = len(collection.qrels)
    table = markdown(means, compared, main)
    if others:
        plot_queries(values[first][main], values[others[0]][main], (first, others[0]), main, folder / "per_query.png")
    write(folder / "results.md", table)
    write(folder / "results.json", json.dumps({**result, "per_query": values}, indent=2))
    return {**result, "table": table}


def markdown(means: dict[str, dict[str, float]], compared: dict[str, dict], main: str) -> str:
    measures = list(next(iter(means.values())))
    lines = [f"| x 100 | {' | '.join(measures)} |", "| --- |" + " ---: |" * len(measures)]
    lines += [f"| {name} | {' | '.join(f'{100 * found[m]:.1f}' for m in measures)} |" for name, found in means.items()]
    for name, found in compared.items():
        line = f"\n{main} against {name}: {100 * found['difference']:+.1f} over {found['queries']} queries"
        if found["p"] is not None:
            low, high = found["interval"]
            line += f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {found['p']:.4f}"
        elif found["queries"] < 10:
            line += ", too few for more"
        lines.append(line)
    return "\n".join(lines)


def plot_queries(ours: dict[str, float], theirs: dict[str, float], names: tuple[str, str], main: str, path: Path):
    """Each query's difference as a bar, sorted."""
    differences = np.sort([ours[qid] - theirs[qid] for qid in ours])[::-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not differences.any():
        axes.text(0.5, 0.6, "no query differs", transform=axes.transAxes, ha="center")
    axes.bar(range(len(differences)), differences, width=1, color=np.where(differences > 0, "C0", "C3"))
    axes.axhline(differences.mean(), color="black", linestyle="--", label=f"mean {differences.mean():+.3f}")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    axes.set(
        xlabel="query, sorted",
        ylabel=f"{main}, {names[0]} - {names[1]}",
        title=f"{names[0]} better on {better} of {len(differences)} queries, {names[1]} on {worse}",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
