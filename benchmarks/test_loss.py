"""Loss forward and backward beside plain torch, over three bare GEMMs in chunks of 512 rows."""

from functools import cache

import pytest
import torch
from conftest import DEVICE, seconds, zipf_ids

from tst_ext import linear_multi_hot_cross_entropy, reference

SHAPES = [(2048, 512, 32768), (1024, 1024, 128256)]  # rows, d, V


@cache
def tensors(rows, dim, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocabulary, dim, generator=generator) / dim**0.5).to(DEVICE, dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


@cache
@torch.no_grad()
def three_gemms(shape, dtype):
    hidden, weight = tensors(*shape, dtype)
    rows = min(512, len(hidden))
    logits = torch.empty(rows, len(weight), dtype=dtype, device=DEVICE)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def run():
        for start in range(0, len(hidden), rows):
            h = hidden[start : start + rows]
            torch.mm(h, weight.T, out=logits)
            torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            torch.addmm(grad_weight, logits.T, h, out=grad_weight)

    return seconds(run)


def listing(hidden, weight, labels):
    return reference.multi_hot_cross_entropy(hidden @ weight.T, labels)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bag_size", [1, 4, 16])
@pytest.mark.parametrize("loss", [linear_multi_hot_cross_entropy, listing], ids=["tst_ext", "paper_listing"])
def test_forward_backward(measure, loss, bag_size, shape):
    dtype = torch.float32
    hidden, weight = tensors(*shape, dtype)
    labels = zipf_ids((shape[0], bag_size), shape[2])

    def step():
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    measure(step, three_gemms(shape, dtype), dtype="float32", s=bag_size)
