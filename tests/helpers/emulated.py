"""The CUDA ops on the host: the library that `make cuda-host-test` builds, its launches run by tests/cpp/emulator.h.

The library registers them for CUDA, as a build for a GPU does. CPU tensors are sent there, so that the dispatcher takes
what it would take on a GPU: a kernel where there is one, else the composite op, which holds the loop over chunks.
"""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tst_ext import _C
from tst_ext.ops import IN_PYTHON, chunked

LIBRARY = os.environ.get("TST_CUDA_HOST", "")
if LIBRARY:
    torch.ops.load_library(LIBRARY)
    _library = ctypes.CDLL(LIBRARY)
    _library.emulated_launches.restype = ctypes.c_int64


class Device(NamedTuple):
    capability: int
    compiled_for: int
    shared_memory: int  # KiB that a block can ask for


DEVICES = {
    "sm_80": Device(80, 80, 163),
    "sm_89": Device(89, 80, 99),
    "sm_90": Device(90, 90, 227),
    "sm_90 with code for sm_80": Device(90, 80, 227),
    "sm_120": Device(120, 100, 99),
}


class Launch(NamedTuple):
    grid: tuple[int, int]
    threads: int
    cluster: int
    shared_bytes: int


def set_device(name: str) -> None:
    device = DEVICES[name]
    _library.emulated_device(device.capability, device.compiled_for, device.shared_memory << 10)


def launches() -> list[Launch]:
    """Those since the last call, in order."""
    values = (ctypes.c_int64 * 100_000)()
    count = _library.emulated_launches(values, len(values))
    assert count <= len(values)
    return [Launch((values[i], values[i + 1]), *values[i + 2 : i + 5]) for i in range(0, count, 5)]


@contextlib.contextmanager
def ops_for_cuda() -> Iterator[None]:
    """The ops on CPU tensors as on CUDA tensors, gradients in CUDA's dtypes, new memory full of NaN."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    library = torch.library.Library("tst_ext", "IMPL")

    def redirect(name: str) -> None:
        op = getattr(torch.ops.tst_ext, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            return op.redispatch(keys, *args, **kwargs)

        library.impl(name, call, "CPU", allow_override=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        for op in IN_PYTHON:
            redirect(op.__name__)
    set_device("sm_90")
    launches()
    rule = chunked.gradient_dtype
    chunked.gradient_dtype = lambda dtype, _: rule(dtype, torch.device("cuda"))
    before, as_they_are = torch.are_deterministic_algorithms_enabled(), _C.cpu_bfloat16_gemms()
    _C.set_cpu_bfloat16_gemms(True)
    torch._C._set_deterministic_algorithms(True)  # the public function imports inductor, which takes seconds
    try:
        yield
    finally:
        chunked.gradient_dtype = rule
        _C.set_cpu_bfloat16_gemms(as_they_are)
        torch._C._set_deterministic_algorithms(before)
        library._destroy()
