"""Fits the temperature (and, where logits stand by themselves, the bias) of probabilities, and shows what it does."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch.nn import functional as F

from .losses_gemma_encoder import IGNORE


def fit(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    The temperature and bias of least cross-entropy, as fields of a config: `config.update(fit(logits, labels))`.

    Args:
        logits: (n, num_labels) of classes, whose bias is 0; or (n,) or (n, num_labels) of labels by themselves.
        labels: Of classes their numbers (n,); else 0 or 1 in the shape of `logits`. -100 is ignored. Held out: the
            temperature of training rows is too low.

    Raises:
        ValueError: shapes do not match, all labels are the same, or logits are not higher where labels are 1.
    """
    scores, labels = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(np.asarray(labels))
    classes = scores.dim() == 2 and labels.dim() == 1
    if scores.shape[: 1 if classes else None] != labels.shape:
        raise ValueError(f"`labels` of shape {tuple(labels.shape)} do not match logits of {tuple(scores.shape)}.")
    scores, labels = scores[labels != IGNORE], labels[labels != IGNORE]
    if len(labels.unique()) < 2:
        raise ValueError(f"`labels` are all {labels[:1].tolist()}: there is nothing to fit.")
    if not classes and (scores[labels == 1].mean() <= scores[labels == 0].mean()):
        raise ValueError(
            "Logits are not higher where labels are 1: they say nothing that a temperature could bring out."
        )
    scale = max(float(scores.std()), 1e-6)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.tensor(point, requires_grad=True)
        temperature = values[0].exp() * scale
        if classes:
            loss = F.cross_entropy(scores / temperature, labels.long())
        else:
            loss = F.binary_cross_entropy_with_logits((scores - values[1] * scale) / temperature, labels.double())
        loss.backward()
        return loss.item(), values.grad.numpy()

    start = np.zeros(1) if classes else np.array([0.0, float(scores.mean()) / scale])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(-10, 10), (None, None)][: len(start)])
    bias = 0.0 if classes else float(found.x[1] * scale)
    return {"calibration_temperature": float(np.exp(found.x[0]) * scale), "calibration_bias": bias}


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over bins of equal width (arXiv 1706.04599)."""
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].mean() - confidences[place == b].mean()) * (place == b).mean() for b in set(place)]
    return float(sum(gaps))


def plot_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path, bins: int = 15) -> None:
    """For each name, confidences and whether they were right: how often, in bins of equal width, and how many."""
    figure = Figure(figsize=(6, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0, 1], [0, 1], color="silver", label="equal")
    edges = np.linspace(0, 1, bins + 1)
    for name, (confidences, right) in curves.items():
        place = np.minimum((confidences * bins).astype(int), bins - 1)
        there = np.unique(place)
        means = [(confidences[place == b].mean(), right[place == b].mean()) for b in there]
        error = calibration_error(confidences, right, bins)
        top.plot(*zip(*means, strict=True), marker=".", label=f"{name}, calibration error {error:.3f}")
        bottom.hist(confidences, bins=edges, histtype="step", label=name)
    top.set(ylabel="relevant, or right", title=f"Reliability, {len(right):,} held-out rows")
    top.legend()
    bottom.set(xlabel="probability", ylabel="rows", xlim=(0, 1), yscale="log")
    figure.savefig(path, dpi=120)
