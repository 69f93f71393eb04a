"""multi_hot_cross_entropy of logits that exist already: public function, autograd Function, and fakes."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATING, check_tensor, is_batched
from .loss import (
    LossOptions,
    check_reduction,
    checked_bags,
    checked_label_weights,
    checked_options,
    label_scale_of,
    results,
)
from .second_derivative import Function, first_derivative, link


def multi_hot_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    position_weights: str | Tensor | None = None,
    label_weights: Tensor | None = None,
    objective: str = "mce",
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    return_z_loss: bool = False,
    inplace: bool = False,
) -> Any:
    """Multi-hot cross-entropy of logits that exist already, in one pass over them forward and one backward.

    All other options, the result and the errors are those of `linear_multi_hot_cross_entropy`.

    Args:
        logits: `[..., V]`, float32, bfloat16, float16 or float64.
        labels: `[..., s]`, or `[...]` for s = 1.
        inplace: the backward pass writes the gradient over the logits. They must be contiguous, not a leaf that
            requires grad, and not needed by another op's backward. A second backward raises RuntimeError. torch.compile
            places memory itself and ignores this.

    Source: arXiv 2605.06546, multi-hot cross-entropy and its sum-to-one variant.
    """
    check_tensor("logits", logits, FLOATING)
    options = LossOptions(objective, ignore_index, logit_softcap, z_loss, label_smoothing)
    options = checked_options(options, position_weights, label_weights)
    check_reduction(reduction, normalizer)
    if logits.dim() < 1:
        raise ValueError("logits: expected [..., V], got a 0-d tensor")
    if inplace and (not logits.is_contiguous() or (logits.is_leaf and logits.requires_grad)):
        raise ValueError(
            "inplace: expected contiguous logits that are not a leaf that requires grad, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}, is_leaf={logits.is_leaf}"
        )
    rows = logits.shape[:-1]
    bags = checked_bags(labels, rows, logits, "logits")
    weights = checked_label_weights(label_weights, labels, bags)
    scale = label_scale_of(bags, logits, options, reduction, normalizer, position_weights, weights)
    loss, lse = _MultiHotCrossEntropy.apply(logits, labels, scale, options, reduction == "none", inplace, link(logits))
    return results(loss, lse, rows, bags, scale, options, reduction, return_lse, return_z_loss)


class _MultiHotCrossEntropy(Function):
    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        label_scale: Tensor,
        options: LossOptions,
        per_row: bool,
        inplace: bool,
        link: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.tst_ext.multi_hot_cross_entropy(
            logits, labels, label_scale, reduction="none" if per_row else "sum", **options._asdict()
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, labels, label_scale, ctx.options, _, ctx.inplace, link = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, label_scale, link)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, label_scale, _ = ctx.saved_tensors
        if is_batched(grad_loss) or is_batched(grad_lse):
            return _batched_gradient(ctx, grad_loss, grad_lse), None, None, None, None, None, None
        # A compiler decides about memory itself, and does not see that another op needs these logits.
        inplace = ctx.inplace and not torch.compiler.is_compiling()
        gradient = logits if inplace else logits.clone(memory_format=torch.contiguous_format)
        rows = math.prod(logits.shape[:-1])
        torch.ops.tst_ext.multi_hot_cross_entropy_rows_(
            gradient.view(rows, logits.shape[-1]),
            labels,
            label_scale,
            label_scale.new_empty(rows),
            label_scale.new_empty(rows),
            grad_loss=label_scale.new_zeros(()) if grad_loss is None else grad_loss,
            grad_lse=grad_lse,
            gradient=True,
            **ctx.options._asdict(),
        )
        if inplace:
            torch.autograd.graph.increment_version(logits)  # a second backward finds its saved logits changed
        return gradient, None, None, None, None, None, None


def _batched_gradient(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> Tensor:
    """Multiply gradients for upstreams of 1: the row pass writes one tensor, and cannot write a batch."""
    logits, labels, label_scale, _ = ctx.saved_tensors
    rows, dtype = math.prod(logits.shape[:-1]), label_scale.dtype
    parts = []
    for upstream, of_loss in ((grad_loss, True), (grad_lse, False)):
        if upstream is None:
            continue
        gradient = logits.to(dtype, copy=True, memory_format=torch.contiguous_format).view(rows, logits.shape[-1])
        torch.ops.tst_ext.multi_hot_cross_entropy_rows_(
            gradient,
            labels,
            label_scale,
            label_scale.new_empty(rows),
            label_scale.new_empty(rows),
            grad_loss=label_scale.new_full((), float(of_loss)),
            grad_lse=None if of_loss else label_scale.new_ones(rows),
            gradient=True,
            **ctx.options._asdict(),
        )
        factor = upstream.reshape(-1, 1)  # [1 or N, 1]
        parts.append(torch.where(factor == 0, 0, factor * gradient))
    return sum(parts[1:], parts[0]).to(logits.dtype).view(logits.shape)


@torch.library.register_fake("tst_ext::multi_hot_cross_entropy")
def _(
    logits: Tensor, labels: Tensor, label_scale: Tensor, *, reduction: str = "sum", **options: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = math.prod(logits.shape[:-1])
    return logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype), logits.new_empty(rows, dtype=dtype)


@torch.library.register_fake("tst_ext::multi_hot_cross_entropy_rows_")
def _(logits: Tensor, labels: Tensor, label_scale: Tensor, loss: Tensor, lse: Tensor, **options: Any) -> None:
    return None
