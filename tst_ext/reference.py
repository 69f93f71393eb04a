"""The maths of the two operations in plain torch with full logits: the oracle of the tests and a peer in benchmarks.

It follows the paper's listings (arXiv 2605.06546), one cross-entropy per bag position over the same logits, except that
a position without a valid label drops out of the mean where the listing gives NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bag_embedding", "multi_hot_cross_entropy"]


def bag_embedding(input_ids: Tensor, weight: Tensor, *, mode: str = "mean") -> Tensor:
    """Mean or sum of the embeddings of each bag: ids `[..., s]`, weight `[V, d]` -> `[..., d]` in weight's dtype.

    Summed in float32 (float64 for float64) and rounded once.
    """
    embedded = F.embedding(input_ids, weight).to(torch.promote_types(weight.dtype, torch.float32))
    return (embedded.mean(-2) if mode == "mean" else embedded.sum(-2)).to(weight.dtype)


def multi_hot_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Multi-hot cross-entropy of full logits `[N, V]` and labels `[N, s]`: a scalar.

    `"mean"`: sum_i w_i m_i / sum_i w_i over the positions i that have a valid label, m_i the mean cross-entropy of
    position i over its valid rows; 0 if no position has one. `"sum"`: the same with sums over rows, and sum_i w_i over
    all positions.
    """
    bag_size = labels.shape[-1]
    if position_weights is None:
        position_weights = torch.ones(bag_size, dtype=torch.float64)
    total = logits[:0].sum(dtype=torch.promote_types(logits.dtype, torch.float32))  # 0, and part of the graph
    weight = 0.0
    for i in range(bag_size):
        w = float(position_weights[i])
        valid = int((labels[:, i] != ignore_index).sum())
        if valid or reduction == "sum":
            weight += w
        if valid and w:
            target = labels[:, i].long()
            total = total + w * F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
    return total / weight if weight else total
