"""bfloat16 on the CPU: multiplied as it is where the processor has instructions for it, else in float32."""

import platform
from pathlib import Path

import pytest
import torch

from helpers.cases import check_loss, fused, loss_and_gradients, loss_case, pairwise, plain
from helpers.numerics import relative_error
from tst_ext import _C
from tst_ext.ops import chunked

OP = torch.ops.tst_ext.linear_multi_hot_cross_entropy
CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture
def in_float32():
    before = _C.cpu_bfloat16_gemms()
    _C.set_cpu_bfloat16_gemms(False)
    yield
    _C.set_cpu_bfloat16_gemms(before)


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux lists the instruction sets")
def test_the_processor_decides():
    names = {"x86_64": ("flags", "avx512_bf16"), "aarch64": ("Features", "bf16")}
    key, name = names[platform.machine()]
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith(key))
    assert _C.cpu_bfloat16_gemms() == (name in line.split())


class TestResults:
    @pairwise(
        kernels=["compiled", "plain_torch"], bfloat16_gemms=[True, False], objective=["mce", "mce_alt"],
        reduction=["mean", "none"], bias=[False, True], chunk_size=[7, None], upstream=[1.0, 0.37],
        options=[{}, dict(z_loss=1e-2), dict(logit_softcap=5.0, label_smoothing=0.1)],
        fixtures=["kernels", "bfloat16_gemms"],
    )  # fmt: skip
    def test_loss_and_gradients(
        self, kernels, bfloat16_gemms, objective, reduction, bias, chunk_size, upstream, options
    ):
        case = loss_case(30, 24, 101, 4, torch.bfloat16, "cpu", bias=bias)
        check_loss(*case, upstream, objective=objective, reduction=reduction, chunk_size=chunk_size, **options)

    def test_dtypes(self, bfloat16_gemms, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.bfloat16, "cpu", bias=True)
        wants = dict(grad_hidden=True, grad_weight=True, grad_bias=True)
        for options in ({}, wants):
            results = OP(hidden, weight, labels, torch.ones(4), bias=bias, **options)
            assert {t.dtype for t in results} == {torch.float32}

    def test_in_float32_it_is_the_float32_op_of_the_same_numbers(self, in_float32, kernels):
        hidden, weight, bias, labels = loss_case(30, 24, 101, 4, torch.bfloat16, "cpu", bias=True)
        wide = [t.float() for t in (hidden, weight, bias)]
        for wanted in (False, True):
            options = dict(chunk_size=7, grad_hidden=wanted, grad_weight=wanted, grad_bias=wanted)
            mine = OP(hidden, weight, labels, torch.ones(4), bias=bias, **options)
            others = OP(*wide[:2], labels, torch.ones(4), bias=wide[2], **options)
            assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))

    @pytest.mark.parametrize("objective", ["mce", "mce_alt"])
    def test_in_float32_it_errs_no_more_than_in_bfloat16(self, in_float32, objective):
        case = loss_case(600, 64, 3000, 4, torch.bfloat16, "cpu", bias=True)
        exact = loss_and_gradients(plain, *(t.double() for t in case[:3]), case[3], objective=objective)
        mine = loss_and_gradients(fused, *case, objective=objective)
        _C.set_cpu_bfloat16_gemms(True)
        as_it_is = loss_and_gradients(fused, *case, objective=objective)
        for actual, other, wanted in zip(mine, as_it_is, exact, strict=True):
            assert relative_error(actual, wanted) <= 1.001 * relative_error(other, wanted)
            assert relative_error(actual, wanted) < torch.finfo(torch.bfloat16).eps / 2  # rounded once

    def test_a_large_weight_is_converted_in_blocks(self, in_float32, gemm):
        # 16 MiB hold 64 rows of this d.
        hidden, weight, bias, labels = loss_case(4, 65536, 130, 3, torch.bfloat16, "cpu", bias=True)
        labels[:3, 0] = torch.tensor([0, 64, 129])  # one in each block
        mine = loss_and_gradients(fused, hidden, weight, bias, labels, chunk_size=3)
        exact = loss_and_gradients(plain, *(t.double() for t in (hidden, weight, bias)), labels)
        for actual, wanted in zip(mine, exact, strict=True):
            assert relative_error(actual, wanted) < torch.finfo(torch.bfloat16).eps / 2
        for loss in (mine[0], fused(hidden, weight, bias, labels, chunk_size=3)):  # with gradients, and without
            assert relative_error(loss, exact[0]) < 1e-5  # sums of 65536 terms


class TestLoopInPython:
    """The Python loop over chunks, for a divided head and for devices without kernels, follows the same rule."""

    def test_dtype_of_the_logits(self, bfloat16_gemms):
        hidden, weight, _, labels = loss_case(6, 8, 50, 4, torch.bfloat16, "cpu")
        seen = []
        chunked.in_chunks(lambda z, *_, **__: seen.append(z.dtype), 6, hidden, weight, labels, torch.ones(4))
        assert seen == [torch.bfloat16 if bfloat16_gemms else torch.float32]

    def test_elsewhere_than_on_the_cpu_bfloat16_stays(self, in_float32):
        for device in ("cuda", "mps"):
            assert chunked.compute_dtype(torch.bfloat16, torch.device(device)) == torch.bfloat16
        for dtype in (torch.float32, torch.float64):
            assert chunked.compute_dtype(dtype, torch.device("cpu")) == dtype
