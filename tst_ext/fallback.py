"""The ops in plain torch, for tensors on a device that this build has no kernel for. Chunked, deterministic, slower.

Importing this module registers them: the dispatcher prefers a compiled kernel where there is one. The formulas are
those of csrc/cpu/kernels.h. linear_multi_hot_cross_entropy is here for CUDA too, and for vocab_parallel: GEMMs, and
between them a row pass that has a kernel. The loop is in Python because torch's stable ABI cannot pass the Scalars of
aten::addmm.dtype_out, the GEMM that adds to a float32 gradient.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


@cache
def _warn(op: str, device: str) -> None:
    warnings.warn(f"tst_ext.{op}: no compiled kernel for {device} in this build, running plain torch", stacklevel=2)


# ---- bag_embedding ----------------------------------------------------------------------------------------------


def _coefficients(
    input_ids: Tensor, dtype: torch.dtype, mode: str, padding_idx: int | None, position_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids with 0 for `padding_idx`, and what each id's row counts in its bag, 0 for those: both `[..., s]`."""
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
    _warn("bag_embedding", weight.device.type)
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
    _warn("bag_embedding", grad.device.type)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    ids, w = _coefficients(input_ids, dtype, mode, padding_idx, position_weights)
    w = w.unsqueeze(-1)
    rows = torch.where(w == 0, 0, w * grad.to(dtype).unsqueeze(-2))  # [..., s, d]
    return torch.ops.aten.embedding_dense_backward(rows, ids, num_embeddings, -1, False).to(grad.dtype)


# ---- the loss ---------------------------------------------------------------------------------------------------


def _rows(
    x: Tensor,  # [N, V] raw logits, float32 or float64
    labels: Tensor,  # [N, s]
    position_scale: Tensor,  # [s]
    grad_loss: Tensor | None,  # [] or [N]
    grad_lse: Tensor | None,  # [N]
    gradient: bool,
    *,
    objective: str = "mce",
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses `[N]`, lse `[N]` and, if asked for, the gradient of the logits `[N, V]` (else x)."""
    z = x if logit_softcap is None else logit_softcap * torch.tanh(x / logit_softcap)
    # Differences from the maximum rather than from lse: at logits of 1e4 lse would cost three digits in float32.
    m = z.amax(1, keepdim=True) if z.shape[1] else z.new_zeros(len(z), 1)
    m = torch.where(m == -math.inf, 0, m)  # nothing but -inf: such logits add 0
    exps = (z - m).exp().sum(1, keepdim=True)
    log_sum = exps.log()  # [N, 1]
    lse = (m + log_sum).squeeze(1)
    valid = labels != ignore_index
    y = torch.where(valid, labels, 0).long()
    logit = z.gather(1, y) if z.shape[1] else torch.zeros_like(y, dtype=z.dtype)
    same = (y[:, :, None] == y[:, None, :]) & valid[:, None, :]  # [N, s, s]
    leads = valid & ~same.tril(-1).any(-1)  # the first occurrence of a label stands for all
    if objective == "mce":
        c = torch.where(valid, position_scale, 0)
        scale = c.sum(1)
        fit = torch.where(c == 0, 0, c * (m - logit + log_sum)).sum(1)
        pull = torch.where(leads, (same * c[:, None, :]).sum(-1), 0)  # [N, s]
    else:
        scale = torch.where(valid.any(1), position_scale[0], 0)
        best = torch.where(leads, logit, -math.inf).amax(1, keepdim=True)
        share = torch.where(leads, torch.where(logit == best, 1, (logit - best).exp()), 0)
        total = share.sum(1, keepdim=True)
        fit = scale * (m - best + log_sum - total.log()).squeeze(1).clamp_min(0)
        pull = torch.where(leads, scale[:, None] * share / total, 0)
    loss = (1 - label_smoothing) * fit
    if z_loss:
        loss = loss + z_loss * scale * lse.square()
    uniform = torch.zeros_like(z)
    if label_smoothing:
        unmasked = z > -math.inf
        columns = unmasked.sum(1)
        below = torch.where(unmasked, z - m, 0).sum(1) / columns
        loss = loss + label_smoothing * scale * (log_sum.squeeze(1) - below)
        uniform = torch.where(unmasked, (label_smoothing * scale / columns)[:, None], 0)
    loss = torch.where(scale == 0, 0, loss)
    if not gradient:
        return loss, lse, x
    g = torch.ones_like(lse) if grad_loss is None else grad_loss.to(lse.dtype).expand_as(lse)
    u = torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)
    factor = (g * scale * (1 + 2 * z_loss * lse) + u)[:, None] / exps
    d = factor * (z - m).exp() - g[:, None] * uniform
    pull = g[:, None] * (1 - label_smoothing) * pull
    for i in range(y.shape[1]):  # one position at a time: scatter_add_ over duplicates has no fixed order on CUDA
        if z.shape[1]:
            d.scatter_(1, y[:, i, None], d.gather(1, y[:, i, None]) - pull[:, i, None])
    if logit_softcap is not None:
        d = d * (1 - (z / logit_softcap).square())
    nothing = ((scale == 0) | (g == 0)) & (u == 0)
    return loss, lse, torch.where(nothing[:, None], 0, d)


def _as_a_kernel(op: Callable[..., Any]) -> Callable[..., Any]:
    """Neither autocast, which has cast the arguments and must not cast what is computed in float32, nor a graph."""

    @torch.no_grad()
    @wraps(op)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return op(x, *args, **kwargs)

    return wrapper


def _add_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b: out float32 or of the operands' dtype."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif _multiplies_to_float32(a.dtype, a.device):
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


@cache
def _multiplies_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch multiplies matrices of `dtype` into a float32 result there: no rounding before the sum."""
    a, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.mm.dtype_out(a, a, out.dtype, out=out)
        torch.ops.aten.addmm.dtype_out(out, a, a, out.dtype, out=out)
    except torch.OutOfMemoryError:
        raise  # says nothing about the GEMMs
    except RuntimeError as error:
        if device.type == "cuda":
            warnings.warn(
                f"tst_ext: no {dtype} GEMM of this torch has a float32 result, so gradients take longer: {error}",
                stacklevel=2,
            )
        return False
    return True


def padded_columns(vocabulary: int, bias: bool = False) -> int:
    """Columns of a row of logits with its padding: 128 bytes of bfloat16, since an odd one can halve a GEMM's speed.

    With a bias there is none: torch's GEMM for CUDA would round the product before it adds the bias.
    """
    return vocabulary if bias else -(-vocabulary // 64) * 64


def cuda_chunk_rows(vocabulary: int, element_size: int, memory: int) -> int:
    """Rows of a chunk on a CUDA device of `memory` bytes: those whose logits take a 32nd of it, 2048 to 8192.

    The float32 sum of the weight's gradient is read and written once a chunk. On an H200 with 128256 columns and d =
    2048, 2048 rows take 4 % longer than 8192, 4096 rows 1.5 %, and 16384 take 1 % less.
    """
    return min(max(memory // 32 // (element_size * max(1, vocabulary)) // 1024 * 1024, 2048), 8192)


def _chunk_rows(rows: int, vocabulary: int, element_size: int, device: torch.device) -> int:
    if device.type == "cuda":
        return cuda_chunk_rows(vocabulary, element_size, torch.cuda.get_device_properties(device).total_memory)
    return max(1, (64 << 20) // (element_size * max(1, vocabulary)), min(rows // 8, 512))


@_as_a_kernel
def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    position_scale: Tensor,
    *,
    bias: Tensor | None = None,
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
    reduction: str = "sum",
    chunk_size: int | None = None,
    grad_hidden: bool = False,
    grad_weight: bool = False,
    grad_bias: bool = False,
    row_pass: Callable[..., None] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_pass = row_pass or torch.ops.tst_ext.multi_hot_cross_entropy_rows_
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    compute = dtype if hidden.dtype == torch.float16 else hidden.dtype  # as the CPU kernel, and for its reasons
    h = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]).to(compute)  # [N, d]
    w = weight.to(compute)
    bias = None if bias is None else bias.to(compute).contiguous()
    (rows, dim), vocabulary = h.shape, len(w)
    y = labels.reshape(rows, len(position_scale))
    loss, lse = (h.new_empty(rows, dtype=dtype) for _ in range(2))
    dh = hidden.new_empty((rows, dim) if grad_hidden else (0,), dtype=dtype)
    dw = weight.new_empty((vocabulary, dim) if grad_weight else (0,), dtype=dtype)
    db = weight.new_empty(vocabulary if grad_bias else 0, dtype=dtype)
    if rows == 0:
        dw.zero_(), db.zero_()
    most = chunk_size or _chunk_rows(rows, vocabulary, h.element_size(), h.device)
    chunk = -(-rows // max(1, -(-rows // most)))  # equal parts
    padded = h.new_empty(chunk, padded_columns(vocabulary, bias is not None))
    padded[:, vocabulary:] = 0  # torch's bfloat16 GEMM on CPUs with AMX reads them: a NaN there would not stay there
    buffer = padded[:, :vocabulary]
    for start in range(0, rows, max(1, chunk)):
        part = slice(start, start + chunk)
        z = buffer[: len(h[part])]
        if bias is None:
            torch.mm(h[part], w.T, out=z)
        else:
            torch.addmm(bias, h[part], w.T, out=z)
        row_pass(
            z,
            y[part],
            position_scale,
            loss[part],
            lse[part],
            grad_loss=grad_loss if grad_loss is None or grad_loss.dim() == 0 else grad_loss[part],
            grad_lse=None if grad_lse is None else grad_lse[part],
            gradient=grad_hidden or grad_weight or grad_bias,
            **options,
        )
        if grad_hidden:
            _add_product(dh[part], z, w, False)
        if grad_weight:
            _add_product(dw, z.T, h[part], start > 0)
        if grad_bias:
            column_sums = z.sum(0, dtype=dtype)
            db.copy_(column_sums if start == 0 else db + column_sums)
    total = loss if reduction == "none" else loss.sum()
    return total, lse, dh.view_as(hidden) if grad_hidden else dh, dw, db


def multi_hot_cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    position_scale: Tensor,
    loss: Tensor,
    lse: Tensor,
    *,
    gradient: bool = False,
    **options: Any,
) -> None:
    _warn("linear_multi_hot_cross_entropy", logits.device.type)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    grad_loss, grad_lse = options.pop("grad_loss", None), options.pop("grad_lse", None)
    row_loss, row_lse, d = _rows(x, labels, position_scale, grad_loss, grad_lse, gradient, **options)
    loss.copy_(row_loss)
    lse.copy_(row_lse)
    if gradient:
        logits.copy_(d)


def multi_hot_cross_entropy(
    logits: Tensor, labels: Tensor, position_scale: Tensor, *, reduction: str = "sum", **options: Any
) -> tuple[Tensor, Tensor]:
    _warn("multi_hot_cross_entropy", logits.device.type)
    x = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    loss, lse, _ = _rows(x, labels.reshape(len(x), len(position_scale)), position_scale, None, None, False, **options)
    return loss if reduction == "none" else loss.sum(), lse


def multi_hot_cross_entropy_backward_(
    logits: Tensor,
    labels: Tensor,
    position_scale: Tensor,
    *,
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **options: Any,
) -> None:
    _warn("multi_hot_cross_entropy", logits.device.type)
    x = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = labels.reshape(len(x), len(position_scale))
    logits.copy_(_rows(x, y, position_scale, grad_loss, grad_lse, True, **options)[2].view_as(logits))


def scaled_copy_(out: Tensor, source: Tensor, factor: Tensor) -> None:
    torch.mul(source, factor, out=out)


OPS = (
    bag_embedding,
    bag_embedding_backward,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_backward_,
    multi_hot_cross_entropy_rows_,
    scaled_copy_,
)
for _op in OPS:
    torch.library.impl(f"tst_ext::{_op.__name__}", "CompositeExplicitAutograd", _op)
