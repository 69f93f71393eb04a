"""Checks of single arguments: each error names the argument, what came and what was wanted."""

import math
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "placements"):  # a DTensor, without importing torch.distributed
        advice = f"Pass {name}.full_tensor(), or {name}.to_local() where each process has its own part of the batch"
        if name in ("weight", "bias"):
            advice = (
                "Call the op inside the forward of the module that FSDP2 wraps, where its parameters are whole, or "
                f"pass {name}.full_tensor(), or {name}.to_local() and tp_group= for a head divided over the vocabulary"
            )
        raise TypeError(
            f"{name}: expected a plain tensor, got a {type(tensor).__name__} with placements {tensor.placements}. "
            f"{advice}"
        )
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected one of {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.is_nested or isinstance(tensor, torch.masked.MaskedTensor):
        raise ValueError(f"{name}: expected a dense tensor, got a {'nested' if tensor.is_nested else 'masked'} one")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{name}: expected a tensor without a tangent, because forward-mode derivatives (jvp, jacfwd) are not "
            "implemented. Use backward(), torch.func.grad, vjp or jacrev"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {got}")


def moved(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on `device`, or raise ValueError for one without values."""
    if tensor.is_meta and device.type != "meta":
        raise ValueError(f"{name}: expected a tensor with values for {device}, got one on meta")
    return tensor.to(device)


def check_number(name: str, value: float, most: float = math.inf) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= min(most, sys.float_info.max):
        wanted = "a finite number >= 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_integer(name: str, value: int, least: int = -(2**63)) -> None:
    if not isinstance(value, int | torch.SymInt) or not least <= value < 2**63:
        wanted = "an integer of 64 bits" if least < 0 else f"an integer >= {least}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def values_of(tensor: Tensor) -> list[float] | None:
    """The numbers of a small tensor where reading them costs nothing: on the CPU, and not while tracing."""
    return tensor.flatten().tolist() if is_readable(tensor) else None


def is_readable(tensor: Tensor) -> bool:
    """Tell whether a tensor has numbers in the host's memory: not one that is fake, traced or transformed."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(*tensors: Tensor | None) -> bool:
    """Tell whether torch traces, or torch.func or is_grads_batched wraps a tensor, which may then stand for several."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:  # the latter by make_fx and AOTAutograd
        return True
    wrapped, batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
    return any(wrapped(t) or batched(t) for t in tensors if t is not None)


def is_batched(tensor: Tensor | None) -> bool:
    """Tell whether a tensor stands for several: under vmap, jacrev, or autograd's is_grads_batched, the legacy kind."""
    if tensor is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
