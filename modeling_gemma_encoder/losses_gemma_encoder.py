"""Losses are plain functions of scores and labels, computed in fp32; a label of -100 is ignored everywhere.

Classification losses map logits (batch, num_labels) and labels to a scalar; ranking losses map scores and graded
labels, both (batch, num_docs), to a scalar.
"""

import torch
from torch.nn import functional as F

IGNORE = -100


def single_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed over the labelled rows. Labels: class indices (batch,)."""
    return F.cross_entropy(logits.float(), labels.reshape(-1).long(), ignore_index=IGNORE, reduction="sum")


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed over the labelled entries. Labels: probabilities (batch, num_labels)."""
    labels = labels.reshape(logits.shape).float()
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0), reduction="none")
    return losses.where(labels != IGNORE, 0).sum()


def regression_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error, summed over the labelled entries. Labels: targets (batch,) or (batch, num_labels)."""
    labels = labels.reshape(logits.shape).float()
    return (logits.float() - labels).where(labels != IGNORE, 0).square().sum()


CLASSIFICATION_LOSSES = {
    "single_label_classification": single_label_loss,
    "multi_label_classification": multi_label_loss,
    "regression": regression_loss,
}


def softmax_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Listwise softmax cross-entropy, the Softmax loss of RankT5 (arXiv 2210.10634), averaged over the lists.

    .. math:: \ell(y, s) = -\sum_j y_j \log \frac{e^{s_j}}{\sum_{j'} e^{s_{j'}}}

    Documents labelled -100 are not part of their list. A list without a positive label adds zero to the sum and counts
    in the average, so that accumulating batches of one size gives the gradient of one large batch.
    """
    valid = labels != IGNORE
    if not torch.compiler.is_compiling() and (lowest := labels.where(valid, 0).min()) < 0:
        raise ValueError(f"`labels` must be 0 or more, or {IGNORE} to ignore a document, got {lowest.item()}")
    log_probabilities = scores.float().masked_fill(~valid, torch.finfo(torch.float32).min).log_softmax(-1)
    gains = labels.float().where(valid, 0)
    return -(gains * log_probabilities.where(valid, 0)).sum(-1).mean()


RANKING_LOSSES = {"softmax": softmax_loss}
