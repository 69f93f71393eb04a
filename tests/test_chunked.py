"""The loop over chunks of rows in Python, run on the CPU: docs/kernels.md says why it is as it is."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import profiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cases import DTYPES, check_loss, fused, generator, loss_and_gradients, loss_case, plain
from helpers.numerics import relative_error
from tst_ext.ops import chunked

OP = torch.ops.tst_ext.linear_multi_hot_cross_entropy


class TestWithoutKernels:
    @pytest.mark.parametrize("chunk_size", [1, 10, 37, None])
    def test_chunks(self, without_kernels, chunk_size):
        case = loss_case(37, 24, 101, 4, torch.float64, "cpu", bias=True)
        whole = loss_and_gradients(fused, *case, chunk_size=37)
        for a, b in zip(loss_and_gradients(fused, *case, chunk_size=chunk_size), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)

    def test_largest_tensor_is_a_chunk_of_logits(self):
        class Largest(TorchDispatchMode):
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [4, 6])
def test_the_fake_has_the_dtypes_of_the_op(kernels, dtype, chunk_size):
    hidden, weight, bias, labels = loss_case(6, 8, 50, 4, dtype, "cpu", bias=True)
    arguments = hidden, weight, labels, torch.ones(4, dtype=torch.promote_types(dtype, torch.float32))
    options = dict(bias=bias, chunk_size=chunk_size, grad_hidden=True, grad_weight=True, grad_bias=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = OP(*(mode.from_tensor(t) for t in arguments), **options | dict(bias=mode.from_tensor(bias)))
    for real, fake in zip(OP(*arguments, **options), fakes, strict=True):
        assert (real.dtype, real.shape) == (fake.dtype, fake.shape)


@pytest.fixture
def cuda_dtypes(monkeypatch, without_kernels):
    """GEMMs and gradients on the CPU in the dtypes that they have on CUDA."""
    rule, computed = chunked.gradient_dtype, chunked.compute_dtype
    monkeypatch.setattr(chunked, "gradient_dtype", lambda dtype, _: rule(dtype, torch.device("cuda")))
    monkeypatch.setattr(chunked, "compute_dtype", lambda dtype, _: computed(dtype, torch.device("cuda")))


class TestBfloat16Gradients:
    """The gradients that the op itself returns, as on CUDA."""

    CASE = dict(dim=64, vocabulary=300, bag_size=4, dtype=torch.bfloat16, device="cpu", bias=True)

    def test_dtypes(self):
        cpu, cuda, other = (torch.device(name) for name in ("cpu", "cuda", "mps"))
        for dtype, on_cpu, elsewhere in (
            (torch.float32, torch.float32, torch.float32),
            (torch.float64, torch.float64, torch.float64),
            (torch.float16, torch.float32, torch.float32),  # until the scale of the loss has multiplied them
            (torch.bfloat16, torch.float32, torch.bfloat16),
        ):
            assert chunked.gradient_dtype(dtype, cpu) == on_cpu
            assert chunked.gradient_dtype(dtype, cuda) == chunked.gradient_dtype(dtype, other) == elsewhere

    @pytest.mark.parametrize("chunk_size", [1, 7, 30])
    @pytest.mark.parametrize("upstream", [1.0, -2.0, 0.37])
    @pytest.mark.parametrize("options", [{}, dict(reduction="none")], ids=str)
    def test_loss_and_gradients(self, cuda_dtypes, chunk_size, upstream, options):
        check_loss(*loss_case(30, **self.CASE), upstream, chunk_size=chunk_size, **options)

    @pytest.mark.parametrize("chunk_size", [7, 30])
    def test_a_gradient_of_lse_is_added(self, cuda_dtypes, chunk_size):
        def with_lse(*arguments, **options):
            loss, lse = fused(*arguments, return_lse=True, **options)
            return loss + 0 * lse.sum()

        check_loss(*loss_case(30, **self.CASE), 0.37, with_lse, chunk_size=chunk_size)

    @pytest.mark.parametrize("upstream", [1.0, 0.37])
    @pytest.mark.parametrize("objective", ["mce", "mce_alt"])
    def test_an_upstream_rounds_once_more(self, cuda_dtypes, upstream, objective):
        # As test_no_less_exact_than_plain_torch, which explains the exception.
        case = loss_case(600, 64, 3000, 4, torch.bfloat16, "cpu", bias=True)
        mine = loss_and_gradients(fused, *case, upstream, objective=objective, chunk_size=600)
        others = loss_and_gradients(plain, *case, upstream, objective=objective)
        exact = loss_and_gradients(plain, *(t.double() for t in case[:3]), case[3], upstream, objective=objective)
        again = torch.finfo(torch.bfloat16).eps / 2 if upstream == 0.37 else 0
        for actual, wanted, other in zip(mine, exact, others, strict=True):
            assert relative_error(actual, wanted) <= 1.1 * relative_error(other, wanted) + again

    def test_chunks_add_up_in_float32(self):
        # 300 ones: a sum in bfloat16 would stay at 256.
        hidden, weight = torch.ones(300, 2, dtype=torch.bfloat16), torch.ones(5, 2, dtype=torch.bfloat16)
        for chunk_size in (1, 300):
            _, _, dh, dw, db = chunked.in_chunks(
                lambda z, *_, **__: z.fill_(1), chunk_size, hidden, weight, torch.zeros(300, 1).long(), torch.ones(1),
                grad_hidden=True, grad_weight=True, grad_bias=True, grad_dtype=torch.bfloat16,
            )  # fmt: skip
            assert dh.dtype == dw.dtype == torch.bfloat16 and db.dtype == torch.float32
            assert (dh == 5).all() and (dw == 300).all() and (db == 300).all()

    @pytest.mark.parametrize(("chunk_size", "chunks"), [(6, 1), (3, 2)])
    def test_logits_are_freed_before_the_sum_is_rounded(self, chunk_size, chunks):
        storages, alive = [], []

        class Allocations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.empty_like.default:
                    alive.append(any(not storage.expired() for storage in storages))
                return func(*args, **(kwargs or {}))

        hidden, weight, _, labels = loss_case(6, 8, 50, 4, torch.bfloat16, "cpu")
        with Allocations():
            chunked.in_chunks(
                lambda z, *_, **__: storages.append(StorageWeakRef(z.untyped_storage())), chunk_size, hidden, weight,
                labels, torch.ones(4), grad_weight=True, grad_dtype=torch.bfloat16,
            )  # fmt: skip
        assert len(storages) == chunks and alive == (chunks > 1) * [False]

    @pytest.mark.parametrize("upstream", [1.0, 0.37])
    def test_the_gradients_are_the_memory_that_the_op_returned(self, cuda_dtypes, upstream):
        returned, scaled = [], []

        class Returned(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if func is OP.default:
                    returned.extend(t.data_ptr() for t in result[2:])
                if func is torch.ops.tst_ext.scaled_copy_.default:
                    scaled.append(args[0].data_ptr() if args[0] is args[1] else None)
                return result

        leaves = [t.requires_grad_() for t in loss_case(6, **self.CASE)[:3]]
        labels = loss_case(6, **self.CASE)[3]
        with Returned():
            (upstream * fused(*leaves, labels)).backward()
        assert [t.grad.data_ptr() for t in leaves[:2]] == returned[:2] == scaled
        assert returned[2] != leaves[2].grad.data_ptr()  # the bias's, which is float32 until now

    def test_kept_graphs_hooks_and_compiled_graphs_have_the_same_gradients(self, cuda_dtypes):
        case = loss_case(30, **self.CASE)

        def gradients(function=fused, backwards=1):
            leaves = [t.clone().requires_grad_() for t in case[:3]]
            loss = function(*leaves, case[3])
            for i in range(backwards):
                (0.37 * loss).backward(retain_graph=i + 1 < backwards)
            return [t.grad for t in leaves]

        once = gradients()
        for a, b in zip(gradients(backwards=2), once, strict=True):
            assert torch.equal(a, 2 * b)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t() if t.dim() else t):
            hooked = gradients()
        compiled = gradients(torch.compile(fused, backend="aot_eager", fullgraph=True))
        for results in (hooked, compiled):
            for a, b in zip(results, once, strict=True):
                assert torch.equal(a, b)


class TestDefaultChunkOnTheCpu:
    """64 MiB, an eighth of all logits (at most 512 rows), or half of the weight's gradient (at most 1024)."""

    def test_rule(self):
        def rows(count, dim, vocabulary, element_size=4):
            return chunked.chunk_rows(count, vocabulary, element_size, torch.device("cpu"), dim)

        assert rows(1024, 1024, 128256) == rows(1024, 1024, 128256, 2) == 512  # half of the gradient
        assert rows(1024, 768, 128256) == 384
        assert rows(1024, 0, 128256) == 130  # no gradient: 64 MiB
        assert rows(4096, 2048, 128256) == rows(4096, 4096, 128256) == 1024  # no more, though 2048 rows would fit
        assert rows(8192, 256, 128256) == 512 and rows(2048, 256, 128256) == 256  # an eighth of all
        assert rows(100_000, 1024, 1024) == 16384  # 64 MiB again

    def test_what_the_rule_is_given(self, bfloat16_gemms, monkeypatch):
        given = []
        monkeypatch.setattr(chunked, "chunk_rows", lambda *arguments: given.append(arguments) or 6)
        for dtype, element in (
            (torch.bfloat16, 2 if bfloat16_gemms else 4),
            (torch.float16, 4),
            (torch.float32, 4),
            (torch.float64, 8),
        ):
            hidden, weight, _, labels = loss_case(6, 8, 50, 4, dtype, "cpu")
            for wanted in (True, False):
                chunked.linear_multi_hot_cross_entropy(hidden, weight, labels, torch.ones(4), grad_weight=wanted)
                assert given.pop() == (6, 50, element, hidden.device, 8 if wanted else 0)

    @pytest.mark.parametrize(("wanted", "chunk"), [(True, 32), (False, 13)])
    def test_the_kernel_has_the_same(self, wanted, chunk):
        # Half of a gradient of 256 MiB; 15 rows, which fit 64 MiB next to 1 MiB of the product, in equal parts.
        rows, dim, vocabulary = 64, 64, 1 << 20
        hidden, weight, labels = torch.zeros(rows, dim), torch.zeros(vocabulary, dim), torch.zeros(rows, 1).long()
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            OP(hidden, weight, labels, torch.ones(1), grad_hidden=True, grad_weight=wanted)
        allocated = [event.self_cpu_memory_usage for event in profile.events()]
        assert chunked.chunk_rows(rows, vocabulary, 4, hidden.device, dim if wanted else 0) in (32, 16)
        assert 4 * chunk * vocabulary in allocated and max(allocated) == 4 * vocabulary * (dim if wanted else chunk)


class TestLoopForCuda:
    def test_chunks_take_a_16th_of_the_memory(self, monkeypatch):
        def rows(gibibytes, vocabulary, element_size):
            device = SimpleNamespace(total_memory=gibibytes << 30)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
            return chunked.chunk_rows(100_000, vocabulary, element_size, torch.device("cuda"))

        assert rows(80, 128256, 4) == 10240 and 10240 * 128256 * 4 <= 5 * 2**30 < 11264 * 128256 * 4
        assert rows(24, 128256, 2) == 6144  # 6279, in steps of 1024
        assert rows(80, 128256, 2) == 16384  # 16743 would be 2^31 logits
        assert rows(80, 49152, 2) == 43008  # a batch of 32768 rows in one chunk
        assert rows(180, 151936, 2) == 13312 < 2**31 / 151936  # fewer than 2^31 logits, though more would fit
        assert rows(24, 1_000_000, 4) == 2048  # no less, though they do not fit

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

    def test_scaled_in_place(self):
        gradient, factor = torch.randn(999, generator=generator()).bfloat16(), torch.tensor(0.3)
        wanted = (gradient.float() * factor).bfloat16()  # of a factor in float32
        torch.ops.tst_ext.scaled_copy_(gradient, gradient, factor)
        assert torch.equal(gradient, wanted)

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
