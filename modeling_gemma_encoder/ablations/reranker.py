"""A reranker as a task of an ablation: a script trains its cells, which are scored on judged
queries."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._scripts.files import write
from .cells import Cell
from .statistics import split_in_parts
from .studies import Options

# Names of a cell's report -> names of rankings in the script's results.
RANKINGS = {"scores": "Gemma Encoder", "majority": "random order", "BM25": "BM25"}
HELD_OUT = "held-out"  # the folder of what was measured on queries set aside
SHARE = 0.2  # of the queries is set aside to choose learning rates; our choice


@dataclass(frozen=True)
class RankingTask:
    """Train and evaluate the cells of a reranker with `msmarco.py`.

    Args:
        plain: Options of every cell, unless the cell changes them.
        train_data: Judged data to train on, of which a share of the queries chooses the learning
            rate.
        eval_data: Judged data to evaluate.
        flags: Further words of the command line.
        script: The path of `msmarco.py`.
    """

    model: str
    plain: Options
    train_data: str
    eval_data: str
    flags: tuple[str, ...]
    script: Path

    @property
    def name(self) -> str:
        """Return the name of the data, or of its folder where the file is named after its split."""
        place = Path(self.eval_data).resolve()
        is_split = place.stem in ("train", "validation", "dev", "test")
        return place.parent.name if is_split else place.stem

    def __call__(self, cell: Cell, folder: Path) -> dict:
        """Return the report of a cell, which is trained unless it is finished.

        Raises:
            ValueError: The folder holds another run, or the script failed or measured nothing.
        """
        words = self._words(cell)
        finished = folder / "results.json"
        if finished.exists():
            report = json.loads(finished.read_text())
            _refuse_other_flags(folder, report["flags"], words)
            return report
        self._train(words, folder)
        report = {**self._measured(folder, cell.choosing), "flags": words}
        write(finished, json.dumps(report, indent=2))
        return report

    def _words(self, cell: Cell) -> list[str]:
        """Return the command line of a cell, without the folder it is run in."""
        options = {
            "model": self.model,
            **self.plain,
            **dict(cell.options),
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "train_data": self.train_data,
            "held_out": SHARE,
        }
        if not cell.choosing:
            options["eval_data"] = self.eval_data
        given = {key: str(value) for key, value in options.items() if value is not None}
        return [*(word for key, value in given.items() for word in (f"--{key}", value)), *self.flags]

    def _train(self, words: list[str], folder: Path) -> None:
        command = [sys.executable, str(self.script), *words, "--output_dir", str(folder)]
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise ValueError(f"{self.script.name} failed. Its messages are in {folder / 'log.txt'}.")

    def _measured(self, folder: Path, choosing: bool) -> dict:
        """Return the first measure of every ranking, in the form of a run's report."""
        places = [path for path in folder.glob("*/results.json") if (path.parent.name == HELD_OUT) == choosing]
        if not places:
            raise ValueError(
                f"{self.script.name} measured nothing: {self.train_data} has too few queries to set "
                "some of them aside. Give more --ranking data."
            )
        means = json.loads(places[0].read_text())["means"]
        first = next(iter(means["Gemma Encoder"]))
        return {key: {"judged": {first: means[name][first]}} for key, name in RANKINGS.items()}


def _refuse_other_flags(folder: Path, before: list[str], now: list[str]) -> None:
    """Raise ValueError where two command lines are not of the same run; the order of flags does not
    matter."""
    before, now = by_flag(before), by_flag(now)
    if changed := [flag for flag in before | now if before.get(flag) != now.get(flag)]:
        which = ", ".join(f"{flag}: {before.get(flag)} -> {now.get(flag)}" for flag in changed)
        raise ValueError(f"{folder} holds another run ({which}). Choose another --output_dir, or delete it.")


def by_flag(words: list[str]) -> dict[str, str]:
    """Return a command's flags and what follows each.

    `["--lr", "1", "--bf16"]` becomes `{"--lr": "1", "--bf16": ""}`.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            values[flag] = [value] if equals else []
        else:
            values[list(values)[-1]].append(value)
    return {flag: " ".join(given) for flag, given in values.items()}


class LeftOutQueries:
    """Read the finished cells of a reranker, as `LeftOut` reads those of other tasks."""

    def answers(self, folder: Path) -> list[np.ndarray]:
        """Return the values of each measure, (queries,), in the order of the queries' names.

        Raises:
            FileNotFoundError: The cell kept no values of its queries.
        """
        places = [path for path in folder.glob("*/results.json") if path.parent.name != HELD_OUT]
        if not places:
            raise FileNotFoundError(f"{folder} has no values of its queries.")
        measures = json.loads(places[0].read_text())["per_query"]["Gemma Encoder"]
        return [np.array([value for _, value in sorted(queries.items())]) for queries in measures.values()]

    def always(self, folder: Path) -> None:
        """Return None: a ranking has no class that it could name for all rows."""

    def __call__(self, folder: Path) -> np.ndarray:
        """Return the cell's mean without each part of the queries, (parts,); empty for a single
        query."""
        values = self.answers(folder)[0]
        if len(values) < 2:
            return np.array([])
        part = split_in_parts(len(values))
        return np.array([values[part != number].mean() for number in range(part.max() + 1)])
