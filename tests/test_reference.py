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


def test_options_are_their_formulas():
    logits = 3 * torch.randn(2, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 1, 4], [0, -100, 2]])
    z = 2 * torch.tanh(logits / 2)
    lse = z.exp().sum(-1).log()
    smooth = (lse[:, None] - z) * 0.9 + 0.1 * (lse - z.mean(-1))[:, None]
    rows = torch.stack(((2 * smooth[0, 1] + smooth[0, 4]) / 3, (smooth[1, 0] + smooth[1, 2]) / 3))
    rows = rows + 0.01 * lse**2 * torch.tensor([3, 2]) / 3
    options = dict(logit_softcap=2.0, label_smoothing=0.1, z_loss=0.01)
    torch.testing.assert_close(reference.multi_hot_cross_entropy(logits, labels, reduction="none", **options), rows)
    torch.testing.assert_close(
        reference.multi_hot_cross_entropy(logits, labels, normalizer=7, **options), 3 * rows.sum() / 7
    )


def test_mce_alt_is_the_formula():
    logits = torch.randn(3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 1, 4], [0, -100, 2], [-100, -100, -100]])
    p = logits.softmax(-1)
    expected = torch.stack((-(p[0, 1] + p[0, 4]).log(), -(p[1, 0] + p[1, 2]).log(), torch.zeros(()).double()))
    rows = reference.multi_hot_cross_entropy(logits, labels, objective="mce_alt", reduction="none")
    torch.testing.assert_close(rows, expected)
    mean = reference.multi_hot_cross_entropy(logits, labels, objective="mce_alt")
    torch.testing.assert_close(mean, expected.sum() / 2)


def test_bag_embedding_options_are_the_formula():
    weight = torch.randn(5, 3, dtype=torch.float64)
    ids, w = torch.tensor([[1, -1, 4], [-1, -1, -1]]), torch.tensor([1.0, 7, 0.5])
    out = reference.bag_embedding(ids, weight, padding_idx=-1, position_weights=w)
    torch.testing.assert_close(out[0], (weight[1] + 0.5 * weight[4]) / 1.5)
    assert not out[1].any()
    out = reference.bag_embedding(ids, weight, padding_idx=-1, position_weights=w, mode="sum")
    torch.testing.assert_close(out[0], weight[1] + 0.5 * weight[4])
