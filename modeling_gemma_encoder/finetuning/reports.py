"""What is left of fine-tuning runs for people: tables (Markdown) and plots (PNG)."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from .._scripts.training import mean_losses
from .tasks import Task


def plot_run(task: Task, report: dict, predicted: dict[str, tuple[np.ndarray, Dataset]], folder: Path) -> None:
    """Draw `learning_curve.png`, unless it were a single point, and `predictions-<split>.png`: a confusion matrix, or
    predictions against labels."""
    history = report.get("history", [])
    losses = [(entry["step"], loss) for entry, loss in mean_losses(history)]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if max(len(losses), len(evaluations)) > 1:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        marker = "." if len(losses) < 20 else None
        style = {"color": "silver", "marker": marker, "label": "training loss"}
        lines = axes.plot(*zip(*losses, strict=True), **style) if losses else []
        if evaluations:
            steps = [entry["step"] for entry in evaluations]
            held_out = [entry["eval_loss"] for entry in evaluations]
            lines += axes.plot(steps, held_out, color="gray", marker=".", label="validation loss")
            scores = axes.twinx()
            for number, name in enumerate(report["scores"][task.validation[0]]):
                values = [entry[f"eval_{name}"] for entry in evaluations]
                lines += scores.plot(steps, values, f"C{number}.-", label=name.replace("_", " "))
            scores.set_ylabel("validation score")
            at_least(scores.yaxis, 0.02)
        axes.set(xlabel="step", ylabel="loss", title=f"{report['task']}, seed {report['seed']}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        at_least(axes.yaxis, 0.02)
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5))
        figure.savefig(folder / "learning_curve.png", dpi=120)

    for split, (predictions, rows) in predicted.items():
        if task.problem in ("choice", "multi_label_classification"):
            continue
        labels = np.array(rows["label"])
        side = max(6, 1 + 0.3 * len(task.labels))
        figure = Figure(figsize=(side, side * 5 / 6), layout="constrained")
        axes = figure.subplots()
        if task.problem == "regression":
            for name, right, given in zip(
                task.label_columns or ["row"], np.atleast_2d(labels.T), np.atleast_2d(predictions.T), strict=True
            ):
                axes.plot(right, given, ".", alpha=0.4, label=name)
            axes.plot([labels.min(), labels.max()], [labels.min(), labels.max()], color="silver", label="equal")
            axes.set(xlabel="label", ylabel="prediction")
            axes.legend()
        else:
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
        axes.set_title(f"{report['task']}, {split}, {len(labels)} rows, seed {report['seed']}")
        figure.savefig(folder / f"predictions-{split}.png", dpi=120)


def at_least(axis: Axis, span: float) -> None:
    """Widen an axis that shows less than `span`, whose steps would be those of rounding."""
    low, high = sorted(axis.get_view_interval())
    if high - low < span:
        axis.set_view_interval((low + high - span) / 2, (low + high + span) / 2, ignore=True)
    axis.get_major_formatter().set_useOffset(False)


def summarize(runs: list[dict]) -> list[dict]:
    """Runs of several seeds -> a row for each task, split and metric, with the seeds' scores, their mean and sample
    standard deviation (None for one seed)."""
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


def markdown(summary: list[dict]) -> str:
    """The summary as a table, scores times 100."""
    seeds = ", ".join(map(str, dict.fromkeys(seed for row in summary for seed in row["seeds"])))
    guesses = {"training mean" if row["problem"] == "regression" else "majority" for row in summary}
    lines = [
        f"| task | split | metric x 100 | {' or '.join(sorted(guesses))} | Gemma Encoder, seed {seeds} |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in summary:
        spread = "" if row["deviation"] is None else f" ± {row['deviation'] * 100:.1f}"
        majority = "" if row["majority"] is None else f"{row['majority'] * 100:.1f}"
        lines.append(
            f"| {row['task']} | {row['split']} | {row['metric'].replace('_', ' ')} | {majority} "
            f"| {row['mean'] * 100:.1f}{spread} |"
        )
    return "\n".join(lines)


def without_scores(runs: list[dict]) -> str:
    """Return as a table what was done with the rows of runs that scored none: they were trained on, or predicted."""
    done = {"train": "trained on"}
    lines = ["| task | seed | split | rows | what was done |", "| --- | ---: | --- | ---: | --- |"]
    for run in runs:
        for split, rows in run["rows"].items():
            what = done.get(split, "predicted, not scored: labels are missing")
            lines.append(f"| {run['task']} | {run['seed']} | {split} | {rows:,} | {what} |")
    return "\n".join(lines)


def average(summary: list[dict], tasks: dict[str, tuple[str, ...]]) -> float:
    """GLUE's and SuperGLUE's score: metrics averaged within a task and its named splits, then over tasks."""
    scores = [
        [row["mean"] for row in summary if row["task"] == task and row["split"] in splits]
        for task, splits in tasks.items()
    ]
    return float(np.mean([np.mean(values) for values in scores]))
