"""What ablations found, to look at: a table of scores, one of differences, and a plot.

A place is empty where a variant was not run on a task, and so is an average over tasks that includes it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..finetuning.reports import at_least
from .statistics import averages, mean_and_error
from .studies import Study


def score_table(title: str, study: Study, of_study: dict) -> str:
    """A study as a table: a row a variant, scores x 100 with standard errors, the paper's average beside ours."""

    def shown(pair: tuple[float, float]) -> str:
        mean, error = (100 * value for value in pair)
        return f"{mean:.1f}" + ("" if np.isnan(error) else f" ± {error:.1f}")

    names = [f"{task} ({next(iter(variants.values()))['metric']})" for task, variants in of_study.items()]
    several = len(of_study) > 1
    columns = [title, *names, *["average"] * several, *["the paper's GLUE average, Gemma 2 2B"] * bool(study.paper)]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    simple = [next(iter(variants.values()))["simple"] for variants in of_study.values()]
    for key, name in (("majority", "majority, or random order"), ("BM25", "BM25")):
        values = [of_task.get(key) for of_task in simple]
        if any(value is not None for value in values):
            values += [None if None in values else float(np.mean(values))] * several
            cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
            lines.append(f"| {name} | {' | '.join([*cells, *([''] if study.paper else [])])} |")
    for name in study.variants:
        there = [name in variants for variants in of_study.values()]
        if not any(there):
            continue
        pairs = [
            mean_and_error(variants[name]["scores"]) if name in variants else None for variants in of_study.values()
        ]
        pairs += [averages(of_study, name) if all(there) else None] * several
        cells = ["" if pair is None else shown(pair) for pair in pairs]
        cells += [f"{study.paper[name]:.1f}" if name in study.paper else ""] if study.paper else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


EQUAL = "equal answers"


def notes(study: Study, of_study: dict) -> str:
    """In words what numbers hide, a line each: variants with the same answers, and answers that are always the same."""
    lines = []
    for task, variants in of_study.items():
        named = set()
        for first in variants:
            others = [name for name, row in variants.items() if first in row.get("equal_to", [])]
            if others and first not in named:
                named |= {first, *others}
                lines.append(f"- {task}: {', '.join([first, *others])} give equal answers to every row.")
        for name, row in variants.items():
            always = row.get("always", [])
            for said in dict.fromkeys(filter(None, always)):
                seeds = f" ({always.count(said)} of {len(always)} seeds)" if len(always) > 1 else ""
                lines.append(f"- {task}: {name} says {said}{seeds}, so its score is that of a constant.")
    return "\n".join(lines)


def difference_table(name: str, study: Study, of_study: dict) -> str:
    """Differences as a table, x 100, a row a variant and what it is compared with; empty where there is none."""

    def shown(pair: Sequence[float] | None, equal: bool) -> str:
        if equal:
            return EQUAL
        return "" if pair is None else f"{100 * pair[0]:+.1f} ± {100 * pair[1]:.1f}"

    def are_equal(variants: dict, first: str, second: str) -> bool:
        rows = [variants.get(name, {}).get("equal_to", []) for name in (first, second)]
        return second in rows[0] or first in rows[1]

    seeds = max(len(row["scores"]) for variants in of_study.values() for row in variants.values())
    columns = [f"{name}, difference (x 100, ± standard error of {'seeds and rows' if seeds > 1 else 'the rows alone'})"]
    several = len(of_study) > 1
    columns += [*of_study, *["average"] * several]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for variant in study.variants:
        if variant == (reference := study.compared_with(variant)):
            continue
        if not any(variant in variants for variants in of_study.values()):
            continue
        pairs = [variants[variant]["difference"] if variant in variants else None for variants in of_study.values()]
        average = None
        if None not in pairs:
            means, errors = np.array(pairs).T
            average = (means.mean(), np.sqrt(np.sum(errors**2)) / len(pairs))
        equal = [are_equal(variants, variant, reference) for variants in of_study.values()]
        pairs, equal = pairs + [average] * several, equal + [all(equal)] * several
        lines.append(f"| {' | '.join([f'{variant} - {reference}', *map(shown, pairs, equal)])} |")
    return "\n".join(lines)


def plot(title: str, study: Study, of_study: dict, path: Path) -> None:
    """A panel a task, and one of the averages: every seed a dot, means with standard errors, the majority a line."""
    names = [name for name in study.variants if any(name in variants for variants in of_study.values())]
    everywhere = all(name in variants for variants in of_study.values() for name in names)
    panels = [*of_study, *(["average"] if len(of_study) > 1 and everywhere else [])]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.5 + 2.6 * columns, 1.2 + rows * (1 + 0.3 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    places = np.arange(len(names))
    for axes, panel in zip(grid.flat, panels, strict=False):
        if panel == "average":
            pairs = [averages(of_study, name) for name in names]
        else:
            variants = of_study[panel]
            scores = [variants[name]["scores"] if name in variants else [np.nan] for name in names]
            pairs = [mean_and_error(of_name) for of_name in scores]
            for place, of_name in zip(places, scores, strict=True):
                seeds = 100 * np.array(of_name)
                label = "a seed" if not place else None
                axes.plot(seeds, np.full(len(seeds), place + 0.25), ".", color="gray", markersize=4, label=label)
            first = next(iter(variants.values()))
            for (key, value), line in zip(first["simple"].items(), (":", "--"), strict=False):
                label = {"majority": "majority, or random order"}.get(key, key)
                axes.axvline(100 * value, color="gray", linestyle=line, label=label)
        means, errors = (100 * np.array(values) for values in zip(*pairs, strict=True))
        errors = np.nan_to_num(errors)
        axes.errorbar(means, places, xerr=errors, fmt="o", color="C0", capsize=3, label="mean, standard error")
        axes.set_yticks(places, names)
        metric = "score" if panel == "average" else first["metric"]
        axes.set(title=panel, xlabel=f"{metric}, x 100", ylim=(len(names) - 0.4, -0.6))
        at_least(axes.xaxis, 2.0)  # points
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    legend = {name: line for lines, names in found for line, name in zip(lines, names, strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend) if columns > 2 else 1)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
