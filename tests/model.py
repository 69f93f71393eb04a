"""A small model with both ops, and its data: shared by the tests of the ops inside torch."""

import torch
from cases import IGNORE, generator
from torch import nn

from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy

VOCABULARY, DIM, BAG = 29, 6, 3


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def tokens(*shape, seed=0, ignored=0.0):
    """Ids below 5 half of the time, so that bags repeat tokens; a share of them `IGNORE`."""
    g = generator(seed)
    ids = torch.randint(VOCABULARY, shape, generator=g)
    ids = torch.where(torch.rand(shape, generator=g) < 0.5, ids % 5, ids)
    return torch.where(torch.rand(shape, generator=g) < ignored, IGNORE, ids)


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
