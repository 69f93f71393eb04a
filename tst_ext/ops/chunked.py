"""linear_multi_hot_cross_entropy as a loop over chunks of rows: a GEMM for the logits, a row pass, two GEMMs.

It serves CUDA, devices without kernels, and a head divided over processes. It is in Python because torch's stable ABI
cannot pass the Scalars of aten::addmm.dtype_out, the GEMM that adds to a float32 gradient.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .._load import _C
from .loss import LossOptions


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    *,
    chunk_size: int | None = None,
    **keywords: Any,  # the others of the schema
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = {name: keywords.pop(name) for name in LossOptions._fields if name in keywords}
    row_pass = partial(torch.ops.tst_ext.multi_hot_cross_entropy_rows_, **options)
    if chunk_size is None:
        element = compute_dtype(hidden.dtype, hidden.device).itemsize
        columns = weight.shape[1] if keywords.get("grad_weight") else 0
        chunk_size = chunk_rows(math.prod(hidden.shape[:-1]), len(weight), element, hidden.device, columns)
    dtype = gradient_dtype(hidden.dtype, hidden.device)
    return in_chunks(row_pass, chunk_size, hidden, weight, labels, label_scale, grad_dtype=dtype, **keywords)


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the op's gradients of hidden states of `dtype`, and of the weight.

    float32 gradients wait for the upstream gradient before their last rounding, but for bfloat16 only on the CPU:
    writing and rounding them took 0.9 of 46 ms on an H200 (8192 rows, d = 4096, V = 151936), and twice the memory.
    float16 gradients would underflow before the scale of the loss multiplies them.
    """
    if dtype == torch.bfloat16 and device.type != "cpu":
        return dtype
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the GEMMs and of the logits for hidden states of `dtype`, as the CPU kernel has it.

    float16 would underflow. bfloat16 products of a CPU without bfloat16 instructions take 4 to 25 times as long.
    """
    slow = dtype == torch.bfloat16 and device.type == "cpu" and not _C.cpu_bfloat16_gemms()
    return torch.float32 if slow or dtype == torch.float16 else dtype


def chunk_rows(
    rows: int, vocabulary: int | None, element_size: int, device: torch.device, gradient_columns: int = 0
) -> int:
    """Return the most rows of a chunk; elsewhere than on CUDA by the rule of the CPU kernel.

    `gradient_columns` is d if the weight's gradient `[V, d]` is wanted, else 0. Half of it takes d / 2 rows of logits.

    Each chunk but the first reads and writes the float32 sum of the weight's gradient once. On an H100 the whole batch
    takes 2 % less than two chunks at 16384 rows, d = 2048 and V = 128256, and 1 % less at 32768, 1024 and 49152. Chunks
    of 4096 rows take 4 to 6 % longer than one, of 2048 rows 7 to 15 %. Chunks of 2^31 logits were never tried.
    """
    if vocabulary is None:  # of a divided head: all processes need the same number of chunks, and so of exchanges
        return 8192 if device.type == "cuda" else 512
    row = element_size * max(1, vocabulary)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        most = min(memory // 16 // row, (1 << 31) // padded_columns(vocabulary, False) - 1)
        return max(most // 1024 * 1024, 2048)
    return max(1, (64 << 20) // row, min(rows // 8, 512), min(gradient_columns // 2, 1024))


def padded_columns(vocabulary: int, bias: bool) -> int:
    """Pad the columns of a row of logits to 128 bytes of bfloat16: an odd number can halve a GEMM's speed."""
    # Not with a bias: torch's GEMM for CUDA would round the product before it adds the bias.
    return vocabulary if bias else -(-vocabulary // 64) * 64


@torch.no_grad()
def in_chunks(
    row_pass: Callable[..., None],
    chunk_size: int,
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    labels: Tensor,  # [..., s]
    label_scale: Tensor,  # [s] or [N, s]
    *,
    bias: Tensor | None = None,
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
    reduction: str = "sum",
    grad_hidden: bool = False,
    grad_weight: bool = False,
    grad_bias: bool = False,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the op by a row pass with the tensors and the gradient= of multi_hot_cross_entropy_rows_.

    `grad_dtype` is float32 or the dtype of hidden, for the gradients of hidden and weight. Without it they are float32,
    or float64 for float64, as the gradient of the bias always is.
    """
    device, gradient = hidden.device, grad_hidden or grad_weight or grad_bias
    # Autocast has cast the arguments, and must not cast what is computed in float32.
    available = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if available else nullcontext():
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        compute = compute_dtype(hidden.dtype, device)
        h = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]).to(compute)  # [N, d]
        w = weight.to(compute)
        bias = None if bias is None else bias.to(compute).contiguous()
        (rows, dim), vocabulary = h.shape, len(w)
        y = labels.reshape(rows, label_scale.shape[-1])
        loss, lse = (h.new_empty(rows, dtype=dtype) for _ in range(2))
        chunk = -(-rows // max(1, -(-rows // chunk_size)))  # equal parts
        grad_dtype = grad_dtype or dtype
        dh = hidden.new_empty((rows, dim) if grad_hidden else (0,), dtype=grad_dtype)
        # The GEMM of a single chunk rounds its sums itself; the sums of several chunks are added up before.
        summed = dtype if chunk < rows else grad_dtype
        dw = weight.new_empty((vocabulary, dim) if grad_weight else (0,), dtype=summed)
        db = weight.new_empty(vocabulary if grad_bias else 0, dtype=dtype)
        if rows == 0:
            dw.zero_(), db.zero_()
        padded = h.new_empty(chunk, padded_columns(vocabulary, bias is not None))
        padded[:, vocabulary:] = 0  # torch's bfloat16 GEMM on CPUs with AMX reads them: a NaN would not stay there
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
                label_scale if label_scale.dim() == 1 else label_scale[part],
                loss[part],
                lse[part],
                grad_loss=grad_loss if grad_loss is None or grad_loss.dim() == 0 else grad_loss[part],
                grad_lse=None if grad_lse is None else grad_lse[part],
                gradient=gradient,
            )
            if grad_hidden:
                _add_product(dh[part], z, w, False)
            if grad_weight:
                _add_product(dw, z.T, h[part], start > 0)
            if grad_bias:
                column_sums = z.sum(0, dtype=dtype)
                db.copy_(column_sums if start == 0 else db + column_sums)
        if summed != grad_dtype:
            del padded, buffer, z  # the logits, whose memory the rounded gradient can take
            rounded = torch.empty_like(dw, dtype=grad_dtype)
            torch.ops.tst_ext.scaled_copy_(rounded, dw, dw.new_ones(()))
            dw = rounded
        total = loss if reduction == "none" else loss.sum()
        return total, lse, dh.view_as(hidden) if grad_hidden else dh, dw, db


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
    """Tell whether this torch multiplies matrices of `dtype` into a float32 result there, without rounding."""
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
