"""linear_multi_hot_cross_entropy where each process of a group holds some rows of the head.

A process runs the row kernel over its own logits. Between the kernel's two passes the group adds up a few numbers per
row of the batch.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunked import chunk_rows, in_chunks
from .loss import LossOptions, row_scale_of
from .plain import capped, row_factors, row_loss, slope

ELSEWHERE = -1  # stands for a label that is ignored, or another process's: it cannot be a row of this one's


def checked_rows(hidden: Tensor, tp_group: "dist.ProcessGroup | None", sequence_parallel: bool) -> torch.Size:
    """Return the shape of the rows of hidden, or of the whole sequence where hidden is a part."""
    rows = hidden.shape[:-1]
    if tp_group is None:
        if sequence_parallel:
            raise ValueError("sequence_parallel: only with tp_group")
        return rows
    if tp_group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns there
        raise ValueError("tp_group: expected a group that this process is in")
    if not isinstance(tp_group, dist.ProcessGroup):
        wanted = ": mesh.get_group() of a DeviceMesh" if hasattr(tp_group, "get_group") else ""
        raise TypeError(f"tp_group: expected a torch.distributed ProcessGroup{wanted}, got {type(tp_group).__name__}")
    if not sequence_parallel:
        return rows
    if not rows:
        raise ValueError(f"hidden: expected [..., l / processes, d] with sequence_parallel, got {tuple(hidden.shape)}")
    return torch.Size((*rows[:-1], rows[-1] * dist.get_world_size(tp_group)))


def shard_of(weight: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """Return the first row of the head in `weight`, and V: 0-d tensors on its device, so that nothing waits."""
    sizes = [torch.zeros((), dtype=torch.int64, device=weight.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.full_like(sizes[0], weight.shape[0]), group=group)
    ends = torch.stack(sizes).cumsum(0)
    return ends[dist.get_rank(group)] - weight.shape[0], ends[-1]


def linear_multi_hot_cross_entropy(
    tp_group: "dist.ProcessGroup",
    sequence_parallel: bool,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    *,
    chunk_size: int | None = None,
    grad_hidden: bool = False,
    **keywords: Any,  # the others of the op
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the op: loss and lse of the group, and gradients of weight and bias of this process's rows."""
    options = LossOptions(**{name: keywords.pop(name) for name in LossOptions._fields if name in keywords})
    first, vocabulary = shard_of(weight, tp_group)
    valid = labels != options.ignore_index
    outside = valid & ((labels < 0) | (labels >= vocabulary))
    if labels.device.type == "cpu" and outside.any():
        at = outside.nonzero()[0].tolist()
        raise IndexError(
            f"labels{at} = {labels[tuple(at)]} is out of range: expected 0 <= id < {int(vocabulary)}, the rows of all "
            f"processes, or ignore_index = {options.ignore_index}"
        )
    if sequence_parallel:
        hidden = hidden.contiguous()
        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size(tp_group))]
        dist.all_gather(parts, hidden, group=tp_group)
        hidden = torch.cat(parts, -2)
    loss, lse, dhidden, dweight, dbias = in_chunks(
        partial(_rows, tp_group, first, vocabulary, options),
        chunk_size or chunk_rows(labels.numel(), None, hidden.element_size(), hidden.device),
        hidden,
        weight,
        labels,
        label_scale,
        grad_hidden=grad_hidden,
        **keywords,
    )
    if grad_hidden and sequence_parallel:
        parts = [part.contiguous() for part in dhidden.chunk(dist.get_world_size(tp_group), -2)]
        dhidden = torch.empty_like(parts[0])
        dist.reduce_scatter(dhidden, parts, group=tp_group)
    elif grad_hidden:
        dist.all_reduce(dhidden, group=tp_group)
    return loss, lse, dhidden, dweight, dbias


def _rows(
    group: "dist.ProcessGroup",
    first: Tensor,
    vocabulary: Tensor,
    options: LossOptions,
    logits: Tensor,  # [N, V of this process], overwritten by their gradient if asked for
    labels: Tensor,  # [N, s]
    label_scale: Tensor,  # [s] or [N, s]
    loss: Tensor,  # [N]
    lse: Tensor,  # [N]
    *,
    grad_loss: Tensor | None,  # [] or [N]
    grad_lse: Tensor | None,  # [N]
    gradient: bool,
) -> None:
    """Run a row pass of the whole group by the formulas of docs/ops.md, "A head divided over processes"."""
    shard = logits.shape[1]
    valid = labels != options.ignore_index
    own = labels - first
    own = torch.where(valid & (own >= 0) & (own < shard), own, ELSEWHERE)
    # An id outside the vocabulary stays one, for the device's own check to stop at.
    own = torch.where(valid & ((labels < 0) | (labels >= vocabulary)), shard, own)
    kernel = partial(
        torch.ops.tst_ext.multi_hot_cross_entropy_rows_,
        logits,
        own,
        label_scale,
        objective=options.objective,
        ignore_index=ELSEWHERE,
        logit_softcap=options.logit_softcap,  # the other options need the whole lse
    )
    kernel(loss, lse)
    wide = label_scale.double()
    scale = row_scale_of(labels, wide, options.objective, options.ignore_index)
    own_scale = row_scale_of(own, wide, options.objective, ELSEWHERE)
    own_loss, own_lse = (t.to(torch.float64, copy=True) for t in (loss, lse))  # which are overwritten below

    # What is added up: exp(own_lse), and of the labels sum_i c_i z_yi ("mce_alt": exp of their own log-sum-exp). As
    # differences from the largest; that of float32 numbers is exact, so a row whose labels are here keeps its digits.
    alternatives = options.objective == "mce_alt"
    at_labels = torch.where(own_scale == 0, 0, own_scale * own_lse - own_loss)
    if alternatives:
        at_labels = torch.where(own_scale == 0, -torch.inf, own_lse - own_loss / own_scale)
    largest = torch.stack([own_lse, at_labels] if alternatives else [own_lse])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    largest = torch.where(largest.isfinite(), largest, 0)
    sums = [(own_lse - largest[0]).exp(), (at_labels - largest[1]).exp() if alternatives else at_labels]
    uniform = torch.zeros((), device=logits.device)
    if options.label_smoothing:
        z = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), options)
        uniform = (z > -torch.inf).to(z.dtype)  # [N, V of this process]
        sums += [torch.where(uniform > 0, z, 0).sum(1, dtype=torch.float64), uniform.sum(1, dtype=torch.float64)]
        if options.logit_softcap is not None:
            uniform *= slope(z, options)
    total = torch.stack(sums)
    dist.all_reduce(total, group=group)

    log_sum = total[0].log()
    all_lse = largest[0] + log_sum
    fit = scale * all_lse - total[1]
    if alternatives:
        fit = scale * (all_lse - largest[1] - total[1].log()).clamp_min(0)
    above_mean = all_lse - total[2] / total[3] if options.label_smoothing else 0
    loss.copy_(row_loss(options, scale, all_lse, fit, above_mean))
    lse.copy_(all_lse)
    if not gradient:
        return

    # The kernel's gradient is (pull S + push) softmax(own logits) - pull a, with S and a those of its own labels.
    factor, pull, g = row_factors(options, scale, all_lse, grad_loss, grad_lse)
    share = torch.where(factor == 0, 0, factor * ((own_lse - largest[0]) - log_sum).exp())
    if alternatives:
        part = torch.where(total[1] == 0, 0, ((at_labels - largest[1]) - total[1].log()).exp())  # 0: all masked
        pull = torch.where((own_scale == 0) | (pull == 0), 0, pull * part)
    push = share - pull * own_scale
    kernel(
        torch.empty_like(loss),
        torch.empty_like(lse),
        grad_loss=pull.to(loss.dtype),
        grad_lse=push.to(loss.dtype),
        gradient=True,
    )
    if options.label_smoothing:
        taken = torch.where(g * scale == 0, 0, options.label_smoothing * g * scale / total[3])
        logits -= uniform * taken.unsqueeze(1)
