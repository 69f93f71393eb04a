"""The oracle itself, against the formulas written out."""

import torch

from tst_ext import reference


def test_multi_hot_cross_entropy_is_the_formula():
    logits = torch.randn(2, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 1, 4], [0, -100, 2]])
    nll = -logits.log_softmax(-1)
    w = torch.tensor([1.0, 2.0, 4.0])
    mean = (
        1 * (nll[0, 1] + nll[1, 0]) / 2  # position 1: two rows
        + 2 * nll[0, 1]  # position 2: one row
        + 4 * (nll[0, 4] + nll[1, 2]) / 2
    ) / 7
    total = (1 * (nll[0, 1] + nll[1, 0]) + 2 * nll[0, 1] + 4 * (nll[0, 4] + nll[1, 2])) / 7
    torch.testing.assert_close(reference.multi_hot_cross_entropy(logits, labels, position_weights=w), mean)
    torch.testing.assert_close(
        reference.multi_hot_cross_entropy(logits, labels, position_weights=w, reduction="sum"), total
    )


def test_a_position_without_labels_drops_out():
    logits = torch.randn(2, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100], [0, -100]])
    expected = -(logits.log_softmax(-1)[[0, 1], [1, 0]]).mean()
    torch.testing.assert_close(reference.multi_hot_cross_entropy(logits, labels), expected)


def test_bag_embedding_is_the_formula():
    weight = torch.randn(5, 3, dtype=torch.float64)
    out = reference.bag_embedding(torch.tensor([[1, 1, 4]]), weight)
    torch.testing.assert_close(out[0], (2 * weight[1] + weight[4]) / 3)
