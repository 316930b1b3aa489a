"""Fitting the temperature and bias of calibrated probabilities, and plots of what they change."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch.nn import functional as F

from .losses_gemma_encoder import IGNORE


def fit(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Return the temperature and bias with the lowest cross-entropy as fields of a config.

    Use it as `config.update(fit(logits, labels))`.

    Args:
        logits: (n, num_labels) of classes, whose bias is 0; or (n,) or (n, num_labels) of
            independent labels.
        labels: Numbers of the classes, (n,); or 0 and 1 in the shape of `logits`. -100 is ignored.
            They must be held out, since training rows give a temperature that is too low.

    Raises:
        ValueError: shapes do not match, all labels are the same, or logits are not higher where
            labels are 1.
    """
    scores, labels = labeled_rows(logits, labels)
    classes = scores.dim() > labels.dim()
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


def labeled_rows(logits: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels without those labeled -100. Raise ValueError if nothing can be
    fitted to them."""
    scores, labels = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(np.asarray(labels))
    classes = scores.dim() == 2 and labels.dim() == 1
    if scores.shape[: 1 if classes else None] != labels.shape:
        raise ValueError(f"`labels` of shape {tuple(labels.shape)} do not match logits of {tuple(scores.shape)}.")
    scores, labels = scores[labels != IGNORE], labels[labels != IGNORE]
    if len(labels.unique()) < 2:
        raise ValueError(f"`labels` must have two values or more; all of them are {labels[:1].tolist()}.")
    if not classes and (scores[labels == 1].mean() <= scores[labels == 0].mean()):
        raise ValueError(
            "`logits` are on average not higher where `labels` are 1, so they cannot become probabilities. Train the "
            "model longer, or check the labels."
        )
    return scores, labels


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Compute the expected calibration error, the mean of |accuracy - confidence| over bins (arXiv
    1706.04599)."""
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].mean() - confidences[place == b].mean()) * (place == b).mean() for b in set(place)]
    return float(sum(gaps))


def plot_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path, bins: int = 15) -> None:
    """Plot accuracy over confidence in bins of equal width, and the number of rows in each bin.

    `curves` has for each name the confidences and whether they were right.
    """
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
