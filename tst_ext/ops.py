"""The operations: public functions, autograd Functions, and the fakes that torch.compile traces.

The kernels are in csrc/; importing `tst_ext._C` registers them as `torch.ops.tst_ext.*`. Those ops only compute; the
gradient formulas and the normalisation of the loss are here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import vocab_parallel
from .arguments import (
    check_loss_options,
    checked_bag_size,
    checked_position_weights,
    checked_rows,
    position_scale_of,
    row_scale_of,
)
from .checks import FLOATING, INTEGER, check_integer, check_same_device, check_tensor
from .derivatives import first_derivative, link
from .extension import _C  # loading it registers the ops and their kernels
from .fallback import padded_columns  # importing it registers plain torch for devices without kernels

__all__ = ["bag_embedding", "linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"]

# ---- bag_embedding ----------------------------------------------------------------------------------------------


def bag_embedding(
    input_ids: Tensor,
    weight: Tensor,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    position_weights: str | Tensor | None = None,
) -> Tensor:
    """One embedding a bag: the mean (or sum) of the embeddings of its tokens.

    `out[..., :] = sum_i w_i weight[input_ids[..., i], :] / sum_i w_i` over the positions i whose id is not
    `padding_idx`, with w_i = 1 by default, summed in float32 (float64 for float64) and rounded once. A token that
    occurs twice in a bag counts twice. The gradient of `weight` is dense, summed in float32 in a fixed order: repeated
    calls are bitwise equal, whatever the number of threads.

    Args:
        input_ids: `[..., s]`, int64 or int32, each in `[0, V)` or `padding_idx`. The last dimension is the bag; s = 1
            is an ordinary embedding.
        weight: `[V, d]`, float32, bfloat16, float16 or float64.
        mode: "mean" or "sum" (without the divisor).
        padding_idx: the id of empty slots, which count neither in the sum nor in the divisor; a bag of them alone is
            zeros. Compared as it is, so a number outside the vocabulary, such as -100, serves and no token is lost.
        position_weights: weights w_i of the bag positions: a name that `tst_ext.position_weights` knows, or a tensor
            `[s]`, finite and >= 0, constant (no gradient).

    Returns:
        `[..., d]` in weight's dtype.

    Raises:
        TypeError: a dtype other than those above, or a DTensor.
        ValueError: a shape, device, weight or mode other than those above.
        IndexError: an id outside `[0, V)` that is not `padding_idx`; names the id and its place. On other devices than
            the CPU the device's own check stops instead, as in torch's embedding.
        RuntimeError: on a second derivative, which is not implemented.

    Source: arXiv 2605.06546, the input of the superposition phase.
    """
    check_tensor("input_ids", input_ids, INTEGER)
    check_tensor("weight", weight, FLOATING)
    if input_ids.dim() < 1 or input_ids.shape[-1] < 1:
        raise ValueError(f"input_ids: expected [..., bag_size] with bag_size >= 1, got shape {tuple(input_ids.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [num_embeddings, embedding_dim], got shape {tuple(weight.shape)}")
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode: expected 'mean' or 'sum', got {mode!r}")
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx)
    check_same_device(input_ids=input_ids, weight=weight)
    weights = checked_position_weights(position_weights, input_ids.shape[-1], weight)
    return _BagEmbedding.apply(input_ids, weight, mode, padding_idx, weights, link(weight))


class _BagEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        input_ids: Tensor,
        weight: Tensor,
        mode: str,
        padding_idx: int | None,
        position_weights: Tensor | None,
        link: Tensor | None,
    ) -> Tensor:
        return torch.ops.tst_ext.bag_embedding(
            input_ids, weight, mode, padding_idx=padding_idx, position_weights=position_weights
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input_ids, weight, ctx.mode, ctx.padding_idx, position_weights, link = inputs
        ctx.save_for_backward(input_ids, position_weights, link)
        ctx.num_embeddings = weight.shape[0]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_ids, position_weights, _ = ctx.saved_tensors
        gradient = torch.ops.tst_ext.bag_embedding_backward(
            grad,
            input_ids,
            ctx.num_embeddings,
            ctx.mode,
            padding_idx=ctx.padding_idx,
            position_weights=position_weights,
        )
        return None, gradient, None, None, None, None


@torch.library.register_fake("tst_ext::bag_embedding")
def _(
    input_ids: Tensor,
    weight: Tensor,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    return weight.new_empty(*input_ids.shape[:-1], weight.shape[1])


@torch.library.register_fake("tst_ext::bag_embedding_backward")
def _(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[-1])


# ---- what both losses return --------------------------------------------------------------------------------------


def _results(
    loss: Tensor,
    lse: Tensor,
    rows: torch.Size,
    labels: Tensor,
    position_scale: Tensor,
    options: dict[str, Any],
    return_lse: bool,
    return_z_loss: bool,
) -> Any:
    """What the public functions return, from the loss and lse `[N]` of the op."""
    per_row = options["reduction"] == "none"
    results = [loss.view(rows) if per_row else loss]
    if return_lse:
        results.append(lse.view(rows))
    if return_z_loss:
        scale = row_scale_of(labels, position_scale, options["objective"], options["ignore_index"])
        z = options["z_loss"] * scale * torch.where(scale == 0, 0, lse).square()
        results.append(z.view(rows) if per_row else z.sum())
    return tuple(results) if len(results) > 1 else results[0]


# ---- linear_multi_hot_cross_entropy -----------------------------------------------------------------------------


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
    memory_budget: int | None = None,
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
        memory_budget: the same in bytes of logits, one row's at least, in the place of `chunk_size`.
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
    check_tensor("labels", labels, INTEGER)
    if bias is not None:
        check_tensor("bias", bias, FLOATING)
    check_loss_options(
        objective, ignore_index, reduction, normalizer, position_weights, logit_softcap, z_loss, label_smoothing
    )
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
    rows = checked_rows(hidden, tp_group, sequence_parallel)
    bag_size = checked_bag_size(labels, rows, f"hidden of shape {tuple(hidden.shape)}")
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    if memory_budget is not None and tp_group is not None:
        raise ValueError("memory_budget: with tp_group expected chunk_size, which all processes must give alike")
    if memory_budget is not None:
        chunk_size = _rows_within(memory_budget, chunk_size, weight, bias is not None)
    weights = checked_position_weights(position_weights, bag_size, hidden)
    check_same_device(hidden=hidden, weight=weight, bias=bias, labels=labels)

    bags = labels.reshape(math.prod(rows), bag_size)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scale = position_scale_of(bags, dtype, weights, objective, ignore_index, reduction, normalizer)
    options: dict[str, Any] = dict(
        objective=objective,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        logit_softcap=logit_softcap,
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
        chunk_size=chunk_size,
    )
    apply = _LinearMultiHotCrossEntropy.apply
    if tp_group is not None:
        options |= dict(tp_group=tp_group, sequence_parallel=sequence_parallel)
        apply = torch.compiler.disable(apply)
    # Outside a graph the Function's own needs_input_grad would still be true, and two GEMMs wasted.
    now = torch.is_grad_enabled() and reduction != "none"
    wants = tuple(now and t is not None and t.requires_grad for t in (hidden, weight, bias))
    keep = reduction == "none" or return_lse or return_z_loss  # hidden and weight: the backward may need the logits
    loss, lse = apply(hidden, weight, bias, labels, scale, options, wants, keep, link(hidden, weight, bias))[:2]
    return _results(loss, lse, rows, bags, scale, options, return_lse, return_z_loss)


def _rows_within(memory_budget: int, chunk_size: int | None, weight: Tensor, bias: bool) -> int:
    """The chunk_size whose logits, float32 for float16, take `memory_budget` bytes."""
    check_integer("memory_budget", memory_budget, 1)
    if chunk_size is not None:
        raise ValueError(f"chunk_size, memory_budget: expected one of them, got {chunk_size} and {memory_budget}")
    columns = weight.shape[0] if weight.device.type == "cpu" else padded_columns(weight.shape[0], bias)
    row = columns * (4 if weight.dtype == torch.float16 else weight.element_size())
    if memory_budget < row:
        raise ValueError(f"memory_budget: expected at least {row} bytes, the logits of a row, got {memory_budget}")
    return memory_budget // max(1, row)


def _linear_op(options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    if "tp_group" in options:
        return vocab_parallel.linear_multi_hot_cross_entropy
    return torch.ops.tst_ext.linear_multi_hot_cross_entropy


class _LinearMultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        position_scale: Tensor,
        options: dict[str, Any],
        wants: tuple[bool, bool, bool],  # gradients computed now: hidden's, weight's, bias's
        keep: bool,
        link: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _linear_op(options)(
            hidden,
            weight,
            labels,
            position_scale,
            bias=bias,
            grad_hidden=wants[0],
            grad_weight=wants[1],
            grad_bias=wants[2],
            **options,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, labels, position_scale, ctx.options, ctx.wants, keep, link = inputs
        _, lse, *gradients = output
        ctx.mark_non_differentiable(*gradients, *(() if keep else (lse,)))
        ctx.set_materialize_grads(False)
        kept = (hidden, weight, bias, labels, position_scale) if keep else (None,) * 5
        ready = (g if wanted else None for g, wanted in zip(gradients, ctx.wants, strict=True))
        ctx.save_for_backward(*ready, *kept, link)
        ctx.dtype = hidden.dtype

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *ready, hidden, weight, bias, labels, position_scale, _ = ctx.saved_tensors
        per_row = ctx.options["reduction"] == "none"
        gradients: list[Tensor | None] = [None, None, None]
        if grad_loss is not None and not per_row:
            gradients = [None if g is None else _scaled(g, grad_loss, ctx.dtype) for g in ready]
        if hidden is not None and (grad_lse is not None or (per_row and grad_loss is not None)):
            upstream = grad_loss if per_row and grad_loss is not None else position_scale.new_zeros(())
            needs = ctx.needs_input_grad[:3]
            more = _linear_op(ctx.options)(
                hidden,
                weight,
                labels,
                position_scale,
                bias=bias,
                grad_loss=upstream,
                grad_lse=grad_lse,
                grad_hidden=needs[0],
                grad_weight=needs[1],
                grad_bias=needs[2],
                **ctx.options,
            )[2:]
            gradients = [_sum(g, m, ctx.dtype) if n else None for g, m, n in zip(gradients, more, needs, strict=True)]
        return *gradients, None, None, None, None, None, None


def _sum(gradient: Tensor | None, more: Tensor, dtype: torch.dtype) -> Tensor:
    more = more.to(dtype)
    return more if gradient is None else gradient + more


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` rounded once to dtype, without a second gradient in float32 where that can be avoided.

    In place, or not at all for a factor of 1, the usual `loss.backward()`. Not where a compiler traces, and not from a
    graph that is kept: a second backward would find the gradient changed. Reading the factor on the host is free on the
    CPU only; elsewhere product and rounding are one pass.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
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


# ---- multi_hot_cross_entropy ------------------------------------------------------------------------------------


def multi_hot_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
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
    inplace: bool = False,
) -> Any:
    """Multi-hot cross-entropy of logits that exist already, one pass over them forward and one backward.

    The options, the result and the errors are those of `linear_multi_hot_cross_entropy`, which spares the logits.

    Args:
        logits: `[..., V]`, float32, bfloat16, float16 or float64.
        labels: `[..., s]`, or `[...]` for s = 1.
        inplace: the backward pass writes the gradient over the logits instead of into memory of its own. They must be
            contiguous, not a leaf that requires grad, and not needed by another op's backward; a second backward
            through a kept graph raises RuntimeError. Under torch.compile, which places memory itself, without effect.

    Source: arXiv 2605.06546, multi-hot cross-entropy and its sum-to-one variant.
    """
    check_tensor("logits", logits, FLOATING)
    check_tensor("labels", labels, INTEGER)
    check_loss_options(
        objective, ignore_index, reduction, normalizer, position_weights, logit_softcap, z_loss, label_smoothing
    )
    if logits.dim() < 1:
        raise ValueError("logits: expected [..., V], got a 0-d tensor")
    if inplace and (not logits.is_contiguous() or (logits.is_leaf and logits.requires_grad)):
        raise ValueError(
            "inplace: expected contiguous logits that are not a leaf that requires grad, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}, is_leaf={logits.is_leaf}"
        )
    rows = logits.shape[:-1]
    bag_size = checked_bag_size(labels, rows, f"logits of shape {tuple(logits.shape)}")
    weights = checked_position_weights(position_weights, bag_size, logits)
    check_same_device(logits=logits, labels=labels)
    bags = labels.reshape(math.prod(rows), bag_size)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scale = position_scale_of(bags, dtype, weights, objective, ignore_index, reduction, normalizer)
    options = dict(
        objective=objective,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        logit_softcap=logit_softcap,
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
    )
    loss, lse = _MultiHotCrossEntropy.apply(logits, labels, scale, options, inplace, link(logits))
    return _results(loss, lse, rows, bags, scale, options, return_lse, return_z_loss)


class _MultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        position_scale: Tensor,
        options: dict[str, Any],
        inplace: bool,
        link: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.tst_ext.multi_hot_cross_entropy(logits, labels, position_scale, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, labels, position_scale, ctx.options, ctx.inplace, link = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, position_scale, link)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, position_scale, _ = ctx.saved_tensors
        # A compiler decides about memory itself, and does not see that another op needs these logits.
        inplace = ctx.inplace and not torch.compiler.is_compiling()
        gradient = logits if inplace else logits.clone(memory_format=torch.contiguous_format)
        options = {name: value for name, value in ctx.options.items() if name != "reduction"}
        torch.ops.tst_ext.multi_hot_cross_entropy_backward_(
            gradient,
            labels,
            position_scale,
            grad_loss=position_scale.new_zeros(()) if grad_loss is None else grad_loss,
            grad_lse=grad_lse,
            **options,
        )
        if inplace:
            torch.autograd.graph.increment_version(logits)  # a second backward finds its saved logits changed
        return gradient, None, None, None, None, None


@torch.library.register_fake("tst_ext::multi_hot_cross_entropy")
def _(
    logits: Tensor, labels: Tensor, position_scale: Tensor, *, reduction: str = "sum", **options: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = math.prod(logits.shape[:-1])
    return logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype), logits.new_empty(rows, dtype=dtype)


@torch.library.register_fake("tst_ext::multi_hot_cross_entropy_backward_")
def _(logits: Tensor, labels: Tensor, position_scale: Tensor, **options: Any) -> None:
    return None


@torch.library.register_fake("tst_ext::multi_hot_cross_entropy_rows_")
def _(logits: Tensor, labels: Tensor, position_scale: Tensor, loss: Tensor, lse: Tensor, **options: Any) -> None:
    return None
