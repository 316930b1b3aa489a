"""Losses: plain functions of scores and labels, computed in fp32. A label of -100 is always
ignored.

Classification losses map logits (batch, num_labels) and labels to a scalar; ranking losses map
scores and graded labels, both (batch, num_docs), to a scalar.
"""

import torch
from torch.nn import functional as F

IGNORE = -100


def single_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute cross-entropy, summed over the labeled rows. Labels are class indices (batch,)."""
    return F.cross_entropy(logits.float(), labels.reshape(-1).long(), ignore_index=IGNORE, reduction="sum")


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute binary cross-entropy, summed over the labeled entries. Labels are probabilities
    (batch, num_labels)."""
    labels = labels.reshape(logits.shape).float()
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0), reduction="none")
    return losses.where(labels != IGNORE, 0).sum()


def regression_loss(logits: torch.Tensor, labels: torch.Tensor, std: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Compute the squared error in units of `std` (num_labels,), summed over the labeled entries.

    Labels are targets (batch,) or (batch, num_labels).
    """
    labels = labels.reshape(logits.shape).float()
    return ((logits.float() - labels) / std).where(labels != IGNORE, 0).square().sum()


def mean_over(loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Divide a summed loss by `num_items`, by default the number of labels in this batch; return 0
    without labels."""
    num_items = (labels != IGNORE).sum() if num_items is None else num_items
    return loss / torch.as_tensor(num_items, device=loss.device).clamp(min=1)


CLASSIFICATION_LOSSES = {
    "single_label_classification": single_label_loss,
    "multi_label_classification": multi_label_loss,
    "regression": regression_loss,
}


# Ranking. In the equations s_j are the scores of a list and y_j its labels; documents labeled -100
# are not part of it. Every loss is a sum over a list's documents or pairs, averaged over the lists
# of a batch. A list from which nothing can be learned adds zero and counts, so that accumulating
# batches of one size gives the gradient of one large batch.


def point_ce_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute pointwise cross-entropy, RankT5's PointCE (arXiv 2210.10634, equation 1).

    .. math:: \ell(y, s) = -\sum_{y_j > 0} \log \sigma(s_j) - \sum_{y_j = 0} \log (1 - \sigma(s_j))
    """
    valid = relevance(labels)
    losses = F.binary_cross_entropy_with_logits(scores.float(), (labels > 0).float(), reduction="none")
    return losses.where(valid, 0).sum(-1).mean()


def pair_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute the pairwise logistic loss, RankT5's Pair (equation 2) and RankNet's (Burges et al.,
    ICML 2005).

    .. math:: \ell(y, s) = \sum_{y_i > y_j} \log (1 + e^{s_j - s_i})
    """
    better, differences = pairs(scores, labels, relevance(labels))
    return F.softplus(-differences).where(better, 0).sum((-2, -1)).mean()


def softmax_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute listwise softmax cross-entropy, RankT5's Softmax (equation 3), with targets that sum
    to one in a list.

    .. math:: \ell(y, s) = -\sum_j \frac{y_j}{\sum_{j'} y_{j'}} \log \frac{e^{s_j}}{\sum_{j'} e^{s_{j'}}}

    A list of n equal scores costs log n, whatever its grades. If one document is labeled 1 and the
    others 0, this is `rankt5_softmax_loss`. If several are labeled 1, this is the mean over them,
    and RankT5's is the sum.
    """
    valid = relevance(labels)
    return -(target_shares(labels, valid) * log_softmax(scores, valid).where(valid, 0)).sum(-1).mean()


def rankt5_softmax_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute RankT5's Softmax as in the paper (equation 3), where a list is weighted by the sum
    of its grades.

    .. math:: \ell(y, s) = -\sum_j y_j \log \frac{e^{s_j}}{\sum_{j'} e^{s_{j'}}}
    """
    valid = relevance(labels)
    gains = labels.float().where(valid, 0)
    return -(gains * log_softmax(scores, valid).where(valid, 0)).sum(-1).mean()


def poly1_loss(scores: torch.Tensor, labels: torch.Tensor, epsilon: float = 1.0) -> torch.Tensor:
    r"""Compute RankT5's Poly1 (equation 4): `softmax_loss` plus a multiple of the first term of its
    polynomial.

    .. math:: \ell(y, s) = \text{Softmax} + \epsilon (1 - p), \quad
        p = \sum_j \frac{y_j}{\sum_{j'} y_{j'}} \frac{e^{s_j}}{\sum_{j'} e^{s_{j'}}}

    PolyLoss: arXiv 2204.12511. Targets sum to one in both terms, so grades do not change their
    balance. `rankt5_poly1_loss` differs from this as `rankt5_softmax_loss` does from
    `softmax_loss`.
    """
    return softmax_loss(scores, labels) + epsilon * mean_miss(scores, labels)


def rankt5_poly1_loss(scores: torch.Tensor, labels: torch.Tensor, epsilon: float = 1.0) -> torch.Tensor:
    """Compute RankT5's Poly1 as in the paper (equation 4): `poly1_loss` with `rankt5_softmax_loss`."""
    return rankt5_softmax_loss(scores, labels) + epsilon * mean_miss(scores, labels)


def lambdarank_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute LambdaRank as a loss (Wang et al., CIKM 2018, equation 13).

    A pair is weighted by the change in nDCG if its documents change places.

    .. math:: \ell(y, s) = \sum_{y_i > y_j} |G_i - G_j| \left| \frac{1}{D_i} - \frac{1}{D_j} \right|
        \log (1 + e^{s_j - s_i}), \quad G_i = \frac{2^{y_i} - 1}{\text{maxDCG}}, \quad D_i = \log_2 (1 + r_i)

    r_i is the rank of document i by the scores, which has no gradient.
    """
    valid = relevance(labels)
    better, differences = pairs(scores, labels, valid)
    order = scores.detach().float().masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(-1) + 1
    discounts = 1 / torch.log2(1.0 + ranks)
    gains = (2 ** labels.float().where(valid, 0) - 1).where(valid, 0)
    best = gains.sort(-1, descending=True).values / torch.log2(torch.arange(gains.shape[-1], device=gains.device) + 2.0)
    gains = gains / best.sum(-1, keepdim=True).clamp(min=1e-9)
    weights = (gains[..., None] - gains[..., None, :]).abs() * (discounts[..., None] - discounts[..., None, :]).abs()
    return (weights * F.softplus(-differences)).where(better, 0).sum((-2, -1)).mean()


def margin_mse_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute the mean squared error of a list's margins to a teacher's (arXiv 2010.02666,
    equation 6).

    .. math:: \ell(t, s) = \frac{1}{n (n - 1)} \sum_{i \neq j} ((s_i - s_j) - (t_i - t_j))^2

    It is over all pairs of a list. Labels are the teacher's scores t, of any sign; -100 means no
    document.
    """
    valid = labels != IGNORE
    errors = (scores.float() - labels.float()).where(valid, 0)
    both = valid[..., None] & valid[..., None, :]
    squares = (errors[..., None] - errors[..., None, :]).square().where(both, 0).sum((-2, -1))
    count = valid.sum(-1)
    return (squares / (count * (count - 1)).clamp(min=1)).mean()


def kl_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Compute the Kullback-Leibler divergence of a teacher's distribution over a list from the
    model's.

    .. math:: \ell(t, s) = \sum_j p_j (\log p_j - \log q_j), \quad p = \text{softmax}(t), \quad q = \text{softmax}(s)

    Labels are the teacher's scores t, of any sign; -100 means no document. ListNet's loss (Cao et
    al., ICML 2007) is this plus a constant.
    """
    valid = labels != IGNORE
    teacher, student = log_softmax(labels, valid), log_softmax(scores, valid)
    return (teacher.exp() * (teacher - student)).where(valid, 0).sum(-1).mean()


def relevance(labels: torch.Tensor) -> torch.Tensor:
    """Return which documents there are. Raise ValueError if one of them has a negative label."""
    valid = labels != IGNORE
    if not torch.compiler.is_compiling() and (lowest := labels.where(valid, 0).min()) < 0:
        raise ValueError(f"`labels` must be 0 or more, or {IGNORE} to ignore a document, got {lowest.item()}.")
    return valid


def target_shares(labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Divide labels (batch, num_docs) by the sum of their list; return zeros if that is zero."""
    gains = labels.float().where(valid, 0)
    total = gains.sum(-1, keepdim=True)
    return gains / total.where(total > 0, 1)


def mean_miss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return 1 - p of Poly1, averaged over the lists; it is zero in a list without a relevant
    document."""
    valid = relevance(labels)
    targets = target_shares(labels, valid)
    probability = (targets * log_softmax(scores, valid).exp()).sum(-1)
    return (1 - probability).where(targets.sum(-1) > 0, 0).mean()


def log_softmax(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute the log-softmax over the valid documents, which is finite for all of them."""
    return scores.float().masked_fill(~valid, torch.finfo(torch.float32).min).log_softmax(-1)


def pairs(scores: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether i is better than j, and how much higher its score is, both (batch, num_docs,
    num_docs)."""
    better = (labels[..., None] > labels[..., None, :]) & valid[..., None] & valid[..., None, :]
    scores = scores.float().where(valid, 0)
    return better, scores[..., None] - scores[..., None, :]


# Losses whose labels are a teacher's scores, of any sign, and not grades.
DISTILLATION_LOSSES = ("margin_mse", "kl")
RANKING_LOSSES = {
    "point_ce": point_ce_loss,
    "pair": pair_loss,
    "softmax": softmax_loss,
    "poly1": poly1_loss,
    "rankt5_softmax": rankt5_softmax_loss,
    "rankt5_poly1": rankt5_poly1_loss,
    "lambdarank": lambdarank_loss,
    "margin_mse": margin_mse_loss,
    "kl": kl_loss,
}
