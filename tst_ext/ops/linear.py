"""linear_multi_hot_cross_entropy: the public function, its autograd Function, and the fakes that torch.compile traces.

The loop over chunks of rows is in csrc/cpu/linear_multi_hot_cross_entropy.cpp for the CPU, else in `chunked`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATING, check_integer, check_same_device, check_tensor
from .._load import _C
from . import vocab_parallel
from .loss import LossOptions, check_reduction, checked_bags, checked_options, position_scale_of, results
from .second_derivative import first_derivative, link


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    position_weights: str | Tensor | None = None,
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
    """Multi-hot cross-entropy of `hidden @ weight.T + bias` against a bag of labels per row, without the full logits.

    With z the logits of a row and y_1..y_s its labels, the cross-entropy of position i is `lse(z) - z[y_i]`; a token
    that occurs twice counts twice. Where a gradient is wanted the gradients of a mean or sum are computed here, chunk
    by chunk, and kept for the backward pass: three GEMMs in all, and memory for one chunk of logits beyond the
    gradients. docs/ops.md has each option's formula.

    Args:
        hidden: `[..., d]`, float32, bfloat16, float16 or float64. float16 is computed in float32.
        weight: `[V, d]`, the output head, of hidden's dtype. Under autocast hidden, weight and bias are cast as
            `F.linear` casts them.
        labels: `[..., s]`, or `[...]` for s = 1 (plain next-token loss), int64 or int32, each in `[0, V)` or
            `ignore_index`.
        bias: `[V]`, of hidden's dtype; -inf takes an entry out of the vocabulary.
        position_weights: weights w_i of the bag positions: a name that `tst_ext.position_weights` knows, or a tensor
            `[s]`, finite and >= 0, constant (no gradient). Default uniform. Not with "mce_alt".
        objective: "mce", multi-hot cross-entropy, or "mce_alt", `lse(z) - log sum_{v in set(y)} exp(z_v)`: the labels'
            probabilities need only sum to one. Never negative.
        ignore_index: the label that counts for nothing.
        reduction: "mean", the paper's: m_i, the mean over the valid rows of position i, then
            `sum_i w_i m_i / sum_i w_i` over the positions that have a valid row. "sum": the row losses
            `sum_i w_i (lse - z[y_i]) / sum_i w_i`, their numerator over valid labels alone, summed over rows. "none":
            those row losses. ("mce_alt": the mean, sum or list of the losses of rows that have a valid label.) Without
            ignored labels "mean" is "sum" divided by the number of rows. With no valid label at all it is 0. "none"
            keeps no gradients: the backward pass recomputes the logits, four GEMMs in all.
        normalizer: a number or 0-d tensor that takes the place of every divisor of "mean": the loss is
            `sum of w_i (lse - z[y_i]) over all valid labels / normalizer`. With one normalizer the losses and gradients
            of micro-batches and ranks add up to those of the whole batch.
        logit_softcap: z becomes `logit_softcap * tanh(z / logit_softcap)` first.
        z_loss: adds `z_loss * lse^2` to each row's loss, weighted as the row's labels together.
        label_smoothing: e in `[0, 1]`; each label's loss becomes `(1 - e) (lse - z[y]) + e (lse - mean z)`, the mean
            over the entries above -inf.
        return_lse: also return `lse` `[...]` (float32, float64 for float64), with its gradient.
        return_z_loss: also return the share of `z_loss` in the loss, in the shape of the loss, with its gradient.
        chunk_size: rows whose logits exist at a time, at most. Default: as many as fit an eighth of the full logits, or
            64 MiB where that is more, and 512 at most beyond 64 MiB; without gradients 512, of which a block of
            columns exists at a time. On the CPU fewer rows than about 256 cost time, because the weight is read again
            for every chunk. On CUDA 2048 to 8192, as many as fit 1/32 of the device's memory.
        tp_group: the processes among which the vocabulary is divided. `weight` and `bias` are then this process's rows
            of the head, contiguous and in the order of the ranks, any number in each; all else is the same in all
            processes, labels number the whole vocabulary. Every process gets the whole loss, the whole gradient of
            hidden, and the gradient of its own rows. Two all-reduces of some numbers a row, and one of hidden's
            gradient. Chunks hold 512 rows, on CUDA 8192, unless `chunk_size` says otherwise. Under torch.compile a
            graph break.
        sequence_parallel: hidden is this process's part `[..., l / processes, d]` of the sequence, in the order of the
            ranks, all of one size, and so is its gradient; labels are the whole sequence's. It is gathered, and its
            gradient scattered, here. Only with `tp_group`.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or `[...]` for "none". With `return_lse` or
        `return_z_loss` a tuple `(loss[, lse][, z_loss])`. A gradient that flows into lse or z_loss is computed in the
        backward pass, by three more GEMMs; torch.compile always lets one flow, of zeros where lse is not used.

    Raises:
        TypeError: a dtype other than those above, hidden, weight and bias of different dtypes outside autocast, or a
            DTensor; a `tp_group` that is no process group.
        ValueError: a shape, device, weight or option other than those above; this process is not in `tp_group`.
        IndexError: a label outside `[0, V)` that is not `ignore_index`; names the label and its place. On other
            devices than the CPU torch's own check stops instead.
        RuntimeError: on a second derivative, which is not implemented.

    Source: arXiv 2605.06546, multi-hot cross-entropy and its sum-to-one variant.
    """
    check_tensor("hidden", hidden, FLOATING)
    check_tensor("weight", weight, FLOATING)
    if bias is not None:
        check_tensor("bias", bias, FLOATING)
    options = LossOptions(objective, ignore_index, logit_softcap, z_loss, label_smoothing)
    options = checked_options(options, position_weights)
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
    scale = position_scale_of(bags, hidden, options, reduction, normalizer, position_weights)

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
    """What a call hands to the op beside tensors."""

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
    position_scale: Tensor,
    wants: tuple[bool, ...],  # the gradients of hidden, weight and bias
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return call.run(
        hidden,
        weight,
        labels,
        position_scale,
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


class _LinearMultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        position_scale: Tensor,
        call: _Call,
        wants: tuple[bool, ...],  # gradients computed now: hidden's, weight's, bias's
        keep: bool,
        link: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _run(call, hidden, weight, bias, labels, position_scale, wants)

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
        *ready, hidden, weight, bias, labels, position_scale, _ = ctx.saved_tensors
        per_row = ctx.call.reduction == "none"
        gradients: list[Tensor | None] = [None, None, None]
        if grad_loss is not None and not per_row:
            gradients = [None if g is None else _scaled(g, grad_loss, ctx.dtype) for g in ready]
        if hidden is not None and (grad_lse is not None or (per_row and grad_loss is not None)):
            upstream = grad_loss if per_row and grad_loss is not None else position_scale.new_zeros(())
            needs = ctx.needs_input_grad[:3]
            more = _run(ctx.call, hidden, weight, bias, labels, position_scale, needs, upstream, grad_lse)[2:]
            gradients = [_sum(g, m, ctx.dtype) if n else None for g, m, n in zip(gradients, more, needs, strict=True)]
        return *gradients, None, None, None, None, None, None


def _sum(gradient: Tensor | None, more: Tensor, dtype: torch.dtype) -> Tensor:
    more = more.to(dtype)
    return more if gradient is None else gradient + more


def _graph_is_kept() -> bool:
    """Whether the backward pass under way keeps its graph. Taken to be so by a torch that does not tell any more."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or kept()


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` rounded once to dtype, without a second gradient in float32 where that can be avoided.

    In place, or not at all for a factor of 1, the usual `loss.backward()`. Not where a compiler traces, and not from a
    graph that is kept: a second backward would find the gradient changed. Reading the factor on the host is free on the
    CPU only; elsewhere product and rounding are one pass.
    """
    if torch.compiler.is_compiling() or _graph_is_kept():
        return (gradient * factor).to(dtype)
    on_cpu = gradient.device.type == "cpu"
    if gradient.dtype != dtype and not on_cpu:
        gradient = gradient.contiguous()  # as it is, unless a hook of saved tensors has changed its strides
        rounded = torch.empty_like(gradient, dtype=dtype)
        torch.ops.tst_ext.scaled_copy_(rounded, gradient, factor)
        return rounded
    if not on_cpu or factor != 1:
        gradient.mul_(factor)
    if gradient.dtype == dtype:
        return gradient
    rounded = torch.empty_like(gradient, dtype=dtype)
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
    position_scale: Tensor,
    *,
    reduction: str = "sum",
    grad_hidden: bool = False,
    grad_weight: bool = False,
    grad_bias: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = math.prod(hidden.shape[:-1])
    return (
        hidden.new_empty((rows,) if reduction == "none" else (), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(hidden.shape if grad_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if grad_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if grad_bias else 0, dtype=dtype),
    )
