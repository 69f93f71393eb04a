"""linear_multi_hot_cross_entropy, whose loop over chunks is csrc/cpu's for the CPU and else that of `chunked`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATING, check_integer, check_same_device, check_tensor, is_traced
from .._load import _C
from . import chunked, vocab_parallel
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


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
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
    chunk_size: int | None = None,
    tp_group: "torch.distributed.ProcessGroup | None" = None,
    sequence_parallel: bool = False,
) -> Any:
    """Multi-hot cross-entropy of `hidden @ weight.T + bias` with a bag of labels per row, without the full logits.

    For a row with logits z and labels y_1..y_s, the cross-entropy of position i is `lse(z) - z[y_i]`. A token that
    occurs twice counts twice. The forward pass also computes the gradients of a mean or sum, chunk by chunk: three
    GEMMs in all, and memory for one chunk of logits. docs/ops.md has the formulas, the costs and the numerics.

    Args:
        hidden: `[..., d]`, float32, bfloat16, float16 or float64. float16 is computed in float32, and so is
            bfloat16 on a CPU without bfloat16 instructions.
        weight: `[V, d]`, the output head, in hidden's dtype. Autocast casts hidden, weight and bias as in `F.linear`.
        labels: `[..., s]`, or `[...]` for s = 1 (next-token loss), int64 or int32, each in `[0, V)` or `ignore_index`.
        bias: `[V]`, in hidden's dtype. -inf takes an entry out of the vocabulary.
        position_weights: weights w_i of the bag positions, 1 by default: a name that `tst_ext.position_weights` knows,
            or a constant tensor `[s]`, finite and >= 0. Not with "mce_alt".
        label_weights: a weight u for each label, a constant tensor in the shape of labels, finite and >= 0, or a mask.
            Each label's term is multiplied by its u. The m_i of "mean" is then the weighted mean, with divisor sum u,
            as that of class weights in `F.cross_entropy`; no other divisor changes. Not with "mce_alt".
        objective: "mce", multi-hot cross-entropy, or "mce_alt", `lse(z) - log sum_{v in set(y)} exp(z_v)`. The latter
            only asks the labels' probabilities to sum to one, and is never negative.
        ignore_index: the label that counts for nothing. With no valid label at all the loss is 0.
        reduction: "mean" is the paper's: m_i, the mean over the valid rows of position i, then
            `sum_i w_i m_i / sum_i w_i` over the positions that have a valid row. "none" returns the row losses
            `sum_i w_i (lse - z[y_i]) / sum_i w_i`, their numerator over valid labels alone; "sum" adds them up. For
            "mce_alt" these are the mean, list and sum over the rows that have a valid label. The backward pass of
            "none" recomputes the logits, which makes four GEMMs.
        normalizer: a number or 0-d tensor that replaces every divisor of "mean": the loss is
            `sum of w_i (lse - z[y_i]) over all valid labels / normalizer`. With one normalizer the losses and gradients
            of micro-batches and ranks add up to those of the whole batch.
        logit_softcap: c; z becomes `c * tanh(z / c)` first.
        z_loss: adds `z_loss * lse^2` to each row's loss, weighted as the row's labels together.
        label_smoothing: e in `[0, 1]`. Each label's loss becomes `(1 - e) (lse - z[y]) + e (lse - mean z)`, the mean
            over the entries above -inf.
        return_lse: also return `lse` `[...]` (float32, float64 for float64), with its gradient.
        return_z_loss: also return the share of `z_loss` in the loss, in the shape of the loss, with its gradient.
        chunk_size: the most rows whose logits exist at a time. The default on CUDA is as many as fit 1/16 of the
            device's memory, and at least 2048. Elsewhere they fit 64 MiB, an eighth of the full logits (at most 512
            rows) or half of the weight's gradient (at most 1024 rows), whichever is most; without gradients 512. On the
            CPU fewer than about 256 rows cost time.
        tp_group: the processes that divide the vocabulary. `weight` and `bias` are this process's rows of the head,
            contiguous, in the order of the ranks, any number in each. All else is the same in all processes, and labels
            number the whole vocabulary. Every process gets the whole loss, the whole gradient of hidden, and the
            gradient of its own rows. The default chunk is 512 rows, on CUDA 8192. Breaks the graph of torch.compile.
        sequence_parallel: hidden and its gradient are this process's part `[..., l / processes, d]` of the sequence, in
            the order of the ranks, all of one size. Labels are the whole sequence's. Only with `tp_group`.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or `[...]` for "none". With `return_lse` or
        `return_z_loss` a tuple `(loss[, lse][, z_loss])`. A gradient that flows into lse or z_loss takes three more
        GEMMs in the backward pass; torch.compile always lets one flow, of zeros where lse is not used.

    Raises:
        TypeError: another dtype, dtypes that differ outside autocast, a DTensor, or a `tp_group` of another type.
        ValueError: another shape, device, weight or option, or this process is not in `tp_group`.
        IndexError: a label outside `[0, V)` that is not `ignore_index`; a GPU stops in torch's own check instead.
        RuntimeError: a second or forward-mode derivative, or torch.vmap, which are not implemented.

    Source: arXiv 2605.06546, multi-hot cross-entropy and its sum-to-one variant.
    """
    check_tensor("hidden", hidden, FLOATING)
    check_tensor("weight", weight, FLOATING)
    if bias is not None:
        check_tensor("bias", bias, FLOATING)
    options = LossOptions(objective, ignore_index, logit_softcap, z_loss, label_smoothing)
    options = checked_options(options, position_weights, label_weights)
    check_reduction(reduction, normalizer)
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast and raises
        autocast = torch.get_autocast_dtype(device_type)
        hidden, weight, bias = (  # type: ignore[assignment]
            t if t is None or t.dtype == torch.float64 else t.to(autocast) for t in (hidden, weight, bias)
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected hidden's dtype {hidden.dtype}, got {tensor.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden, weight: expected [..., d] and [V, d], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    check_same_device(hidden=hidden, weight=weight, bias=bias)
    rows = vocab_parallel.checked_rows(hidden, tp_group, sequence_parallel)
    bags = checked_bags(labels, rows, hidden, "hidden")
    weights = checked_label_weights(label_weights, labels, bags)
    scale = label_scale_of(bags, hidden, options, reduction, normalizer, position_weights, weights)

    run: Callable[..., tuple[Tensor, ...]] = torch.ops.tst_ext.linear_multi_hot_cross_entropy
    apply = _LinearMultiHotCrossEntropy.apply
    if tp_group is not None:
        run = partial(vocab_parallel.linear_multi_hot_cross_entropy, tp_group, sequence_parallel)
        apply = torch.compiler.disable(apply)
    # Outside a graph the Function's own needs_input_grad would still be true, and two GEMMs wasted.
    now = torch.is_grad_enabled() and reduction != "none"
    wants = tuple(now and t is not None and t.requires_grad for t in (hidden, weight, bias))
    keep = reduction == "none" or return_lse or return_z_loss  # hidden and weight: the backward may need the logits
    call = _Call(run, options, "none" if reduction == "none" else "sum", chunk_size)
    loss, lse = apply(hidden, weight, bias, labels, scale, call, wants, keep, link(hidden, weight, bias))[:2]
    return results(loss, lse, rows, bags, scale, options, reduction, return_lse, return_z_loss)


class _Call(NamedTuple):
    """The arguments of the op that are not tensors."""

    run: Callable[..., tuple[Tensor, ...]]  # the op, or the one for a divided head
    options: LossOptions
    reduction: str
    chunk_size: int | None


def _run(
    call: _Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_scale: Tensor,
    wants: tuple[bool, ...],  # the gradients of hidden, weight and bias
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return call.run(
        hidden,
        weight,
        labels,
        label_scale,
        bias=bias,
        grad_loss=grad_loss,
        grad_lse=grad_lse,
        reduction=call.reduction,
        chunk_size=call.chunk_size,
        grad_hidden=wants[0],
        grad_weight=wants[1],
        grad_bias=wants[2],
        **call.options._asdict(),
    )


class _LinearMultiHotCrossEntropy(Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_scale: Tensor,
        call: _Call,
        wants: tuple[bool, ...],  # gradients computed now: hidden's, weight's, bias's
        keep: bool,
        link: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _run(call, hidden, weight, bias, labels, label_scale, wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call, ctx.wants, keep, link = inputs
        _, lse, *gradients = output
        ctx.mark_non_differentiable(*gradients, *(() if keep else (lse,)))
        ctx.set_materialize_grads(False)
        ready = (g if wanted else None for g, wanted in zip(gradients, ctx.wants, strict=True))
        ctx.save_for_backward(*ready, *(tensors if keep else (None,) * 5), link)
        ctx.dtype = tensors[0].dtype

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *ready, hidden, weight, bias, labels, label_scale, _ = ctx.saved_tensors
        per_row = ctx.call.reduction == "none"
        gradients: list[Tensor | None] = [None, None, None]
        if grad_loss is not None and not per_row:
            traced = is_traced(grad_loss, *ready)
            gradients = [None if g is None else _scaled(g, grad_loss, ctx.dtype, traced) for g in ready]
        if hidden is not None and (grad_lse is not None or (per_row and grad_loss is not None)):
            upstream = grad_loss if per_row and grad_loss is not None else label_scale.new_zeros(())
            needs = ctx.needs_input_grad[:3]
            more = _run(ctx.call, hidden, weight, bias, labels, label_scale, needs, upstream, grad_lse)[2:]
            gradients = [_sum(g, m, ctx.dtype) if n else None for g, m, n in zip(gradients, more, needs, strict=True)]
        return *gradients, None, None, None, None, None, None


def _sum(gradient: Tensor | None, more: Tensor, dtype: torch.dtype) -> Tensor:
    more = more.to(dtype)
    return more if gradient is None else gradient + more


def _graph_is_kept() -> bool:
    """Tell whether this backward pass keeps its graph; assume so where a later torch does not tell."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or kept()


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    """Return `gradient * factor`, rounded to dtype once, if possible without a second gradient."""
    # Not in place in a graph that is kept or traced: a second backward would find the gradient changed.
    kept = traced or _graph_is_kept()
    on_cpu = gradient.device.type == "cpu"
    if not traced and (gradient.dtype == torch.bfloat16 or (gradient.dtype != dtype and not on_cpu)):
        gradient = gradient.contiguous()  # as it is, unless a hook of saved tensors has changed its strides
        scaled = torch.empty_like(gradient, dtype=dtype) if kept or gradient.dtype != dtype else gradient
        torch.ops.tst_ext.scaled_copy_(scaled, gradient, factor)
        return scaled
    if kept:
        return (gradient * factor.reshape(1)).to(dtype)  # [1]: a scalar would be rounded to a bfloat16 gradient's dtype
    readable = on_cpu and type(factor) is Tensor  # not a fake one
    if not readable or factor != 1:  # 1 is the usual loss.backward(); reading it is free on the CPU alone
        gradient.mul_(factor)
    if gradient.dtype == dtype:
        return gradient
    rounded = torch.empty_like(gradient, dtype=dtype)
    if readable:
        _C.advise_huge_pages(rounded.data_ptr(), rounded.nbytes)
    return rounded.copy_(gradient)


@torch.library.register_fake("tst_ext::scaled_copy_")
def _(out: Tensor, source: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("tst_ext::linear_multi_hot_cross_entropy")
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    *,
    reduction: str = "sum",
    grad_hidden: bool = False,
    grad_weight: bool = False,
    grad_bias: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    gradients = chunked.gradient_dtype(hidden.dtype, hidden.device)
    rows = math.prod(hidden.shape[:-1])
    return (
        hidden.new_empty((rows,) if reduction == "none" else (), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(hidden.shape if grad_hidden else (0,), dtype=gradients),
        weight.new_empty(weight.shape if grad_weight else (0,), dtype=gradients),
        weight.new_empty(weight.shape[0] if grad_bias else 0, dtype=dtype),
    )
