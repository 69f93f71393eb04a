"""The operations, a file each: public function, autograd Function, and the fake that torch.compile traces.

`tst_ext._load` registers the compiled ops of csrc/ as `torch.ops.tst_ext.*`. The ops of `plain` and `chunked` are
registered below them: the dispatcher prefers a compiled kernel.
"""

import torch

from .. import _load  # noqa: F401  # registers the compiled ops
from . import chunked, flops, plain  # noqa: F401  # flops registers its formulas
from .embedding import bag_embedding
from .linear import linear_multi_hot_cross_entropy
from .logits import multi_hot_cross_entropy

__all__ = ["bag_embedding", "linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"]

IN_PYTHON = (*plain.OPS, chunked.linear_multi_hot_cross_entropy)
for _op in IN_PYTHON:
    torch.library.impl(f"tst_ext::{_op.__name__}", "CompositeExplicitAutograd", _op)
