"""The ops in plain torch, for tensors on a device that this build has no kernel for. Chunked, deterministic, slower.

Importing this module registers them: the dispatcher prefers a compiled kernel where there is one.
"""

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference

__all__: list[str] = []


@cache
def _warn(op: str, device: str) -> None:
    warnings.warn(f"tst_ext.{op}: no compiled kernel for {device} in this build, running plain torch", stacklevel=2)


def bag_embedding(input_ids: Tensor, weight: Tensor, mode: str) -> Tensor:
    _warn("bag_embedding", weight.device.type)
    return reference.bag_embedding(input_ids, weight, mode=mode)


def bag_embedding_backward(grad: Tensor, input_ids: Tensor, num_embeddings: int, mode: str) -> Tensor:
    _warn("bag_embedding", grad.device.type)
    rows = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if mode == "mean":
        rows = rows / input_ids.shape[-1]
    rows = rows.unsqueeze(-2).expand(*input_ids.shape, grad.shape[-1])
    out = torch.ops.aten.embedding_dense_backward(rows, input_ids, num_embeddings, -1, False)
    return out.to(grad.dtype)


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    grad_hidden: bool = False,
    grad_weight: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _warn("linear_multi_hot_cross_entropy", hidden.device.type)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    compute = dtype if hidden.dtype == torch.float16 else hidden.dtype  # as the CPU kernel, and for its reasons
    h = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]).to(compute)
    weight = weight.to(compute)
    rows, vocabulary = len(h), len(weight)
    y = labels.reshape(rows, -1).long() if rows else labels.new_zeros(0, 1).long()
    valid = y != ignore_index  # [N, s]
    y = torch.where(valid, y, 0)
    w = torch.ones(y.shape[1], dtype=dtype, device=h.device) if position_weights is None else position_weights.to(dtype)
    if not bool(((w >= 0) & w.isfinite()).all()):
        raise ValueError(f"position_weights: expected finite weights >= 0, got {w.tolist()}")
    w = w / w.max().clamp_min(torch.finfo(dtype).tiny)  # so that their sum is finite too
    count = valid.sum(0) if reduction == "mean" else torch.ones_like(w)
    used = torch.where(count > 0, w, 0)
    # [s], as csrc/cpu/linear_multi_hot_cross_entropy.cpp has it; 0 where nothing is valid
    scale = torch.nan_to_num(used / (used.sum() * count), nan=0.0)
    coefficients = torch.where(valid, scale, 0)  # [N, s]

    loss, lse = torch.empty(rows, dtype=dtype, device=h.device), torch.empty(rows, dtype=dtype, device=h.device)
    dh = hidden.new_zeros(h.shape if grad_hidden else (0,), dtype=dtype)
    dw = weight.new_zeros(weight.shape if grad_weight else (0,), dtype=dtype)
    step = chunk_size or max(1, (64 << 20) // (4 * max(1, vocabulary)), min(rows // 8, 512))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        z = (h[part] @ weight.T).to(dtype)
        lse[part] = z.logsumexp(-1)
        nll = lse[part, None] - z.gather(1, y[part])
        loss[part] = torch.where(coefficients[part] > 0, coefficients[part] * nll, 0).sum(-1)
        if not (grad_hidden or grad_weight):
            continue
        total = coefficients[part].sum(-1, keepdim=True)
        z = torch.where(total > 0, z.sub_(lse[part, None]).exp_().mul_(total), 0)
        for i in range(y.shape[1]):  # one position at a time: scatter_add_ over duplicates has no fixed order on CUDA
            z.scatter_(1, y[part, i, None], z.gather(1, y[part, i, None]) - coefficients[part, i, None])
        z = z.to(compute)
        if grad_hidden:
            dh[part] = (z @ weight).to(dtype)
        if grad_weight:
            dw += (z.T @ h[part]).to(dtype)
    return loss.sum(), lse, dh.view_as(hidden) if grad_hidden else dh, dw, weight.new_empty(0, dtype=dtype)


for _op in (bag_embedding, bag_embedding_backward, linear_multi_hot_cross_entropy):
    torch.library.impl(f"tst_ext::{_op.__name__}", "CompositeExplicitAutograd", _op)
