"""A small model with both ops, its data and its options: shared by the tests of the ops inside torch."""

import pytest
import torch
from torch import nn

from helpers.cases import IGNORE, generator
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy

VOCABULARY, DIM, BAG = 29, 6, 3


def normal(*shape, dtype=torch.float32, seed=0):
    numbers = torch.randn(shape, dtype=torch.float64, generator=generator(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def tokens(*shape, seed=0, ignored=0.0):
    """Ids below 5 half of the time, so that bags repeat tokens; a share of them `IGNORE`."""
    g = generator(seed)
    ids = torch.randint(VOCABULARY, shape, generator=g, device="cpu")
    ids = torch.where(torch.rand(shape, generator=g, device="cpu") < 0.5, ids % 5, ids)
    ids = torch.where(torch.rand(shape, generator=g, device="cpu") < ignored, IGNORE, ids)
    return ids.to(torch.get_default_device())


def batch(rows=4, length=2, seed=0):
    return tokens(rows, length, BAG, seed=seed, ignored=0.1), tokens(rows, length, BAG, seed=seed + 100, ignored=0.2)


def leaves(*tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


class Model(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32, **options):
        super().__init__()
        self.embedding = BagEmbedding(VOCABULARY, DIM, padding_idx=IGNORE, position_weights="power_law", dtype=dtype)
        self.body = nn.Linear(DIM, DIM, dtype=dtype)
        self.head = LinearMultiHotCrossEntropy(DIM, VOCABULARY, dtype=dtype, **options)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=seed + i))

    def forward(self, ids, labels, **options):
        return self.head(torch.relu(self.body(self.embedding(ids))), labels, **options)


def assert_equal(left, right):
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{i}: off by {(a.double() - b.double()).abs().max()}"


def step(model, ids, labels, upstream):
    """A scalar of whatever the model returns; lse and z_loss count as well, with weights of their own."""
    results = model(ids, labels)
    results = results if isinstance(results, tuple) else (results,)
    return sum(((i + 1) * upstream[: r.shape[0]] * r if r.dim() else 1.5 * r).sum() for i, r in enumerate(results))


def loss_and_gradients(function, model, *arguments):
    loss = function(model, *arguments)
    return loss.detach(), *torch.autograd.grad(loss, tuple(model.parameters()))


OPTIONS = {
    "plain": {},
    "bias": dict(bias=True),
    "everything": dict(bias=True, z_loss=1e-2, logit_softcap=5.0, label_smoothing=0.1),
    "mce_alt": dict(objective="mce_alt", bias=True, reduction="sum", chunk_size=3),
    "none": dict(bias=True, reduction="none", z_loss=1e-2),
    "lse": dict(bias=True, return_lse=True),
    "lse_and_z_loss": dict(z_loss=1e-2, return_lse=True, return_z_loss=True),
    "none_lse": dict(reduction="none", return_lse=True, logit_softcap=5.0),
    "position_weights": dict(position_weights="power_law", normalizer=17),
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
