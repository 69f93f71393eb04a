"""Checks of single arguments: each error names the argument, what came and what was wanted."""

import math
import sys

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "placements"):  # a DTensor, without importing torch.distributed
        raise TypeError(
            f"{name}: expected a plain tensor, got a {type(tensor).__name__} with placements {tensor.placements}. "
            "Call the op inside the forward of the module that FSDP2 wraps, where its parameters are whole, or pass "
            f"{name}.full_tensor(); for a head divided over the vocabulary pass {name}.to_local() and tp_group="
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
    if not isinstance(value, int | float) or not 0 <= value <= min(most, sys.float_info.max):
        wanted = "a finite number >= 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_integer(name: str, value: int, least: int = -(2**63)) -> None:
    if not isinstance(value, int | torch.SymInt) or not least <= value < 2**63:
        wanted = "an integer of 64 bits" if least < 0 else f"an integer >= {least}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def is_readable(tensor: Tensor) -> bool:
    """Tell whether reading a tensor's numbers waits for nothing: on the CPU, and not while tracing."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def values_of(tensor: Tensor) -> list[float] | None:
    """The numbers of a small tensor where reading them costs nothing."""
    return tensor.flatten().tolist() if is_readable(tensor) else None
