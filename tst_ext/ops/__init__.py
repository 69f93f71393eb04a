"""The operations, a file each: public function, autograd Function, and the fake that torch.compile traces.

Loading `tst_ext._C` registers the compiled ops as `torch.ops.tst_ext.*`; csrc/ has them. Those ops only compute: the
gradient formulas and the normalisation of the loss are here. `plain` and `chunked` hold the ops in Python, which are
registered below them: the dispatcher prefers a compiled kernel where there is one.
"""

import torch

from .._load import _C  # noqa: F401  # registers the compiled ops
from . import chunked, plain
from .embedding import bag_embedding
from .linear import linear_multi_hot_cross_entropy
from .logits import multi_hot_cross_entropy

__all__ = ["bag_embedding", "linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"]

IN_PYTHON = (*plain.OPS, chunked.linear_multi_hot_cross_entropy)
for _op in IN_PYTHON:
    torch.library.impl(f"tst_ext::{_op.__name__}", "CompositeExplicitAutograd", _op)
