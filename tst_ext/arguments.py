"""What the public functions check of their arguments, and the normalisation of the loss: no kernel, no autograd."""

import math

import torch
from torch import Tensor

from .bags import position_weights as named_position_weights

__all__: list[str] = []

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "placements"):  # a DTensor, without importing torch.distributed
        raise TypeError(
            f"{name}: expected a plain tensor, got a {type(tensor).__name__} with placements {tensor.placements}. "
            "Call the op inside the forward of the module that FSDP2 wraps, where its parameters are whole, or pass "
            f"{name}.full_tensor()"
        )
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected one of {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {got}")


def check_number(name: str, value: float, most: float = math.inf) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
        wanted = "a finite number >= 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


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
    for i, w in enumerate(_values(given) or ()):
        if not 0 <= w <= torch.finfo(torch.float32).max:
            raise ValueError(f"position_weights[{i}]: expected a finite float32 number >= 0, got {w}")
    return given.to(like.device)


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
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if logit_softcap is not None:
        check_number("logit_softcap", logit_softcap)
        if logit_softcap == 0:
            raise ValueError("logit_softcap: expected a number > 0, or None for no cap, got 0")
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
    w = labels.new_ones(labels.shape[1], dtype=dtype) if position_weights is None else position_weights.to(dtype)
    if normalizer is not None:
        divisor = torch.as_tensor(normalizer, dtype=dtype, device=w.device)
    else:
        count = torch.ones_like(w)
        if reduction == "mean":
            valid = labels != ignore_index
            if objective == "mce_alt":
                valid = valid.any(1, keepdim=True).expand_as(valid)
            count = valid.sum(0).to(dtype)
            w = torch.where(count == 0, 0, w)
        if objective == "mce":
            w = torch.where(w == 0, 0, w / w.amax())  # so that their sum is finite too
            count = count * w.sum()
        divisor = count
    return torch.where(w == 0, 0, w / divisor)  # 0 / 0 where a position, or the whole batch, has no valid label
