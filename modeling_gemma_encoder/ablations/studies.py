"""Studies: the same fine-tuning with one choice changed, on several tasks and seeds.

Every variant has the learning rate that does best for it and the task, on rows set aside from the
training set, so that no variant is handicapped by a rate that suits another one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..finetuning.arguments import FineTuningArguments
from .cells import Cell

# Fields of FineTuningArguments, and `kind`: "words" or one of `baselines.MAKERS`.
Options = dict[str, object]
Changed = tuple[tuple[str, object], ...]  # options as sorted pairs
RunAll = Callable[[list[Cell]], Iterable[dict | None]]


@dataclass
class Study:
    """Describe variants of one choice, and what they are compared with.

    Args:
        variants: Name -> the options that it changes.
        paper: Name -> GLUE average of Gemma 2 2B in the paper (arXiv 2503.02656), where it is
            known.
        reference: Name of what all others are compared with, or a name for each variant. Default:
            the first variant.
    """

    variants: dict[str, Options]
    paper: dict[str, float] = field(default_factory=dict)
    reference: str | dict[str, str] | None = None

    def compared_with(self, name: str) -> str:
        """Return what a variant is compared with: the first variant where the reference is left
        out."""
        reference = self.reference
        if isinstance(reference, dict):
            reference = reference.get(name)
        return reference if reference in self.variants else next(iter(self.variants))


def as_options(changed: Options, given: FineTuningArguments) -> Changed:
    """Return what a variant changes of the options given, so that studies share the cells that are
    the same."""
    return tuple(sorted((key, value) for key, value in changed.items() if getattr(given, key, None) != value))


class Place(NamedTuple):
    """Name a variant of a study on a task, and what it changes."""

    study: str
    task: str
    variant: str
    options: Changed

    @property
    def trained(self) -> tuple[str, Changed]:
        """Return what is trained for it; places of several studies may have this in common."""
        return self.task, self.options


@dataclass(frozen=True)
class Plan:
    """Describe which cells a command needs.

    Args:
        given: The options that variants change.
        learning_rates: Those to choose from; a single one is taken without choosing.
    """

    studies: dict[str, Study]
    tasks: tuple[str, ...]
    given: FineTuningArguments
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @cached_property
    def places(self) -> list[Place]:
        """Return every variant of every study on every task."""
        return [
            Place(name, task, variant, as_options(options, self.given))
            for name, study in self.studies.items()
            for task in self.tasks
            for variant, options in study.variants.items()
        ]

    def choosing(self) -> list[Cell]:
        """Return the cells that choose learning rates; none where there is a single one."""
        if len(self.learning_rates) == 1:
            return []
        wanted = dict.fromkeys(place.trained for place in self.places)
        return [Cell(*trained, rate, 0, True) for trained in wanted for rate in self.learning_rates]

    def final(self, trained: tuple[str, Changed], rate: float) -> list[Cell]:
        """Return the cells that are reported, one for each seed."""
        return [Cell(*trained, rate, seed, False) for seed in self.seeds]

    def count(self) -> int:
        """Return the number of training runs."""
        wanted = {place.trained for place in self.places}
        return len(self.choosing()) + len(wanted) * len(self.seeds)


def score(report: dict) -> float:
    """Return a run's score as GLUE counts it: the mean of its metrics, and then of its splits."""
    return float(np.mean([np.mean([*scores.values()]) for scores in report["scores"].values()]))


def metric_of(report: dict) -> str:
    """Return the name of what `score` is the mean of."""
    names = dict.fromkeys(name.replace("_", " ") for scores in report["scores"].values() for name in scores)
    metrics = " and ".join(names)
    return f"mean of {metrics}" if len(names) > 1 else metrics


def run_studies(plan: Plan, run_all: RunAll) -> dict:
    """Run the cells of a plan, and return the scores of every variant.

    Args:
        run_all: Takes cells and returns their reports in order. A report is None for a cell that is
            not to run: a variant that needs it is left out, and so is a task or a study that then
            has nothing to compare.

    Returns:
        Study -> task -> variant -> `learning_rate`; `chosen_on`, rate -> score; `scores` of the
        seeds; `metric`, their name; `cells`, their folders below the root; and `simple`, the scores
        that need no reading: of the majority, or of a random order and BM25.
    """
    chosen_on = _scores_of_rates(plan, run_all)
    rates = {trained: _best(found) for trained, found in chosen_on.items()}
    rates = {trained: rate for trained, rate in rates.items() if rate is not None}
    cells = [cell for trained, rate in rates.items() for cell in plan.final(trained, rate)]
    reports: dict[tuple[str, Changed], list[dict | None]] = {}
    for cell, report in zip(cells, run_all(cells), strict=True):
        reports.setdefault((cell.task, cell.options), []).append(report)

    found = {}
    for place in plan.places:
        of_place = reports.get(place.trained, [None])
        if None in of_place:
            continue
        rate = rates[place.trained]
        found.setdefault(place.study, {}).setdefault(place.task, {})[place.variant] = {
            "learning_rate": rate,
            "chosen_on": chosen_on[place.trained],
            **_summarize(of_place),
            "cells": [str(cell.folder(Path())) for cell in plan.final(place.trained, rate)],
        }
    return _comparable(plan, found)


def _scores_of_rates(plan: Plan, run_all: RunAll) -> dict[tuple[str, Changed], dict]:
    """Return what is trained -> learning rate -> score on rows set aside; None where it was not
    measured."""
    found = {place.trained: dict.fromkeys(plan.learning_rates) for place in plan.places}
    if cells := plan.choosing():
        for cell, report in zip(cells, run_all(cells), strict=True):
            value = None if report is None else score(report)
            found[cell.task, cell.options][cell.learning_rate] = value
    return found


def _best(scores: dict[float, float | None]) -> float | None:
    """Return the rate with the highest score, or None where a score is missing. NaN counts as the
    lowest."""
    if len(scores) == 1:
        return next(iter(scores))
    if None in scores.values():
        return None
    return max(scores, key=lambda rate: np.nan_to_num(scores[rate], nan=-np.inf))


def _summarize(reports: list[dict]) -> dict:
    """Return what the reports of a variant's seeds say."""
    first = reports[0]
    simple = {name: first[name] for name in ("majority", "BM25") if first.get(name)}
    return {
        "scores": [score(report) for report in reports],
        "metric": metric_of(first),
        "simple": {name: score({"scores": scores}) for name, scores in simple.items()},
    }


def _comparable(plan: Plan, found: dict) -> dict:
    """Return what was found without tasks and studies that have nothing to compare."""
    kept = {}
    for name, tasks in found.items():
        least = min(2, len(plan.studies[name].variants))
        enough = {task: variants for task, variants in tasks.items() if len(variants) >= least}
        if enough:
            kept[name] = enough
    return kept
