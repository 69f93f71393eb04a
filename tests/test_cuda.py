"""What only a CUDA device can show. The tests of the ops run there too, through the fixture `device`.

The class TestSmall is what compute-sanitizer runs: small cases, every kernel.
"""

import subprocess
import sys
import warnings

import pytest
import torch

from helpers.cases import (
    FUNCTIONS,
    IGNORE,
    check_embedding,
    check_loss,
    embedding_case,
    fused,
    loss_and_gradients,
    loss_case,
    plain,
    resolved,
    some_weights,
)
from helpers.numerics import relative_error
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from tst_ext.ops import chunked
from tst_ext.ops import plain as plain_ops

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ALL_OPTIONS = {
    "plain": {},
    "everything": {"logit_softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1, "position_weights": "power_law"},
    "mce_alt": {"objective": "mce_alt", "z_loss": 0.1},
    "none": {"reduction": "none"},
    "label_weights": {"label_weights": some_weights, "label_smoothing": 0.1},
}


def embed(ids, weight, **options):
    weight = weight.detach().clone().requires_grad_()
    out = bag_embedding(ids, weight, **options)
    out.square().sum().backward()
    return out.detach(), weight.grad


class TestSmall:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
    def test_loss(self, dtype, options):
        for vocabulary in (33, 25000):  # one block a row, then a cluster
            case = loss_case(9, 16, vocabulary, 3, dtype, "cuda", bias=True)
            upstream = torch.rand(9, device="cuda") if options.get("reduction") == "none" else 1.0
            for function in FUNCTIONS:
                check_loss(*case, upstream=upstream, function=function, **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"padding_idx": 0, "position_weights": "exponential"}], ids=str)
    def test_embedding(self, dtype, options):
        for dim in (24, 5):
            ids, weight, grad = embedding_case((300, 3), 40, dim, dtype, "cuda")
            assert int(torch.bincount(ids[ids > 0]).max()) > 64  # a row of several pieces, also without id 0
            check_embedding(ids, weight, grad, **options)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scaled_copy(self, dtype):
        factor = torch.tensor(0.3, device="cuda")
        for count in (1, 8, 2059, 300_000):
            for offset in (0, 1):
                source = torch.randn(count + 1, device="cuda")[offset : count + offset]
                out = torch.full((count + 8,), 7, dtype=dtype, device="cuda")
                torch.ops.tst_ext.scaled_copy_(out[:count], source, factor)
                assert torch.equal(out[:count], (source * factor).to(dtype)) and (out[count:] == 7).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scaled_in_place(self, dtype):
        factor, one = (torch.tensor(f, device="cuda") for f in (0.3, 1.0))
        for count in (1, 8, 2059, 300_000, 20_000_000):  # the last one: several passes of the grid
            for offset in (0, 1):
                bits = torch.randint(-(2**15), 2**15, (count + 9,), device="cuda").to(torch.int16)  # NaNs too
                memory = bits.clone().view(dtype)
                out = memory[offset : count + offset]
                torch.ops.tst_ext.scaled_copy_(out, out, one)
                assert torch.equal(memory.view(torch.int16), bits)  # not written: a product has other NaNs
                out.copy_(torch.randn(count, device="cuda"))
                wanted = (out.float() * factor).to(dtype)
                torch.ops.tst_ext.scaled_copy_(out, out, factor)
                assert torch.equal(out, wanted)
                assert torch.equal(memory[count + offset :].view(torch.int16), bits[count + offset :])


class TestLargeVocabularies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("vocabulary", [1, 7, 4097, 49152, 50257, 128256, 151936, 300_000, 600_000, 1_000_003])
    def test_rows_of_every_length(self, vocabulary, dtype):
        check_loss(*loss_case(37, 32, vocabulary, 6, dtype, "cuda"))

    @pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
    def test_options(self, options):
        upstream = torch.rand(20, device="cuda") if options.get("reduction") == "none" else 1.0
        check_loss(*loss_case(20, 32, 50257, 16, torch.bfloat16, "cuda", bias=True), upstream=upstream, **options)

    def test_float64(self):
        case = loss_case(11, 16, 128256, 4, torch.float64, "cuda")
        for a, b in zip(loss_and_gradients(fused, *case), loss_and_gradients(plain, *case), strict=True):
            assert relative_error(a, b) < 1e-12

    @pytest.mark.parametrize("chunk_size", [1, 3, 64, 199, 200])
    def test_chunks(self, chunk_size):
        case = loss_case(200, 64, 5000, 4, torch.bfloat16, "cuda")
        whole = loss_and_gradients(fused, *case, chunk_size=200)
        for a, b in zip(loss_and_gradients(fused, *case, chunk_size=chunk_size), whole, strict=True):
            assert relative_error(a, b) < torch.finfo(torch.bfloat16).eps  # sums in float32, rounded once

    def test_confident_rows_keep_their_gradient(self):
        hidden = torch.eye(8, 64, device="cuda", dtype=torch.bfloat16) * 16
        weight = torch.zeros(1000, 64, device="cuda", dtype=torch.bfloat16)
        weight[range(8), range(8)] = 0.875  # logits of 14: p = 0.999
        labels = torch.arange(8, device="cuda")[:, None]
        mine = loss_and_gradients(fused, hidden, weight, None, labels)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), None, labels)
        # The logit's gradient and its product with hidden are rounded to bfloat16, by half an eps at most.
        error = relative_error(mine[2][range(8), range(8)], exact[2][range(8), range(8)])
        assert error < 1.1 * torch.finfo(torch.bfloat16).eps

    def test_offsets_beyond_32_bits(self):
        rows, vocabulary = 17000, 128256  # 2.18e9 logits
        logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
        labels = torch.full((rows, 2), vocabulary - 1, device="cuda")
        held = logits.requires_grad_().view_as(logits)
        loss = multi_hot_cross_entropy(held, labels, reduction="none", inplace=True)
        loss.sum().backward()
        assert torch.allclose(loss, torch.full_like(loss, vocabulary).log(), rtol=1e-6)
        gradient = logits.grad
        assert (gradient[:, -1] == -1).all() and (gradient[:, 0] == gradient[0, 0]).all() and gradient[0, 0] > 0

    @pytest.mark.parametrize("chunk_size", [1024, 8192])
    @pytest.mark.parametrize("upstream", [1.0, 0.37])
    def test_extra_memory_is_a_chunk_and_the_sum_of_chunks(self, chunk_size, upstream):
        rows, dim, vocabulary = 8192, 512, 65536
        hidden, weight, _, labels = loss_case(rows, dim, vocabulary, 4, torch.bfloat16, "cuda")
        hidden.requires_grad_(), weight.requires_grad_()
        fused(hidden[:64], weight, None, labels[:64]).backward()  # workspaces that libraries keep
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (upstream * fused(hidden, weight, None, labels, chunk_size=chunk_size)).backward()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes  # beyond the gradients
        chunk = chunk_size * vocabulary * 2
        # Several chunks add the weight's gradient up in float32, and the logits are gone when that is rounded.
        wanted = chunk if chunk_size == rows else max(chunk + weight.nbytes, 2 * weight.nbytes)
        assert extra < wanted + (32 << 20)

    @pytest.mark.parametrize("chunk_size", [100, 600])
    def test_an_upstream_that_rounds_again(self, chunk_size):
        case = loss_case(600, 64, 3000, 4, torch.bfloat16, "cuda", bias=True)
        check_loss(*case, 0.37, chunk_size=chunk_size)


class TestEmbedding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_token_with_ten_thousand_hits(self, dtype):
        ids, weight, grad = embedding_case((16384, 6), 128256, 64, dtype, "cuda")
        assert int(torch.bincount(ids.flatten()).max()) > 5000
        check_embedding(ids, weight, grad)

    @pytest.mark.parametrize("dim", [1, 7, 8, 513, 2048, 4096])
    def test_dimensions(self, dim):
        check_embedding(*embedding_case((200, 16), 300, dim, torch.bfloat16, "cuda"))

    def test_offsets_beyond_32_bits(self):
        weight = torch.zeros(2**20 + 8, 2048, dtype=torch.bfloat16, device="cuda")  # 2^31 elements and more
        weight[-1] = 1
        ids = torch.tensor([[2**20 + 7, 0]], device="cuda")
        out, gradient = embed(ids, weight, mode="sum")
        assert (out == 1).all() and (gradient[-1] == 2).all() and not gradient[1:-1].any()


class TestCitizenship:
    def test_kernels_are_there(self):
        plain_ops._warn.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for function in FUNCTIONS:
                loss_and_gradients(function, *loss_case(6, 8, 50, 4, torch.bfloat16, "cuda"))
            embed(*embedding_case((5, 3), 20, 8, torch.bfloat16, "cuda")[:2])

    def test_gemms_with_float32_results_are_there(self):
        assert chunked._multiplies_to_float32(torch.bfloat16, torch.device("cuda"))

    def test_current_stream(self):
        hidden, weight, _, labels = loss_case(64, 64, 5000, 3, torch.float32, "cuda")
        ids, table, _ = embedding_case((64, 3), 500, 64, torch.float32, "cuda")
        wanted = *loss_and_gradients(fused, hidden, weight, None, labels), *embed(ids, table)
        late = [torch.zeros_like(t) for t in (hidden, weight, table)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # workspaces and memory, whose allocation may wait
            loss_and_gradients(fused, *late[:2], None, labels), embed(ids, late[2])
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second: work on another stream would find zeros
            for t, source in zip(late, (hidden, weight, table), strict=True):
                t.copy_(source)
            mine = *loss_and_gradients(fused, late[0], late[1], None, labels), *embed(ids, late[2])
            assert not stream.query()  # all of it was enqueued before the sleep was over
        torch.cuda.synchronize()
        for a, b in zip(mine, wanted, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("vocabulary", [5000, 50257, 151936])  # one block a row, and clusters
    def test_graph_replay_with_other_labels(self, vocabulary):
        hidden, weight, _, labels = loss_case(200, 64, vocabulary, 3, torch.bfloat16, "cuda", seed=0)
        others = loss_case(200, 64, vocabulary, 3, torch.bfloat16, "cuda", seed=1)[3]
        ids, table, _ = embedding_case((64, 3), 500, 64, torch.bfloat16, "cuda", seed=0)
        other_ids = embedding_case((64, 3), 500, 64, torch.bfloat16, "cuda", seed=1)[0]

        def step():
            return *loss_and_gradients(fused, hidden, weight, None, labels), *embed(ids, table)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(), step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        labels.copy_(others), ids.copy_(other_ids)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
    def test_nothing_waits_for_the_device(self, options):
        case = loss_case(64, 64, 5000, 3, torch.bfloat16, "cuda")
        ids, table, _ = embedding_case((64, 3), 500, 64, torch.bfloat16, "cuda")
        chunked._multiplies_to_float32(torch.bfloat16, case[0].device)  # else the first call finds out
        options = resolved(options, case[3])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = fused(
                *(t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in case), **options
            )
            loss.backward(torch.ones_like(loss))
            embed(ids, table, padding_idx=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_runs_are_bitwise_equal(self):
        case = loss_case(3000, 64, 50257, 6, torch.bfloat16, "cuda")
        ids, table, _ = embedding_case((16384, 6), 128256, 64, torch.bfloat16, "cuda")
        first = *loss_and_gradients(fused, *case), *embed(ids, table)
        for _ in range(5):
            for a, b in zip((*loss_and_gradients(fused, *case), *embed(ids, table)), first, strict=True):
                assert torch.equal(a, b)

    def test_no_labels_over_poisoned_memory(self):
        hidden, weight, _, labels = loss_case(300, 64, 5000, 3, torch.bfloat16, "cuda")
        poison = torch.full((64 << 20,), float("nan"), device="cuda")
        del poison  # what the allocator hands out next
        for t in loss_and_gradients(fused, hidden, weight, None, torch.full_like(labels, IGNORE)):
            assert not t.any()

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_second_device(self):
        case = loss_case(64, 64, 5000, 3, torch.bfloat16, "cuda:1")
        ids, table, _ = embedding_case((64, 3), 500, 64, torch.bfloat16, "cuda:1")
        assert torch.cuda.current_device() == 0
        for t in (*loss_and_gradients(fused, *case), *embed(ids, table)):
            assert t.device == torch.device("cuda:1") and torch.isfinite(t).all()
        with pytest.raises(ValueError, match="one device"):
            linear_multi_hot_cross_entropy(case[0], case[1], case[3].to("cuda:0"))

    @pytest.mark.parametrize(
        "call",
        [
            "tst_ext.linear_multi_hot_cross_entropy(torch.ones(4, 8).cuda(), torch.ones(9, 8).cuda(), ids)",
            "tst_ext.multi_hot_cross_entropy(torch.ones(4, 9).cuda(), ids)",
            "tst_ext.bag_embedding(ids, torch.ones(9, 8).cuda())",
        ],
    )
    def test_ids_out_of_range_stop_the_device(self, call):
        script = f"import torch, tst_ext; ids = torch.full((4, 2), 9).cuda(); {call}; torch.cuda.synchronize()"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.returncode != 0 and "device-side assert" in result.stderr
