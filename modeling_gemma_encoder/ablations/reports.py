"""What ablations found, to look at: a table of scores, one of differences, notes, and a plot.

A place is empty where a variant was not run on a task, and so is an average over tasks that
includes it. `of_study` is task -> variant -> what `run_studies`, `add_differences` and
`add_answers` found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..finetuning.reports import at_least
from .statistics import averages, mean_and_error
from .studies import Study

# What needs no reading, and how it is called.
SIMPLE = {"majority": "majority, or random order", "BM25": "BM25"}
EQUAL = "equal answers"


def report_study(name: str, study: Study, of_study: dict, seeds: Sequence[int]) -> str:
    """Return the tables of a study and the notes under them, in Markdown."""
    shown = name.replace("_", " ")
    what = f"mean ± standard error of {name_seeds(seeds)}" if len(seeds) > 1 else name_seeds(seeds)
    parts = [score_table(f"{shown} (x 100, {what})", study, of_study)]
    differences = difference_table(shown, study, of_study)
    if differences.count("\n") > 1:  # more than the two lines of its heading
        parts.append(differences)
    if in_words := notes(study, of_study):
        parts.append(in_words)
    return "\n\n".join(parts)


def name_seeds(seeds: Sequence[int]) -> str:
    """Return "seed 1", or "seeds 1, 2, 3"."""
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def score_table(title: str, study: Study, of_study: dict) -> str:
    """Return scores x 100 with standard errors as a table, a row a variant, beside the paper's
    averages."""
    several = len(of_study) > 1
    columns = [title]
    columns += [f"{task} ({_metric(variants)})" for task, variants in of_study.items()]
    if several:
        columns.append("average")
    if study.paper:
        columns.append("the paper's GLUE average, Gemma 2 2B")
    rows = _rows_of_simple(study, of_study)
    for name in _variants_of(study, of_study):
        pairs = [
            mean_and_error(variants[name]["scores"]) if name in variants else None for variants in of_study.values()
        ]
        if several:
            pairs.append(None if None in pairs else averages(of_study, name))
        row = [name, *map(_mean_in_words, pairs)]
        if study.paper:
            row.append(f"{study.paper[name]:.1f}" if name in study.paper else "")
        rows.append(row)
    return _table(columns, rows)


def _rows_of_simple(study: Study, of_study: dict) -> list[list[str]]:
    """Return rows of what needs no reading, where a task has it."""
    rows = []
    simple = [next(iter(variants.values()))["simple"] for variants in of_study.values()]
    for key, name in SIMPLE.items():
        values = [of_task.get(key) for of_task in simple]
        if all(value is None for value in values):
            continue
        if len(of_study) > 1:
            values.append(None if None in values else float(np.mean(values)))
        row = [name, *("" if value is None else f"{100 * value:.1f}" for value in values)]
        rows.append([*row, ""] if study.paper else row)
    return rows


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _mean_in_words(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return ""
    mean, error = (100 * value for value in pair)
    return f"{mean:.1f}" if np.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _variants_of(study: Study, of_study: dict) -> list[str]:
    """Return the variants that were run on some task, in the order of the study."""
    return [name for name in study.variants if any(name in variants for variants in of_study.values())]


def _metric(variants: dict) -> str:
    return next(iter(variants.values()))["metric"]


def notes(study: Study, of_study: dict) -> str:
    """Return what numbers hide, a line each: variants with the same answers, and answers that are
    always the same."""
    lines = []
    for task, variants in of_study.items():
        named = set()
        for first in variants:
            others = [name for name, row in variants.items() if first in row.get("equal_to", [])]
            if others and first not in named:
                named |= {first, *others}
                names = ", ".join([first, *others])
                lines.append(f"- {task}: {names} give equal answers to every row.")
        for name, row in variants.items():
            always = row.get("always", [])
            for said in dict.fromkeys(filter(None, always)):
                seeds = ""
                if len(always) > 1:
                    seeds = f" ({always.count(said)} of {len(always)} seeds)"
                lines.append(f"- {task}: {name} says {said}{seeds}, so its score is that of a constant.")
    return "\n".join(lines)


def difference_table(name: str, study: Study, of_study: dict) -> str:
    """Return differences x 100 as a table, a row a variant and what it is compared with.

    The table has no rows where nothing is compared.
    """
    several = len(of_study) > 1
    seeds = max(len(row["scores"]) for variants in of_study.values() for row in variants.values())
    source = "seeds and rows" if seeds > 1 else "the rows alone"
    columns = [f"{name}, difference (x 100, ± standard error of {source})", *of_study]
    if several:
        columns.append("average")
    rows = []
    for variant in _variants_of(study, of_study):
        if variant == (reference := study.compared_with(variant)):
            continue
        pairs = [variants[variant]["difference"] if variant in variants else None for variants in of_study.values()]
        equal = [_are_equal(variants, variant, reference) for variants in of_study.values()]
        if several:
            pairs.append(_mean_difference(pairs))
            equal.append(all(equal))
        rows.append([f"{variant} - {reference}", *map(_difference_in_words, pairs, equal)])
    return _table(columns, rows)


def _are_equal(variants: dict, first: str, second: str) -> bool:
    equal_to = [variants.get(name, {}).get("equal_to", []) for name in (first, second)]
    return second in equal_to[0] or first in equal_to[1]


def _mean_difference(pairs: list) -> tuple[float, float] | None:
    """Return the mean over tasks and its standard error, where all tasks have a difference."""
    if None in pairs:
        return None
    means, errors = np.array(pairs).T
    return means.mean(), np.sqrt(np.sum(errors**2)) / len(pairs)


def _difference_in_words(pair: Sequence[float] | None, equal: bool) -> str:
    if equal:
        return EQUAL
    return "" if pair is None else f"{100 * pair[0]:+.1f} ± {100 * pair[1]:.1f}"


def plot(title: str, study: Study, of_study: dict, path: Path) -> None:
    """Save a plot with a panel for each task and one for the averages.

    Every seed is a dot, means have their standard errors, and what needs no reading is a line.
    """
    names = _variants_of(study, of_study)
    panels = [_panel_of_task(task, variants, names) for task, variants in of_study.items()]
    if len(panels) > 1 and all(name in variants for variants in of_study.values() for name in names):
        pairs = [averages(of_study, name) for name in names]
        panels.append(_Panel("average", "score", [], pairs, {}))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.5 + 2.6 * columns, 1.2 + rows * (1 + 0.3 * len(names)))  # inches
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, names)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    legend = {name: line for lines, of in found for line, name in zip(lines, of, strict=True)}
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=len(legend) if columns > 2 else 1,
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class _Panel:
    """Hold what a panel shows, a place for each variant: scores of the seeds, and means with
    errors."""

    title: str
    metric: str
    scores: list[list[float]]
    pairs: list[tuple[float, float]]
    simple: dict[str, float]


def _panel_of_task(task: str, variants: dict, names: list[str]) -> _Panel:
    scores = [variants[name]["scores"] if name in variants else [np.nan] for name in names]
    simple = next(iter(variants.values()))["simple"]
    return _Panel(task, _metric(variants), scores, [mean_and_error(s) for s in scores], simple)


def _draw(axes: Axes, panel: _Panel, names: list[str]) -> None:
    places = np.arange(len(names))
    for place, of_name in enumerate(panel.scores):
        seeds = 100 * np.array(of_name)
        label = "a seed" if place == 0 else None  # once in the legend
        heights = np.full(len(seeds), place + 0.25)
        axes.plot(seeds, heights, ".", color="gray", markersize=4, label=label)
    for (key, value), line in zip(panel.simple.items(), (":", "--"), strict=False):
        axes.axvline(100 * value, color="gray", linestyle=line, label=SIMPLE.get(key, key))
    means, errors = (100 * np.array(values) for values in zip(*panel.pairs, strict=True))
    axes.errorbar(
        means,
        places,
        xerr=np.nan_to_num(errors),
        fmt="o",
        color="C0",
        capsize=3,
        label="mean, standard error",
    )
    axes.set_yticks(places, names)
    axes.set(title=panel.title, xlabel=f"{panel.metric}, x 100", ylim=(len(names) - 0.4, -0.6))
    at_least(axes.xaxis, 2.0)  # points
