"""The loop over chunks of rows in Python, run on the CPU: docs/kernels.md says why it is as it is."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from helpers.cases import fused, loss_and_gradients, loss_case
from tst_ext.ops import chunked


class TestWithoutKernels:
    @pytest.mark.parametrize("chunk_size", [1, 10, 37, None])
    def test_chunks(self, without_kernels, chunk_size):
        case = loss_case(37, 24, 101, 4, torch.float64, "cpu", bias=True)
        whole = loss_and_gradients(fused, *case, chunk_size=37)
        for a, b in zip(loss_and_gradients(fused, *case, chunk_size=chunk_size), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)

    def test_largest_tensor_is_a_chunk_of_logits(self):
        class Largest(torch.utils._python_dispatch.TorchDispatchMode):
            elements = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for t in out if isinstance(out, tuple) else (out,):
                    if isinstance(t, torch.Tensor):
                        self.elements = max(self.elements, t.numel())
                return out

        hidden, weight, _, labels = loss_case(512, 4, 1000, 3, torch.float32, "cpu")
        with Largest() as largest:
            chunked.linear_multi_hot_cross_entropy(
                hidden, weight, labels, torch.ones(3), chunk_size=64, grad_hidden=True, grad_weight=True
            )
        assert largest.elements == 64 * 1024  # rows padded to 128 bytes


class TestLoopForCuda:
    def test_chunks_take_a_32nd_of_the_memory(self, monkeypatch):
        def rows(gibibytes, vocabulary, element_size):
            device = SimpleNamespace(total_memory=gibibytes << 30)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
            return chunked.chunk_rows(100_000, vocabulary, element_size, torch.device("cuda"))

        assert rows(80, 128256, 4) == 5120 and 5120 * 128256 * 4 <= 2.5 * 2**30 < 6144 * 128256 * 4
        assert rows(24, 128256, 2) == 3072  # 3139, in steps of 1024
        assert rows(80, 128256, 2) == 8192  # no more, though they would fit
        assert rows(80, 1_000_000, 4) == 2048  # no less, though they do not fit

    def test_a_divided_head_has_as_many_chunks_everywhere(self):
        assert chunked.chunk_rows(100_000, None, 2, torch.device("cuda")) == 8192
        assert chunked.chunk_rows(100_000, None, 2, torch.device("cpu")) == 512

    @pytest.mark.parametrize("bias", [False, True])
    def test_rows_are_padded_where_no_bias_would_be_rounded(self, bias):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float32, "cpu", bias=bias)
        strides = []
        chunked.in_chunks(
            lambda z, *_, **__: strides.append(z.stride(0)), 6, hidden, weight, labels, torch.ones(4), bias=bias
        )
        assert strides == [64 if bias is None else 50]

    def test_scaled_copy(self):
        source, factor = torch.tensor([1 / 3, -7, 131008]), torch.tensor(0.5)  # 65504 is float16's largest
        out = torch.empty(3, dtype=torch.float16)
        torch.ops.tst_ext.scaled_copy_(out, source, factor)
        assert torch.equal(out, (source * factor).half()) and out[2] == 65504

    def test_products_add_up(self):
        a, b = (torch.randn(9, 9, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        for dtype in (torch.float32, torch.bfloat16):  # in bfloat16: by way of a rounded product
            x, y = a.to(dtype), b.to(dtype)
            out = torch.full((9, 9), float("nan"))
            chunked._add_product(out, x, y, False)
            torch.testing.assert_close(out, (x @ y).float(), rtol=1e-6, atol=1e-6)
            chunked._add_product(out, x, y / 4096, True)  # which a sum in bfloat16 would lose
            torch.testing.assert_close(out, (x @ y).float() + (x @ (y / 4096)).float(), rtol=1e-6, atol=1e-6)

    def test_rows_of_a_strided_view(self):
        _, _, _, labels = loss_case(6, 1, 50, 4, torch.float32, "cpu")
        logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        scale = torch.full((4,), 0.25)
        whole, strided = logits[:, :50].contiguous(), logits.clone()
        (loss, lse), (loss2, lse2) = torch.empty(2, 6), torch.empty(2, 6)
        rows = torch.ops.tst_ext.multi_hot_cross_entropy_rows_
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no kernel
            rows(whole, labels, scale, loss, lse, gradient=True)
            rows(strided[:, :50], labels, scale, loss2, lse2, gradient=True)
        assert torch.equal(loss, loss2) and torch.equal(lse, lse2) and torch.equal(strided[:, :50], whole)
        assert torch.equal(strided[:, 50:], logits[:, 50:])
        wanted = torch.ops.tst_ext.multi_hot_cross_entropy(logits[:, :50], labels, scale, reduction="none")
        torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-6)
