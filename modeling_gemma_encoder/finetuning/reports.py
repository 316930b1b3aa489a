"""What people read of fine-tuning runs: tables in Markdown, and plots."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from .._scripts.provenance import describe_rows
from .._scripts.training import mean_losses
from .tasks import Task


def plot_run(task: Task, report: dict, predicted: dict[str, tuple[np.ndarray, Dataset]], folder: Path) -> None:
    """Draw `learning_curve.png`, and `predictions-<split>.png` of each split: a confusion matrix,
    or numbers as points.

    Args:
        report: The content of `results.json`.
        predicted: The predictions and the rows of each split.
    """
    plot_learning_curve(task, report, folder / "learning_curve.png")
    for split, (predictions, rows) in predicted.items():
        if task.problem not in ("choice", "multi_label_classification"):
            title = f"{report['task']}, {split}, {len(rows)} rows, seed {report['seed']}"
            plot_predictions(task, predictions, np.array(rows["label"]), title, folder / f"predictions-{split}.png")


def plot_predictions(task: Task, predictions: np.ndarray, labels: np.ndarray, title: str, path: Path) -> None:
    """Draw a confusion matrix, or numbers as points."""
    side = max(6, 1 + 0.3 * len(task.labels))
    figure = Figure(figsize=(side, side * 5 / 6), layout="constrained")
    axes = figure.subplots()
    draw = draw_numbers if task.problem == "regression" else draw_confusion
    draw(axes, task, labels, predictions)
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def plot_learning_curve(task: Task, report: dict, path: Path) -> None:
    """Draw the losses and the validation scores over steps, if these are more than a single point."""
    history = report.get("history", [])
    losses = [(entry["step"], loss) for entry, loss in mean_losses(history)]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if max(len(losses), len(evaluations)) < 2:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines = []
    if losses:
        marker = "." if len(losses) < 20 else None
        lines += axes.plot(*zip(*losses, strict=True), color="silver", marker=marker, label="training loss")
    if evaluations:
        steps = [entry["step"] for entry in evaluations]
        held_out = [entry["eval_loss"] for entry in evaluations]
        lines += axes.plot(steps, held_out, color="gray", marker=".", label="validation loss")
        lines += draw_scores(axes.twinx(), evaluations, list(report["scores"][task.validation[0]]))
    axes.set(xlabel="step", ylabel="loss", title=f"{report['task']}, seed {report['seed']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    at_least(axes.yaxis, 0.02)
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5))
    figure.savefig(path, dpi=120)


def draw_scores(axes: Axes, evaluations: list[dict], names: list[str]) -> list[Line2D]:
    """Draw the named scores of each evaluation over steps."""
    lines, steps = [], [entry["step"] for entry in evaluations]
    for number, name in enumerate(names):
        values = [entry[f"eval_{name}"] for entry in evaluations]
        lines += axes.plot(steps, values, f"C{number}.-", label=name.replace("_", " "))
    axes.set_ylabel("validation score")
    at_least(axes.yaxis, 0.02)
    return lines


def draw_numbers(axes: Axes, task: Task, labels: np.ndarray, predictions: np.ndarray) -> None:
    """Draw each row as a point, its prediction over its label; of several numbers each has a color
    of its own."""
    names = task.label_columns or ["row"]
    for name, right, given in zip(names, np.atleast_2d(labels.T), np.atleast_2d(predictions.T), strict=True):
        axes.plot(right, given, ".", alpha=0.4, label=name)
    ends = [labels.min(), labels.max()]
    axes.plot(ends, ends, color="silver", label="equal")
    axes.set(xlabel="label", ylabel="prediction")
    axes.legend()


def draw_confusion(axes: Axes, task: Task, labels: np.ndarray, predictions: np.ndarray) -> None:
    """Draw a confusion matrix, as shares of the rows of each true class."""
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predictions,
        labels=range(len(task.labels)),
        display_labels=task.labels,
        normalize="true",
        values_format=".2f",
        xticks_rotation=30 if len(task.labels) < 10 else 90,
        include_values=len(task.labels) <= 15,
        colorbar=False,
        ax=axes,
    )
    counts = np.bincount(labels, minlength=len(task.labels))
    names = [f"{name} ({count})" for name, count in zip(task.labels, counts, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted, as a share of the true", ylabel="true (rows)")


def at_least(axis: Axis, span: float) -> None:
    """Widen an axis that shows less than `span`, where the curve would show nothing but rounding."""
    low, high = sorted(axis.get_view_interval())
    if high - low < span:
        axis.set_view_interval((low + high - span) / 2, (low + high + span) / 2, ignore=True)
    axis.get_major_formatter().set_useOffset(False)


def summarize(runs: list[dict]) -> list[dict]:
    """Return a row for each task, split and metric, with the scores of all seeds.

    `mean` and `deviation` are their mean and their sample standard deviation, which is None for one
    seed.

    Args:
        runs: The content of `results.json` of each run.
    """
    rows = {}
    for run in runs:
        for split, scores in run["scores"].items():
            for metric, value in scores.items():
                row = rows.setdefault((run["task"], split, metric), {"scores": [], "seeds": []})
                row["scores"].append(value)
                row["seeds"].append(run["seed"])
                row["problem"] = run.get("problem")
                row["majority"] = run.get("majority", {}).get(split, {}).get(metric)
    return [
        {
            "task": task,
            "split": split,
            "metric": metric,
            **row,
            "mean": float(np.mean(row["scores"])),
            "deviation": float(np.std(row["scores"], ddof=1)) if len(row["scores"]) > 1 else None,
        }
        for (task, split, metric), row in rows.items()
    ]


def markdown(summary: list[dict], sources: dict[tuple[str, str], dict[str, str]] | None = None) -> str:
    """
    Return a summary as a table, with scores times 100.

    Args:
        sources: Where the rows of a task's split are from, see `describe_rows`; None: not said.
    """
    seeds = ", ".join(map(str, dict.fromkeys(seed for row in summary for seed in row["seeds"])))
    guesses = {"training mean" if row["problem"] == "regression" else "majority" for row in summary}
    lines = [
        f"| task | split | metric x 100 | {' or '.join(sorted(guesses))} | Gemma Encoder, seed {seeds} |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in summary:
        spread = "" if row["deviation"] is None else f" ± {row['deviation'] * 100:.1f}"
        majority = "" if row["majority"] is None else f"{row['majority'] * 100:.1f}"
        source = (sources or {}).get((row["task"], row["split"]))
        split = f"{row['split']}: {describe_rows(source)}" if source else row["split"]
        lines.append(
            f"| {row['task']} | {split} | {row['metric'].replace('_', ' ')} | {majority} "
            f"| {row['mean'] * 100:.1f}{spread} |"
        )
    return "\n".join(lines)


def without_scores(runs: list[dict]) -> str:
    """Return a table of runs without scores: their rows were trained on, or predicted."""
    done = {"train": "trained on"}
    lines = ["| task | seed | split | rows | what was done |", "| --- | ---: | --- | ---: | --- |"]
    for run in runs:
        for split, rows in run["rows"].items():
            what = done.get(split, "predicted, not scored: labels are missing")
            lines.append(f"| {run['task']} | {run['seed']} | {split} | {rows:,} | {what} |")
    return "\n".join(lines)


def average(summary: list[dict], tasks: dict[str, tuple[str, ...]]) -> float:
    """Return GLUE's and SuperGLUE's score: the mean over tasks of the mean over a task's metrics
    and named splits."""
    scores = [
        [row["mean"] for row in summary if row["task"] == task and row["split"] in splits]
        for task, splits in tasks.items()
    ]
    return float(np.mean([np.mean(values) for values in scores]))
