"""Laws of the losses: values worked out by hand, and -100 is as if it were not there."""

import math

import pytest
import torch

from modeling_gemma_encoder.losses_gemma_encoder import CLASSIFICATION_LOSSES, rankt5_softmax_loss, softmax_loss

LN2 = math.log(2)


def test_softmax_loss_by_hand():
    # Scores ln 1, ln 2, ln 5 have softmax 1/8, 2/8, 5/8.
    scores = torch.tensor([[1.0, 2.0, 5.0]]).log()
    assert softmax_loss(scores, torch.tensor([[0, 1, 0]])).item() == pytest.approx(2 * LN2)
    # Grades are shares: 3/4 * ln 8 + 1/4 * ln 4 = 11/4 ln 2; the paper's weigh: 3 * ln 8 + 1 * ln 4.
    assert softmax_loss(scores, torch.tensor([[3, 1, 0]])).item() == pytest.approx(11 / 4 * LN2)
    assert rankt5_softmax_loss(scores, torch.tensor([[3, 1, 0]])).item() == pytest.approx(11 * LN2)
    # The third document is not there: softmax 1/3, 2/3.
    assert softmax_loss(scores, torch.tensor([[1.0, 0, -100]])).item() == pytest.approx(math.log(3))
    # The mean over two lists; the one without a positive adds nothing.
    lists = torch.cat([scores, scores])
    assert softmax_loss(lists, torch.tensor([[0, 1, 0], [0, 0, -100]])).item() == pytest.approx(LN2)


def test_padding_a_list_changes_neither_loss_nor_gradient():
    scores = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([[1, 0, 2], [0, 0, 1]])
    softmax_loss(scores, labels).backward()
    padded = torch.cat([scores.detach(), torch.full((2, 2), 1e4)], 1).requires_grad_()
    loss = softmax_loss(padded, torch.cat([labels, torch.full((2, 2), -100)], 1))
    loss.backward()
    torch.testing.assert_close(padded.grad, torch.cat([scores.grad, torch.zeros(2, 2)], 1))


def test_lists_of_nothing_are_zero():
    scores = torch.randn(2, 3, requires_grad=True)
    loss = softmax_loss(scores, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 and scores.grad.abs().sum() == 0


def test_negative_relevance_is_refused():
    with pytest.raises(ValueError, match="`labels` must be 0 or more, or -100"):
        softmax_loss(torch.zeros(1, 2), torch.tensor([[-1, 1]]))


def test_classification_losses_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, -5.0]])
    assert CLASSIFICATION_LOSSES["single_label_classification"](
        logits, torch.tensor([0, -100])
    ).item() == pytest.approx(2 * LN2)
    # Sigmoids 1/2 and 3/4: -ln(1/2) - ln(1/4) = 3 ln 2.
    labels = torch.tensor([[1.0, 0.0], [-100, -100]])
    assert CLASSIFICATION_LOSSES["multi_label_classification"](logits, labels).item() == pytest.approx(3 * LN2)
    assert CLASSIFICATION_LOSSES["regression"](torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, -100])).item() == 4
    # In units of the standard deviations 2 and 10: errors of 3 and -5 are 1.5 and -0.5.
    numbers, std = torch.tensor([[7.0, 95.0], [1.0, 1.0]]), torch.tensor([2.0, 10.0])
    labels = torch.tensor([[4.0, 100.0], [-100, -100]])
    assert CLASSIFICATION_LOSSES["regression"](numbers, labels, std).item() == pytest.approx(2.25 + 0.25)


def test_losses_are_fp32():
    logits = torch.tensor([[20.0, 20.0]], dtype=torch.bfloat16)
    for name, loss in CLASSIFICATION_LOSSES.items():
        labels = torch.tensor([1]) if name.startswith("single") else torch.ones(1, 2)
        assert loss(logits, labels).dtype == torch.float32
    assert softmax_loss(logits, torch.ones(1, 2)).dtype == torch.float32
