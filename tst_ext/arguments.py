"""What the two ops check of their arguments, and the normalisation of the loss: no kernel, no autograd."""

import torch
import torch.distributed as dist
from torch import Tensor

from .bags import position_weights as named_position_weights
from .checks import FLOATING, INTEGER, check_integer, check_number, check_tensor

__all__: list[str] = []


def _values(tensor: Tensor) -> list[float] | None:
    """The numbers of a small tensor where reading them costs nothing: on the CPU, and not while tracing."""
    readable = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return tensor.flatten().tolist() if readable and not torch.compiler.is_compiling() else None


def checked_position_weights(given: str | Tensor | None, bag_size: int, like: Tensor) -> Tensor | None:
    if given is None:
        return None
    if isinstance(given, str):
        dtype = torch.promote_types(like.dtype, torch.float32)
        return named_position_weights(given, bag_size, device=like.device, dtype=dtype)
    check_tensor("position_weights", given, FLOATING + INTEGER)
    if given.shape != (bag_size,) or given.requires_grad:
        raise ValueError(
            f"position_weights: expected a constant tensor of shape ({bag_size},), got shape {tuple(given.shape)}, "
            f"requires_grad={given.requires_grad}"
        )
    if given.is_meta and not like.is_meta:
        raise ValueError(f"position_weights: expected a tensor with values for {like.device}, got one on meta")
    for i, w in enumerate(_values(given) or ()):
        if not 0 <= w <= torch.finfo(torch.float32).max:
            raise ValueError(f"position_weights[{i}]: expected a finite float32 number >= 0, got {w}")
    return given.to(like.device)


def checked_rows(hidden: Tensor, tp_group: "dist.ProcessGroup | None", sequence_parallel: bool) -> torch.Size:
    """The shape of the rows of hidden, those of the whole sequence where hidden is a part of it."""
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


def checked_bag_size(labels: Tensor, rows: torch.Size, of: str) -> int:
    if labels.shape == rows:
        return 1
    if labels.shape[:-1] != rows or labels.shape[-1] < 1:
        raise ValueError(
            f"labels: expected {tuple(rows)} or {(*rows, 's')} with s >= 1 for {of}, got shape {tuple(labels.shape)}"
        )
    return labels.shape[-1]


def check_loss_options(
    objective: str,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    position_weights: str | Tensor | None,
    logit_softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> None:
    if objective not in ("mce", "mce_alt"):
        raise ValueError(f"objective: expected 'mce' or 'mce_alt', got {objective!r}")
    if objective == "mce_alt" and position_weights is not None:
        raise ValueError("position_weights: objective 'mce_alt' sees a bag as a set, which has no positions")
    check_integer("ignore_index", ignore_index)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if logit_softcap is not None:
        least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        if not isinstance(logit_softcap, int | float) or not least <= logit_softcap <= most:
            raise ValueError(f"logit_softcap: expected a float32 number > 0, or None for no cap, got {logit_softcap!r}")
    check_number("z_loss", z_loss)
    check_number("label_smoothing", label_smoothing, 1)
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
        for value in _values(normalizer) or ():
            check_number("normalizer", value)
    else:
        check_number("normalizer", normalizer)


def position_scale_of(
    labels: Tensor,  # [N, s]
    dtype: torch.dtype,
    position_weights: Tensor | None,
    objective: str,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """What one valid label of each position weighs in the loss: `[s]`; for mce_alt what one row weighs, s times.

    Pure tensor code without a look at the numbers, so that nothing waits for the device.
    """
    if position_weights is None:
        w = labels.new_ones(labels.shape[1], dtype=dtype)
    else:
        w = position_weights.to(torch.promote_types(position_weights.dtype, dtype))
    divisor: float | Tensor
    if normalizer is not None:
        divisor = normalizer.to(w.device) if isinstance(normalizer, Tensor) else normalizer
    else:
        count = torch.ones_like(w)
        if reduction == "mean":
            valid = labels != ignore_index
            if objective == "mce_alt":
                valid = valid.any(1, keepdim=True).expand_as(valid)
            count = valid.sum(0).to(w.dtype)
            w = torch.where(count == 0, 0, w)
        if objective == "mce":
            w = torch.where(w == 0, 0, w / w.amax())  # so that their sum is finite too
            count = count * w.sum()
        divisor = count
    return torch.where(w == 0, 0, w / divisor).to(dtype)  # 0 / 0 where a position, or the batch, has no valid label


def row_scale_of(labels: Tensor, position_scale: Tensor, objective: str, ignore_index: int) -> Tensor:
    """What the row's terms that are not a label's weigh: `[N]`."""
    valid = labels != ignore_index
    if objective == "mce_alt":
        return torch.where(valid.any(1), position_scale[0], 0)
    return torch.where(valid, position_scale, 0).sum(1)
