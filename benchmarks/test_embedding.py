"""Bag embedding forward and backward beside torch's ways, over the bytes it must move at this machine's copy speed."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, seconds, zipf_ids

from tst_ext import bag_embedding, reference

VOCABULARY, DIM, BAG_SIZE, BAGS = 128256, 1024, 6, 4096


def embedding_bag(ids, weight):
    return F.embedding_bag(ids, weight, mode="mean")


@cache
def bytes_moved_at_copy_speed():
    """Forward: read s rows, write one per bag. Backward: read a row per hit, write the whole fresh table gradient."""
    row = DIM * 4
    forward = (BAG_SIZE + 1) * BAGS * row
    backward = BAG_SIZE * BAGS * row
    source, target = torch.ones(2, 64 << 20, device=DEVICE)
    copy = seconds(lambda: target.copy_(source)) / (2 * source.numel() * 4)  # seconds a byte, reads and writes alike
    fresh = seconds(lambda: torch.zeros(VOCABULARY, DIM, device=DEVICE))  # page faults of a new gradient included
    return (forward + backward) * copy + fresh


@pytest.mark.parametrize(
    "embed",
    [bag_embedding, embedding_bag, reference.bag_embedding],
    ids=["tst_ext", "F.embedding_bag", "gather_and_mean"],
)
def test_forward_backward(measure, embed):
    weight = torch.randn(VOCABULARY, DIM, device=DEVICE, requires_grad=True)
    ids = zipf_ids((BAGS, BAG_SIZE), VOCABULARY)
    grad = torch.randn(BAGS, DIM, device=DEVICE)

    def step():
        weight.grad = None
        embed(ids, weight).backward(grad)

    measure(step, bytes_moved_at_copy_speed(), dtype="float32", s=BAG_SIZE)
