"""Options, checks, normalisation and results that both losses share."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import (
    FLOATING,
    INTEGER,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    moved,
    values_of,
)
from ..bags import check_label_weights, resolved_position_weights


class LossOptions(NamedTuple):
    """The options of csrc/loss.h, under the names that the ops take."""

    objective: str = "mce"
    ignore_index: int = -100
    logit_softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0


def checked_options(
    options: LossOptions, position_weights: str | Tensor | None, label_weights: Tensor | None = None
) -> LossOptions:
    """Return the options in the types of the ops, or raise ValueError for one out of its range."""
    if options.objective not in ("mce", "mce_alt"):
        raise ValueError(f"objective: expected 'mce' or 'mce_alt', got {options.objective!r}")
    if options.objective == "mce_alt":
        for name, given in (("position_weights", position_weights), ("label_weights", label_weights)):
            if given is not None:
                raise ValueError(f"{name}: objective 'mce_alt' takes the labels of a bag as a set, without weights")
    check_integer("ignore_index", options.ignore_index)
    cap = options.logit_softcap
    if cap is not None:
        least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        if not isinstance(cap, int | float) or not least <= cap <= most:
            raise ValueError(f"logit_softcap: expected a float32 number > 0, or None for no cap, got {cap!r}")
    check_number("z_loss", options.z_loss)
    check_number("label_smoothing", options.label_smoothing, 1)
    return options._replace(z_loss=float(options.z_loss), label_smoothing=float(options.label_smoothing))


def check_reduction(reduction: str, normalizer: float | Tensor | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer: it is the divisor of reduction 'mean', got reduction {reduction!r}")
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, FLOATING + INTEGER)
        if normalizer.dim() or normalizer.requires_grad:
            raise ValueError(
                f"normalizer: expected a number or a constant 0-d tensor, got shape {tuple(normalizer.shape)}, "
                f"requires_grad={normalizer.requires_grad}"
            )
        for value in values_of(normalizer) or ():
            check_number("normalizer", value)
    else:
        check_number("normalizer", normalizer)


def checked_bags(labels: Tensor, rows: torch.Size, like: Tensor, name: str) -> Tensor:
    """Return the labels of the rows of `like`, a tensor called `name`, as `[N, s]`."""
    check_tensor("labels", labels, INTEGER)
    check_same_device(**{name: like, "labels": labels})
    bag_size = 1 if labels.shape == rows else labels.shape[-1] if labels.shape[:-1] == rows else 0
    if bag_size < 1:
        raise ValueError(
            f"labels: expected {tuple(rows)} or {(*rows, 's')} with s >= 1 for {name} of shape {tuple(like.shape)}, "
            f"got shape {tuple(labels.shape)}"
        )
    return labels.reshape(math.prod(rows), bag_size)


def checked_label_weights(given: Tensor | None, labels: Tensor, bags: Tensor) -> Tensor | None:
    """Return the weights of the labels, in the shape of `bags`, `[N, s]`."""
    if given is None:
        return None
    check_label_weights(given, labels)
    return given.reshape(bags.shape)


def label_scale_of(
    labels: Tensor,  # [N, s]
    like: Tensor,
    options: LossOptions,
    reduction: str,
    normalizer: float | Tensor | None,
    position_weights: str | Tensor | None,
    label_weights: Tensor | None = None,  # [N, s]
) -> Tensor:
    """Weigh a valid label in the loss: each position's `[s]`, or each label's `[N, s]` if there are `label_weights`.

    For mce_alt this is what a row weighs, s times. Waits for no device.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    given = resolved_position_weights(position_weights, labels.shape[1], like)
    if given is None:
        w = labels.new_ones(labels.shape[1], dtype=dtype)
    else:
        w = given.to(torch.promote_types(given.dtype, dtype))
    u = label_weights
    if u is not None:
        u = torch.where(labels == options.ignore_index, 0, u.to(torch.promote_types(u.dtype, dtype)))
    divisor: float | Tensor
    if normalizer is not None:
        divisor = moved("normalizer", normalizer, w.device) if isinstance(normalizer, Tensor) else normalizer
    else:
        count = torch.ones_like(w)
        if reduction == "mean":
            valid = labels != options.ignore_index
            if options.objective == "mce_alt":
                valid = valid.any(1, keepdim=True).expand_as(valid)
            if u is None:
                count = valid.sum(0).to(w.dtype)
            else:  # over the largest of the position, so that their sum is finite and not 0; the row is for no rows
                u = torch.where(u == 0, 0, u / torch.nn.functional.pad(u, (0, 0, 0, 1)).amax(0))
                count = u.sum(0)
            w = torch.where(count == 0, 0, w)
        if options.objective == "mce":
            w = torch.where(w == 0, 0, w / w.amax())  # so that their sum is finite too
            count = count * w.sum()
        divisor = count
    scale = torch.where(w == 0, 0, w / divisor)  # 0 / 0 where a position, or the batch, has no valid label
    return (scale if u is None else torch.where(u == 0, 0, u * scale)).to(dtype)


def row_scale_of(labels: Tensor, label_scale: Tensor, objective: str, ignore_index: int) -> Tensor:
    """Weigh the terms of a row that belong to no label: `[N]`, S of csrc/loss.h."""
    valid = labels != ignore_index
    if objective == "mce_alt":
        return torch.where(valid.any(1), label_scale[..., 0], 0)
    return torch.where(valid, label_scale, 0).sum(1)


def results(
    loss: Tensor,
    lse: Tensor,  # [N]
    rows: torch.Size,
    labels: Tensor,  # [N, s]
    label_scale: Tensor,  # [s] or [N, s]
    options: LossOptions,
    reduction: str,
    return_lse: bool,
    return_z_loss: bool,
) -> Any:
    """Make the public functions' result from the loss and lse of the op."""
    per_row = reduction == "none"
    returned = [loss.view(rows) if per_row else loss]
    if return_lse:
        returned.append(lse.view(rows))
    if return_z_loss:
        scale = row_scale_of(labels, label_scale, options.objective, options.ignore_index)
        z = options.z_loss * scale * torch.where(scale == 0, 0, lse).square()
        returned.append(z.view(rows) if per_row else z.sum())
    return tuple(returned) if len(returned) > 1 else returned[0]
