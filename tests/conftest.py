"""Fixtures shared by all tests: every op test runs on CPU, and on CUDA where there is a device."""

import os
import warnings

# One thread, here and in processes of the tests: results are the same on any machine, and workers do not compete for
# its cores. Tests named test_*thread* set other numbers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from helpers import emulated
from helpers.cases import CAPABILITIES, DEVICES, KERNELS
from tst_ext import _C
from tst_ext.ops import IN_PYTHON

# The same examples in every run, so that a red one is a change's doing; --hypothesis-profile=explore draws others.
settings.register_profile("default", deadline=None, max_examples=250, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=5000)
settings.load_profile("default")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def default_device(device: torch.device):
    """`device` in turn as the one that new tensors are on."""
    if device.type != "cpu":
        torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Each instruction set in turn."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(params=_C.cpu_gemms()[1:])
def gemm(request):
    """Each library that multiplies matrices in turn."""
    before = _C.cpu_gemm()
    _C.set_cpu_gemm(request.param)
    yield request.param
    _C.set_cpu_gemm(before)


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def bfloat16_gemms(request):
    """bfloat16 matrices multiplied on the CPU as they are, then in float32, whichever this processor does."""
    before = _C.cpu_bfloat16_gemms()
    _C.set_cpu_bfloat16_gemms(request.param)
    yield request.param
    _C.set_cpu_bfloat16_gemms(before)


@pytest.fixture
def without_kernels():
    """The ops as on a device that has no compiled kernel."""
    library = torch.library.Library("tst_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, and that there is none
        for op in IN_PYTHON:
            for key in ("CPU", "CUDA"):
                library.impl(op.__name__, op, key, allow_override=True)
        yield
    library._destroy()


@pytest.fixture
def emulated_cuda():
    """The ops of a CUDA build, on the host."""
    with emulated.ops_for_cuda():
        yield


@pytest.fixture(params=KERNELS)
def kernels(request):
    """The compiled kernels, then none; in `make cuda-host-test` those for CUDA too."""
    if request.param != "compiled":
        request.getfixturevalue({"plain_torch": "without_kernels"}.get(request.param, request.param))
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="random moments at which tests/train/test_kill.py kills")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")
