"""Laws of the ranking losses: values by hand, sentence-transformers' answers, and that padding is not there."""

import math

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses as peers

from modeling_gemma_encoder import RANKING_LOSSES
from modeling_gemma_encoder.losses_gemma_encoder import (
    DISTILLATION_LOSSES,
    kl_loss,
    lambdarank_loss,
    margin_mse_loss,
    pair_loss,
    point_ce_loss,
    poly1_loss,
    rankt5_poly1_loss,
    rankt5_softmax_loss,
    softmax_loss,
)

LN2, LN3 = math.log(2), math.log(3)


class Scores(CrossEncoder):
    """A CrossEncoder, to sentence-transformers' losses, that knows the scores of (list, document)."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores):
        torch.nn.Module.__init__(self)
        self.scores = scores

    def preprocess(self, pairs, **kwargs):
        return {"row": torch.tensor([row for row, _ in pairs]), "column": torch.tensor([column for _, column in pairs])}

    def forward(self, tokens):
        return {"scores": self.scores[tokens["row"], tokens["column"]]}


def peer(loss_class, scores, labels, **options):
    """Their loss, of lists without their padding."""
    documents = [[column for column in range(len(row)) if row[column] != -100] for row in labels]
    kept = [row[row != -100].float() for row in labels]
    return loss_class(Scores(scores), **options)([list(range(len(labels))), documents], kept)


def lists():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, generator=generator) * 3
    labels = torch.tensor([[0, 2, 1, 0, 3], [1, 0, 0, -100, -100], [0, 1, 2, 2, -100]])
    return scores, labels


def number_of_pairs(labels) -> int:
    rows = [row[row != -100] for row in labels]
    return sum(int((row[:, None] > row[None]).sum()) for row in rows)


def test_point_ce_by_hand():
    # Sigmoids 1/2 and 3/4: -ln(1/2) - ln(1/4) = 3 ln 2; a grade of 2 is as relevant as one of 1.
    scores = torch.tensor([[0.0, LN3, 7.0]])
    for grade in (1, 2):
        assert point_ce_loss(scores, torch.tensor([[grade, 0, -100]])).item() == pytest.approx(3 * LN2)


def test_pair_by_hand():
    # Differences ln 3 the right way and the wrong way: ln(1 + 1/3) and ln(1 + 3).
    scores = torch.tensor([[LN3, 0.0]])
    assert pair_loss(scores, torch.tensor([[1, 0]])).item() == pytest.approx(math.log(4 / 3))
    assert pair_loss(scores, torch.tensor([[0, 1]])).item() == pytest.approx(math.log(4))
    assert pair_loss(scores, torch.tensor([[2, 2]])).item() == 0
    # Three grades of equal scores: three pairs, ln 2 each.
    assert pair_loss(torch.zeros(1, 3), torch.tensor([[0, 1, 2]])).item() == pytest.approx(3 * LN2)


def test_poly1_by_hand():
    # Softmax 1/8, 2/8, 5/8. The right one has 2/8: 2 ln 2 + 3/4. Grades 3 and 1: p = 3/4 * 1/8 + 1/4 * 2/8 = 5/32.
    scores = torch.tensor([[1.0, 2.0, 5.0]]).log()
    assert poly1_loss(scores, torch.tensor([[0, 1, 0]])).item() == pytest.approx(2 * LN2 + 0.75)
    assert poly1_loss(scores, torch.tensor([[3, 1, 0]])).item() == pytest.approx(11 / 4 * LN2 + 27 / 32)
    assert rankt5_poly1_loss(scores, torch.tensor([[3, 1, 0]])).item() == pytest.approx(11 * LN2 + 27 / 32)
    assert poly1_loss(scores, torch.tensor([[0, 0, 0]])).item() == 0
    assert poly1_loss(scores, torch.tensor([[0, 1, 0]]), epsilon=2.0).item() == pytest.approx(2 * LN2 + 1.5)


@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0, 0, 0], [3, 3, 2, 0, 0, 1, 0, 2], [1] * 8, [0.25, 0.5] + [0] * 6])
def test_a_list_of_equal_scores_costs_the_same_whatever_its_grades(grades):
    # Of eight equal scores each has softmax 1/8: ln 8, and Poly1 another 1 - 1/8.
    labels = torch.tensor([grades])
    assert softmax_loss(torch.zeros(1, 8), labels).item() == pytest.approx(math.log(8))
    assert poly1_loss(torch.zeros(1, 8), labels).item() == pytest.approx(math.log(8) + 7 / 8)
    # The paper's form weighs a list by its sum of grades.
    assert rankt5_softmax_loss(torch.zeros(1, 8), labels).item() == pytest.approx(sum(grades) * math.log(8))


def test_softmax_is_cross_entropy_against_the_shares_of_the_grades():
    scores, labels = torch.randn(4, 8), torch.randint(1, 4, (4, 8)).float()
    expected = torch.nn.functional.cross_entropy(scores, labels / labels.sum(-1, keepdim=True))
    torch.testing.assert_close(softmax_loss(scores, labels), expected)
    torch.testing.assert_close(softmax_loss(scores, 10 * labels), expected)


@pytest.mark.parametrize("ours,papers", [(softmax_loss, rankt5_softmax_loss), (poly1_loss, rankt5_poly1_loss)])
def test_one_relevant_document_has_the_papers_loss_to_the_bit(ours, papers):
    generator = torch.Generator()
    labels = torch.tensor([[0, 0, 1, 0], [1, 0, 0, -100], [0, 0, 0, 0]])
    found = []
    for loss in (ours, papers):
        scores = torch.randn(3, 4, generator=generator.manual_seed(0)).requires_grad_()
        loss(scores, labels).backward()
        found.append((loss(scores, labels), scores.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_lambdarank_by_hand():
    # Ranked: irrelevant, relevant. maxDCG = 1, |G| = 1, |1 - 1/log2(3)| ln(1 + 3).
    scores = torch.tensor([[LN3, 0.0]])
    weight = 1 - 1 / math.log2(3)
    assert lambdarank_loss(scores, torch.tensor([[0, 1]])).item() == pytest.approx(weight * math.log(4))
    assert lambdarank_loss(scores, torch.tensor([[1, 0]])).item() == pytest.approx(weight * math.log(4 / 3))


def test_margin_mse_by_hand():
    # Our margins 1, 3, 2; the teacher's 2, 2, 0: squares 1, 1, 4, mean 2.
    scores, teacher = torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    assert margin_mse_loss(scores, teacher).item() == pytest.approx(2)
    assert margin_mse_loss(scores, scores - 5).item() == pytest.approx(0, abs=1e-6)  # margins alone count
    assert margin_mse_loss(scores[:, :1], teacher[:, :1]).item() == 0


def test_kl_by_hand():
    # p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2).
    loss = kl_loss(torch.zeros(1, 2), torch.tensor([[0.0, LN3]]))
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[-3.0, -2.0]])).item() == pytest.approx(0, abs=1e-6)


def test_pair_and_lambdarank_are_those_of_sentence_transformers():
    """Theirs are averaged over pairs, ours summed in a list and averaged over lists."""
    scores, labels = lists()
    share = number_of_pairs(labels) / len(labels)
    theirs = peer(peers.RankNetLoss, scores, labels, reduction_log="natural")
    assert pair_loss(scores, labels).item() == pytest.approx(theirs.item() * share, rel=1e-5)
    scheme = peers.LambdaRankScheme()
    theirs = peer(peers.LambdaLoss, scores, labels, weighting_scheme=scheme, reduction_log="natural")
    assert lambdarank_loss(scores, labels).item() == pytest.approx(theirs.item() * share, rel=1e-5)


def test_kl_is_list_net_without_its_constant():
    scores, labels = lists()
    theirs = peer(peers.ListNetLoss, scores, labels)
    log_p = torch.stack([row.where(row != -100, -torch.inf).float().log_softmax(-1) for row in labels])
    entropy = -(log_p.exp() * log_p.where(labels != -100, 0)).sum(-1).mean()
    assert kl_loss(scores, labels).item() == pytest.approx((theirs - entropy).item(), rel=1e-5)


def test_softmax_with_one_positive_is_list_net_of_a_certain_teacher():
    scores, labels = torch.randn(2, 4), torch.tensor([[0, 1, 0, 0], [1, 0, 0, -100]])
    theirs = peer(peers.ListNetLoss, scores, labels.where(labels < 1, 1000))
    assert softmax_loss(scores, labels).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_margin_mse_of_two_documents_is_that_of_sentence_transformers():
    scores, teacher = torch.randn(4, 2), torch.randn(4, 2)
    loss = peers.MarginMSELoss(Scores(scores))
    theirs = loss([list(range(4)), [0] * 4, [1] * 4], teacher[:, 0] - teacher[:, 1])
    assert margin_mse_loss(scores, teacher).item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_padding_a_list_changes_neither_loss_nor_gradient(name):
    loss = RANKING_LOSSES[name]
    scores, labels = torch.randn(2, 4, requires_grad=True), torch.tensor([[1.0, 0, 2, 0], [0, 0, 1, 3]])
    expected = loss(scores, labels)
    expected.backward()
    for filler in (1e4, -1e4, 0.0):
        padded = torch.cat([torch.full((2, 1), filler), scores.detach(), torch.full((2, 2), filler)], 1)
        padded.requires_grad_()
        ignore = torch.full((2, 1), -100.0)
        found = loss(padded, torch.cat([ignore, labels, ignore, ignore], 1))
        found.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(padded.grad[:, 1:-2], scores.grad)
        assert not padded.grad[:, [0, -2, -1]].any()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_lists_of_nothing_are_zero(name):
    scores = torch.randn(2, 3, requires_grad=True)
    loss = RANKING_LOSSES[name](scores, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("name", [name for name in RANKING_LOSSES if name not in ("point_ce", "margin_mse", "kl")])
def test_a_list_without_a_positive_teaches_nothing(name):
    scores = torch.randn(1, 3, requires_grad=True)
    loss = RANKING_LOSSES[name](scores, torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_scores_far_apart_and_bf16_are_finite_and_fp32(name):
    scores = torch.tensor([[200.0, -200.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = RANKING_LOSSES[name](scores, torch.tensor([[0, 1, 2]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_training_on_one_list_ranks_it(name):
    scores, labels = torch.zeros(1, 4, requires_grad=True), torch.tensor([[0.0, 3.0, 1.0, 0.0]])
    with torch.no_grad():
        scores += torch.tensor([[0.3, 0.0, 0.1, 0.2]])
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        RANKING_LOSSES[name](scores, labels).backward()
        optimizer.step()
    assert min(scores[0, 1], scores[0, 2]) > max(scores[0, 0], scores[0, 3])


@pytest.mark.parametrize("name", [name for name in RANKING_LOSSES if name not in DISTILLATION_LOSSES])
def test_negative_relevance_is_refused_but_a_teacher_may_give_it(name):
    with pytest.raises(ValueError, match="`labels` must be 0 or more, or -100"):
        RANKING_LOSSES[name](torch.zeros(1, 2), torch.tensor([[-1, 1]]))
