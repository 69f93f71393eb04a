"""The ops in plain torch, for devices without a kernel: the formulas of csrc/loss.h, deterministic and slower."""

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._load import NO_CUDA
from .loss import LossOptions


@cache
def _warn(device: str) -> None:
    reason = f" ({NO_CUDA})" if device == "cuda" and NO_CUDA else ""
    warnings.warn(f"tst_ext: no compiled kernel for {device}{reason}, running plain torch", stacklevel=2)


# ---- bag_embedding ----------------------------------------------------------------------------------------------


def _coefficients(
    input_ids: Tensor, dtype: torch.dtype, mode: str, padding_idx: int | None, position_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ids with 0 for `padding_idx`, and each id's weight in its bag, 0 for padding: both `[..., s]`."""
    w = torch.ones_like(input_ids, dtype=dtype)
    if position_weights is not None:
        position_weights = position_weights.to(torch.promote_types(position_weights.dtype, dtype))
        if mode == "mean":  # so that their sum is finite
            position_weights = torch.where(position_weights == 0, 0, position_weights / position_weights.amax())
        w = w * position_weights.to(dtype)
    if padding_idx is not None:
        padded = input_ids == padding_idx
        w, input_ids = w.masked_fill(padded, 0), input_ids.masked_fill(padded, 0)
    if mode == "mean":
        w = torch.where(w == 0, 0, w / w.sum(-1, keepdim=True))
    return input_ids, w


def bag_embedding(
    input_ids: Tensor,
    weight: Tensor,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    _warn(weight.device.type)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    ids, w = _coefficients(input_ids, dtype, mode, padding_idx, position_weights)
    if weight.shape[0] == 0:  # nothing but padding can be read from an empty table
        return weight.new_zeros(*ids.shape[:-1], weight.shape[1])
    rows = torch.nn.functional.embedding(ids, weight).to(dtype)  # [..., s, d]
    w = w.unsqueeze(-1)
    return torch.where(w == 0, 0, w * rows).sum(-2).to(weight.dtype)


def bag_embedding_backward(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    _warn(grad.device.type)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    ids, w = _coefficients(input_ids, dtype, mode, padding_idx, position_weights)
    if num_embeddings == 0:  # torch would add the zeros of padding to a row 0
        return grad.new_zeros(0, grad.shape[-1])
    w = w.unsqueeze(-1)
    rows = torch.where(w == 0, 0, w * grad.to(dtype).unsqueeze(-2))  # [..., s, d]
    return torch.ops.aten.embedding_dense_backward(rows, ids, num_embeddings, -1, False).to(grad.dtype)


# ---- the loss ---------------------------------------------------------------------------------------------------


def capped(x: Tensor, options: LossOptions) -> Tensor:
    """Apply the softcap: z of x."""
    return x if options.logit_softcap is None else options.logit_softcap * torch.tanh(x / options.logit_softcap)


def slope(z: Tensor, options: LossOptions) -> Tensor | int:
    """Return dz / dx."""
    return 1 if options.logit_softcap is None else 1 - (z / options.logit_softcap).square()


def row_loss(options: LossOptions, scale: Tensor, lse: Tensor, fit: Tensor, above_mean: Tensor | int) -> Tensor:
    """Return the loss of each row, `[N]`; `above_mean` is lse less the mean of z."""
    loss = (1 - options.label_smoothing) * fit
    if options.z_loss:
        loss = loss + options.z_loss * scale * lse.square()
    if options.label_smoothing:
        loss = loss + options.label_smoothing * scale * above_mean
    return torch.where(scale == 0, 0, loss)


def row_factors(
    options: LossOptions, scale: Tensor, lse: Tensor, grad_loss: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a row's factors of its softmax, its labels' pulls and smoothing's uniform part: `[N]` each."""
    g = torch.ones_like(scale) if grad_loss is None else grad_loss.to(scale.dtype).expand_as(scale)
    softmax = torch.where(g * scale == 0, 0, g * scale * (1 + 2 * options.z_loss * lse))
    if grad_lse is not None:
        softmax = softmax + grad_lse.to(scale.dtype)
    return softmax, g * (1 - options.label_smoothing), g


def _rows(
    x: Tensor,  # [N, V] raw logits, float32 or float64
    labels: Tensor,  # [N, s]
    label_scale: Tensor,  # [s] or [N, s]
    options: LossOptions,
    grad_loss: Tensor | None,  # [] or [N]
    grad_lse: Tensor | None,  # [N]
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row losses `[N]`, lse `[N]` and, if asked for, the gradient of the logits `[N, V]` (else x)."""
    z = capped(x, options)
    # Differences from the maximum rather than from lse: at logits of 1e4 lse would cost three digits in float32.
    m = z.amax(1, keepdim=True) if z.shape[1] else z.new_zeros(len(z), 1)
    m = torch.where(m == -math.inf, 0, m)  # nothing but -inf: such logits add 0
    exps = (z - m).exp().sum(1, keepdim=True)
    log_sum = exps.log()  # [N, 1]
    lse = (m + log_sum).squeeze(1)
    valid = labels != options.ignore_index
    y = torch.where(valid, labels, 0).long()
    logit = z.gather(1, y) if z.shape[1] else torch.zeros_like(y, dtype=z.dtype)
    same = (y[:, :, None] == y[:, None, :]) & valid[:, None, :]  # [N, s, s]
    leads = valid & ~same.tril(-1).any(-1)  # the first occurrence of a label stands for all
    if options.objective == "mce":
        c = torch.where(valid, label_scale, 0)
        scale = c.sum(1)
        fit = torch.where(c == 0, 0, c * (m - logit + log_sum)).sum(1)
        pull = torch.where(leads, (same * c[:, None, :]).sum(-1), 0)  # [N, s]
    else:
        scale = torch.where(valid.any(1), label_scale[..., 0], 0)
        best = torch.where(leads, logit, -math.inf).amax(1, keepdim=True)
        share = torch.where(leads, torch.where(logit == best, 1, (logit - best).exp()), 0)
        total = share.sum(1, keepdim=True)
        fit = scale * (m - best + log_sum - total.log()).squeeze(1).clamp_min(0)
        pull = torch.where(leads, scale[:, None] * share / total, 0)
    above_mean: Tensor | int = 0
    uniform = torch.zeros_like(z)
    if options.label_smoothing:
        unmasked = z > -math.inf
        columns = unmasked.sum(1)
        above_mean = log_sum.squeeze(1) - torch.where(unmasked, z - m, 0).sum(1) / columns
        uniform = torch.where(unmasked, (options.label_smoothing * scale / columns)[:, None], 0)
    loss = row_loss(options, scale, lse, fit, above_mean)
    if not gradient:
        return loss, lse, x
    softmax, pulls, g = row_factors(options, scale, lse, grad_loss, grad_lse)
    d = softmax[:, None] / exps * (z - m).exp() - g[:, None] * uniform
    pull = pulls[:, None] * pull
    for i in range(y.shape[1]):  # one position at a time: scatter_add_ over duplicates has no fixed order on CUDA
        if z.shape[1]:
            d.scatter_(1, y[:, i, None], d.gather(1, y[:, i, None]) - pull[:, i, None])
    if options.logit_softcap is not None:
        d = d * slope(z, options)
    nothing = (scale == 0) | (g == 0)
    if grad_lse is not None:
        nothing &= grad_lse == 0
    return loss, lse, torch.where(nothing[:, None], 0, d)


def multi_hot_cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    loss: Tensor,
    lse: Tensor,
    *,
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
    gradient: bool = False,
    **options: Any,
) -> None:
    _warn(logits.device.type)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bags = labels.reshape(len(x), label_scale.shape[-1])
    row_loss, row_lse, d = _rows(x, bags, label_scale, LossOptions(**options), grad_loss, grad_lse, gradient)
    loss.copy_(row_loss)
    lse.copy_(row_lse)
    if gradient:
        logits.copy_(d)


def multi_hot_cross_entropy(
    logits: Tensor, labels: Tensor, label_scale: Tensor, *, reduction: str = "sum", **options: Any
) -> tuple[Tensor, Tensor]:
    _warn(logits.device.type)
    x = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    bags = labels.reshape(len(x), label_scale.shape[-1])
    loss, lse, _ = _rows(x, bags, label_scale, LossOptions(**options), None, None, False)
    return loss if reduction == "none" else loss.sum(), lse


def scaled_copy_(out: Tensor, source: Tensor, factor: Tensor) -> None:
    torch.mul(source, factor.reshape(1), out=out)  # [1]: a scalar would be rounded to a 16-bit source's dtype first


OPS = (bag_embedding, bag_embedding_backward, multi_hot_cross_entropy, multi_hot_cross_entropy_rows_, scaled_copy_)
