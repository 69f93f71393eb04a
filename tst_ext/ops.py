"""The two operations: public functions, autograd Functions, and the fakes that torch.compile traces.

The kernels are in csrc/; importing `tst_ext._C` registers them as `torch.ops.tst_ext.*`. Those ops only compute; the
gradient formulas are here.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import tst_ext._C  # noqa: F401  (registers the ops and their kernels)
import tst_ext.fallback  # noqa: F401  (registers plain torch for devices without kernels)

from .bags import position_weights as named_position_weights

__all__ = ["bag_embedding", "linear_multi_hot_cross_entropy"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected one of {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def _check_same_device(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"expected all tensors on one device, got {got}")


# ---- bag_embedding ----------------------------------------------------------------------------------------------


def bag_embedding(input_ids: Tensor, weight: Tensor, *, mode: str = "mean") -> Tensor:
    """One embedding a bag: the mean (or sum) of the embeddings of its tokens.

    `out[..., :] = (1 / s) * sum_i weight[input_ids[..., i], :]`, summed in float32 (float64 for float64) and rounded
    once. A token that occurs twice in a bag counts twice. The gradient of `weight` is dense, summed in float32 in a
    fixed order: repeated calls are bitwise equal, whatever the number of threads.

    Args:
        input_ids: `[..., s]`, int64 or int32, each in `[0, V)`. The last dimension is the bag; s = 1 is an ordinary
            embedding.
        weight: `[V, d]`, float32, bfloat16, float16 or float64.
        mode: "mean" or "sum".

    Returns:
        `[..., d]` in weight's dtype.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: a shape, device or mode other than those above.
        IndexError: an id outside `[0, V)`; names the id and its place. On other devices than the CPU the device's own
            check stops instead, as in torch's embedding.

    Source: arXiv 2605.06546, the input of the superposition phase.
    """
    _check_tensor("input_ids", input_ids, INTEGER)
    _check_tensor("weight", weight, FLOATING)
    if input_ids.dim() < 1 or input_ids.shape[-1] < 1:
        raise ValueError(f"input_ids: expected [..., bag_size] with bag_size >= 1, got shape {tuple(input_ids.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [num_embeddings, embedding_dim], got shape {tuple(weight.shape)}")
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode: expected 'mean' or 'sum', got {mode!r}")
    _check_same_device(input_ids=input_ids, weight=weight)
    return _BagEmbedding.apply(input_ids, weight, mode)


class _BagEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, mode: str) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.num_embeddings, ctx.mode = weight.shape[0], mode
        return torch.ops.tst_ext.bag_embedding(input_ids, weight, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (input_ids,) = ctx.saved_tensors
        return (
            None,
            torch.ops.tst_ext.bag_embedding_backward(grad, input_ids, ctx.num_embeddings, ctx.mode),
            None,
        )


@torch.library.register_fake("tst_ext::bag_embedding")
def _(input_ids: Tensor, weight: Tensor, mode: str) -> Tensor:
    return weight.new_empty(*input_ids.shape[:-1], weight.shape[1])


@torch.library.register_fake("tst_ext::bag_embedding_backward")
def _(grad: Tensor, input_ids: Tensor, num_embeddings: int, mode: str) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[-1])


# ---- linear_multi_hot_cross_entropy -----------------------------------------------------------------------------


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    position_weights: str | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Multi-hot cross-entropy of `hidden @ weight.T` against a bag of labels per row, without the full logits.

    With z the logits of a row and y_1..y_s its labels, the cross-entropy of position i is `lse(z) - z[y_i]`; a token
    that occurs twice counts twice. Where a gradient is wanted it is computed here, chunk by chunk, and kept for the
    backward pass: three GEMMs in all, and memory for one chunk of logits beyond the gradients.

    Args:
        hidden: `[..., d]`, float32, bfloat16, float16 or float64. float16 is computed in float32.
        weight: `[V, d]`, the output head, of hidden's dtype. Under autocast both are cast as `F.linear` casts them.
        labels: `[..., s]`, or `[...]` for s = 1 (plain next-token loss), int64 or int32, each in `[0, V)` or
            `ignore_index`.
        position_weights: weights w_i of the bag positions: a name that `tst_ext.position_weights` knows, or a tensor
            `[s]`, finite and >= 0, constant (no gradient). Default uniform.
        ignore_index: the label that counts for nothing.
        reduction: "mean", the paper's: m_i, the mean over the valid rows of position i, then
            `sum_i w_i m_i / sum_i w_i` over the positions that have a valid row. "sum": the row losses
            `sum_i w_i (lse - z[y_i]) / sum_i w_i`, their numerator over valid labels alone, summed over rows. Without
            ignored labels, "mean" is "sum" divided by the number of rows. With no valid label at all both are 0.
        chunk_size: rows whose logits exist at a time. Default: as many as fit an eighth of the full logits, or 64 MiB
            where that is more, and 512 at most beyond 64 MiB.

    Returns:
        Scalar loss, in nats, float32 (float64 for float64).

    Raises:
        TypeError: a dtype other than those above, or hidden and weight of different dtypes outside autocast.
        ValueError: a shape, device, weight or option other than those above.
        IndexError: a label outside `[0, V)` that is not `ignore_index`; names the label and its place. On other
            devices than the CPU torch's own check stops instead.
        RuntimeError: on a second derivative, which is not implemented.

    Source: arXiv 2605.06546, multi-hot cross-entropy.
    """
    _check_tensor("hidden", hidden, FLOATING)
    _check_tensor("weight", weight, FLOATING)
    _check_tensor("labels", labels, INTEGER)
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast and raises
        autocast = torch.get_autocast_dtype(device_type)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(autocast) for t in (hidden, weight))
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden, weight: expected [..., d] and [V, d], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    rows = hidden.shape[:-1]
    if labels.shape == rows:
        bag_size = 1
    elif labels.shape[:-1] != rows or labels.shape[-1] < 1:
        raise ValueError(
            f"labels: expected {tuple(rows)} or {(*rows, 's')} with s >= 1 for hidden of shape "
            f"{tuple(hidden.shape)}, got shape {tuple(labels.shape)}"
        )
    else:
        bag_size = labels.shape[-1]
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an integer >= 1 or None, got {chunk_size!r}")
    if isinstance(position_weights, str):
        position_weights = named_position_weights(position_weights, bag_size, device=hidden.device)
    if position_weights is not None:
        _check_tensor("position_weights", position_weights, FLOATING + INTEGER)
        if position_weights.shape != (bag_size,) or position_weights.requires_grad:
            raise ValueError(
                f"position_weights: expected a constant tensor of shape ({bag_size},), got shape "
                f"{tuple(position_weights.shape)}, requires_grad={position_weights.requires_grad}"
            )
        position_weights = position_weights.to(hidden.device)
    _check_same_device(hidden=hidden, weight=weight, labels=labels)
    # Outside a graph the Function's own needs_input_grad would still be true, and two GEMMs wasted.
    wants_grad = torch.is_grad_enabled()
    return _LinearMultiHotCrossEntropy.apply(
        hidden,
        weight,
        labels,
        position_weights,
        ignore_index,
        reduction,
        chunk_size,
        wants_grad and hidden.requires_grad,
        wants_grad and weight.requires_grad,
    )


class _LinearMultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        position_weights: Tensor | None,
        ignore_index: int,
        reduction: str,
        chunk_size: int | None,
        grad_hidden: bool,
        grad_weight: bool,
    ) -> Tensor:
        loss, _, dh, dw, _ = torch.ops.tst_ext.linear_multi_hot_cross_entropy(
            hidden,
            weight,
            labels,
            position_weights=position_weights,
            ignore_index=ignore_index,
            reduction=reduction,
            chunk_size=chunk_size,
            grad_hidden=grad_hidden,
            grad_weight=grad_weight,
        )
        ctx.save_for_backward(dh if grad_hidden else None, dw if grad_weight else None)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = (None if saved is None else _scaled(saved, grad, ctx.dtype) for saved in ctx.saved_tensors)
        return dh, dw, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` rounded once to dtype; gradient itself where that is the same, the usual `loss.backward()`.

    The shortcut spares a second copy of the weight gradient. It reads the factor on the host, so it is taken only on
    the CPU, where that is free, not where a compiler traces, and not from a graph that is kept: a second backward would
    hand out the same memory again.
    """
    if (
        not torch.compiler.is_compiling()
        and gradient.dtype == dtype
        and factor.device.type == "cpu"
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and factor == 1
    ):
        return gradient
    return (gradient * factor).to(dtype)


@torch.library.register_fake("tst_ext::linear_multi_hot_cross_entropy")
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    grad_hidden: bool = False,
    grad_weight: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(math.prod(hidden.shape[:-1]), dtype=dtype),
        hidden.new_empty(hidden.shape if grad_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if grad_weight else (0,), dtype=dtype),
        weight.new_empty(0, dtype=dtype),
    )
