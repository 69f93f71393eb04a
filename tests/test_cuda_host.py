"""The CUDA ops without a GPU: which launches they make, at which sizes and addresses, and what they refuse.

`make cuda-host-test` builds them for the host under AddressSanitizer; elsewhere this file is skipped. It runs the tests
with the fixture `kernels` too.
"""

from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch

from helpers import emulated
from helpers.cases import (
    FUNCTIONS,
    IGNORE,
    check_embedding,
    check_loss,
    embedding_case,
    fused,
    loss_case,
    on_logits,
    some_weights,
)
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from tst_ext._load import load_cuda
from tst_ext.ops import plain
from tst_ext.ops.loss import LossOptions

pytestmark = [
    pytest.mark.skipif(not emulated.LIBRARY, reason="runs in make cuda-host-test"),
    pytest.mark.usefixtures("emulated_cuda"),
]


def op_for_cuda(name, *args, **kwargs):
    """The op whatever the tensors' device, behind the checks of the public function."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.tst_ext, name).default.redispatch(keys, *args, **kwargs)


def test_it_is_loaded_as_the_cuda_library_of_a_build(tmp_path, monkeypatch):
    (tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}").symlink_to(emulated.LIBRARY)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert load_cuda(tmp_path) == ("sm_90", "")


class TestRows:
    @pytest.mark.parametrize(
        ("device", "dtype", "vocabulary", "clusters", "cached"),
        [
            ("sm_80", torch.float32, 33, False, True),
            ("sm_80", torch.float32, 19_000, False, True),
            ("sm_80", torch.float32, 25_000, False, False),
            ("sm_89", torch.bfloat16, 38_000, False, True),
            ("sm_90", torch.float64, 3_000, False, True),
            ("sm_90", torch.float32, 25_000, True, True),
            ("sm_90", torch.float32, 300_000, True, True),
            ("sm_90", torch.bfloat16, 600_000, True, True),
            ("sm_90", torch.float32, 500_000, True, False),
            ("sm_90 with code for sm_80", torch.float32, 25_000, False, False),
            ("sm_120", torch.float32, 300_000, True, False),
        ],
    )
    def test_cut(self, device, dtype, vocabulary, clusters, cached):
        emulated.set_device(device)
        rows = 3 if vocabulary < 30_000 else 1
        check_loss(*loss_case(rows, 2, vocabulary, 3, dtype, "cpu", ignored=0))
        launch, *scaled = emulated.launches()
        assert len(scaled) == (2 if dtype == torch.bfloat16 else 0)  # the gradients, in place
        assert launch.grid == (min(rows, 2) * launch.cluster, 1)  # of three rows one cluster has two
        assert (launch.cluster > 1) == clusters
        slice_bytes = vocabulary * dtype.itemsize // launch.cluster
        assert (slice_bytes <= launch.shared_bytes) == cached
        assert launch.shared_bytes <= min(emulated.DEVICES[device].shared_memory << 10, slice_bytes + 4096)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("vocabulary", [1, 9, 70])
    def test_any_address_and_stride(self, dtype, vocabulary):
        _, _, _, labels = loss_case(3, 1, vocabulary, 4, dtype, "cpu")
        scale = torch.full((4,), 0.25, dtype=torch.promote_types(dtype, torch.float32))
        eps, wide = torch.finfo(dtype).eps, torch.finfo(scale.dtype).eps
        for first in range(16 // dtype.itemsize):
            for stride in (vocabulary, vocabulary + 1, vocabulary + 8):
                memory = torch.full((first + 3 * stride + 8,), 77, dtype=dtype)  # outside the rows it stays
                z = memory.as_strided((3, vocabulary), (stride, 1), first)
                z.copy_(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)))
                wanted = plain._rows(z.double(), labels, scale.double(), LossOptions(), None, None, True)
                loss, lse = torch.full((2, 3), torch.nan, dtype=scale.dtype)
                op_for_cuda("multi_hot_cross_entropy_rows_", z, labels, scale, loss, lse, gradient=True)
                for mine, exact, relative in zip((loss, lse, z), wanted, (wide, wide, eps), strict=True):
                    # Loss and gradient of a single column are exactly 0.
                    assert (mine - exact).norm() <= 8 * relative * exact.norm()
                z.fill_(77)
                assert (memory == 77).all()

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_upstream_gradients(self, function, reduction):  # one for all rows, and one per row
        upstream = torch.tensor([0.5, -2, 3])[: None if reduction == "none" else 1].squeeze()
        check_loss(*loss_case(3, 4, 50, 4, torch.float32, "cpu"), upstream, function, reduction=reduction)

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_each_label_has_a_weight(self, function):
        check_loss(*loss_case(5, 4, 50, 4, torch.float32, "cpu"), function=function, label_weights=some_weights)

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_no_rows(self, function):
        loss = function(torch.empty(0, 8), torch.ones(50, 8), None, torch.empty(0, 4, dtype=torch.long))
        assert loss == 0 and emulated.launches() == []

    def test_strides(self):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float32, "cpu", bias=True)
        hidden, weight, labels = (t.T.contiguous().T for t in (hidden, weight, labels.int()))
        check_loss(hidden, weight, torch.stack((bias, bias), 1)[:, 0], labels)
        logits = (hidden @ weight.T).T.contiguous().T
        assert torch.equal(
            multi_hot_cross_entropy(logits, labels), multi_hot_cross_entropy(logits.contiguous(), labels)
        )

    def test_a_row_of_labels_that_asks_for_memory(self):  # more than the 48 KiB that a kernel has unasked
        check_loss(*loss_case(1, 2, 40, 2600, torch.float32, "cpu"))
        (launch,) = emulated.launches()
        assert launch.shared_bytes > 48 << 10


class TestChunks:
    @pytest.mark.parametrize(
        ("chunk_size", "chunks"), [(1, 10 * [1]), (3, [3, 3, 3, 1]), (4, [4, 4, 2]), (9, [5, 5]), (99, [10])]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias", [False, True])
    def test_launches(self, chunk_size, chunks, dtype, bias):
        case = loss_case(10, 8, 101, 3, dtype, "cpu", bias=bias)  # rows of 101 columns, in 128 without a bias
        passes, half = [(min(rows, 2), 1) for rows in chunks], dtype == torch.bfloat16
        rounded = (half and len(chunks) > 1) * [(1, 1)]  # the sum of the weight's gradient
        check_loss(*case, 0.37, chunk_size=chunk_size)
        scaled = half * 2 * [(1, 1)]  # the bias's is float32, and here on the CPU
        assert [launch.grid for launch in emulated.launches()] == passes + rounded + scaled
        upstream = torch.randn(10, generator=torch.Generator().manual_seed(0))
        check_loss(*case, upstream, chunk_size=chunk_size, reduction="none", z_loss=0.1, logit_softcap=3.0)
        assert [launch.grid for launch in emulated.launches()] == 2 * passes + rounded


class TestBags:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"padding_idx": 0, "position_weights": "exponential"}], ids=str)
    @pytest.mark.parametrize("dim", [1, 5, 24, 520])
    def test_launches(self, dtype, options, dim):
        ids, weight, grad = embedding_case((300, 3), 41, dim, dtype, "cpu")
        assert int(torch.bincount(ids[ids > 0]).max()) > 64  # pieces of a row, also without id 0
        check_embedding(40 - ids, weight, grad, **options)  # the long rows come last
        emulated.launches()
        check_embedding(ids, weight, grad, **options)
        forward, hits, offsets, rows, join = emulated.launches()
        assert (hits.grid, offsets.grid) == ((3, 1), (1, 1))  # a thread a bag, a thread a row and one more
        columns = 1024 // weight.element_size()  # of a warp, forward; half of them backward
        assert forward.grid == (75, -(-dim // columns))  # a warp a bag
        # A warp for each of two pieces of each 64 hits, 30, and for each four rows, 11. Of the long rows as many blocks
        # as the device holds, two.
        slabs = -(-dim // (columns // 2))
        assert (rows.grid, join.grid) == ((11, slabs), (max(1, 2 // slabs), slabs))

    @pytest.mark.parametrize("vocabulary", [127, 128, 129])
    def test_around_the_rows_of_a_block(self, vocabulary):  # 128 threads a block, one for each row and one more
        ids, weight, grad = embedding_case((5, 3), vocabulary, 4, torch.float32, "cpu")
        ids[0] = vocabulary - 1
        check_embedding(ids, weight, grad)
        assert emulated.launches()[2].grid == (1 + (vocabulary >= 128), 1)

    @pytest.mark.parametrize("count", [1, 64, 65])
    def test_no_pieces_where_no_row_can_be_long(self, count):
        ids, weight, grad = embedding_case((count, 1), 3, 8, torch.float32, "cpu")
        check_embedding(ids, weight, grad)
        assert len(emulated.launches()) == (5 if count > 64 else 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_address(self, dtype):
        ids, weight, grad = embedding_case((9, 3), 7, 16, dtype, "cpu")
        apart = torch.empty(7 * 16 + 1, dtype=dtype)[1:].view(7, 16).copy_(weight)
        assert apart.data_ptr() % 16 and torch.equal(bag_embedding(ids, apart), bag_embedding(ids, weight))
        grad_apart = torch.empty(9 * 16 + 1, dtype=dtype)[1:].view(9, 16).copy_(grad)
        backward = [op_for_cuda("bag_embedding_backward", g, ids, 7, "mean") for g in (grad, grad_apart)]
        assert torch.equal(*backward)

    def test_strides(self):
        ids, weight, grad = embedding_case((9, 3), 7, 16, torch.float32, "cpu")
        check_embedding(ids.int().T.contiguous().T, weight.T.contiguous().T, grad.T.contiguous().T)

    def test_empty(self):
        for ids, weight in (((0, 4), (5, 3)), ((4, 2), (5, 0))):
            weight = torch.ones(weight, requires_grad=True)
            bag_embedding(torch.zeros(ids, dtype=torch.long), weight).sum().backward()
            assert torch.equal(weight.grad, torch.zeros_like(weight)) and emulated.launches() == []


class TestScaledCopy:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("offset", "out_offset"), [(0, 0), (0, 1), (1, 0), (1, 1)])
    def test_rounds_once(self, dtype, offset, out_offset):
        factor = torch.tensor(0.3)
        for count in (0, 1, 7, 8, 9, 2048, 2059):
            source = torch.randn(count + 1)[offset : count + offset]
            memory = torch.empty(count + 9, dtype=dtype).fill_(7)
            out, behind = memory[out_offset:].split((count, 9 - out_offset))
            op_for_cuda("scaled_copy_", out, source, factor)
            assert torch.equal(out, (source * factor).to(dtype))
            assert (behind == 7).all() and (memory[:out_offset] == 7).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_in_place(self, dtype, offset):
        for count in (0, 1, 7, 8, 9, 2048, 2059):
            memory = torch.randn(count + 9).to(dtype)
            out, before = memory[offset : count + offset], memory.clone()
            wanted = (out * torch.tensor([0.3])).to(dtype)
            op_for_cuda("scaled_copy_", out, out, torch.tensor(0.3))
            assert torch.equal(out, wanted)
            out.copy_(before[offset : count + offset])
            assert torch.equal(memory, before)  # around it as well

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_factor_one_writes_nothing_in_place(self, dtype, offset):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)  # all NaNs too, whose bits a product would change
        out = bits.clone()[offset:].view(dtype)
        op_for_cuda("scaled_copy_", out, out, torch.tensor(1.0))
        assert torch.equal(out.view(torch.int16), bits[offset:])
        apart = torch.zeros_like(out)
        op_for_cuda("scaled_copy_", apart, out, torch.tensor(1.0))
        assert torch.equal(apart[out.isfinite()], out[out.isfinite()]) and torch.equal(apart.isnan(), out.isnan())

    @pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("offset", "numbers"), [(0, 8), (1, 1)])  # a thread and pass
    def test_more_than_one_pass_of_the_grid(self, source_dtype, offset, numbers):
        grid = 2 * 256 * numbers  # a block on each of 2 multiprocessors
        for count, blocks in ((grid // 2, 1), (grid - 1, 2), (grid, 2), (grid + 1, 2), (2 * grid + 300, 2)):
            source = torch.randn(count + 1).to(source_dtype)[offset : count + offset]
            out = torch.full((count + 8,), 7, dtype=torch.bfloat16)
            op_for_cuda("scaled_copy_", out[:count], source, torch.tensor(0.3))
            assert emulated.launches() == [((blocks, 1), 256, 1, 0)]
            assert torch.equal(out[:count], (source * torch.tensor([0.3])).bfloat16()) and (out[count:] == 7).all()
            wanted = (out[:count] * torch.tensor([0.3])).bfloat16()
            op_for_cuda("scaled_copy_", out[:count], out[:count], torch.tensor(0.3))
            assert torch.equal(out[:count], wanted) and (out[count:] == 7).all()
            emulated.launches()

    @pytest.mark.parametrize(
        ("out", "source", "factor", "message"),
        [
            (torch.empty(3), torch.ones(3), torch.ones(()), "out: expected bfloat16 or float16"),
            (torch.empty(3).bfloat16(), torch.ones(3).double(), torch.ones(()), "source, factor: expected float32"),
            (torch.empty(3).bfloat16(), torch.ones(3).half(), torch.ones(()), "or a source of out's dtype"),
            (torch.empty(3).bfloat16(), torch.ones(3), torch.ones(()).double(), "source, factor: expected float32"),
            (torch.empty(3).bfloat16(), torch.ones(4), torch.ones(()), "out, source, factor: expected contiguous"),
            (torch.empty(3).bfloat16(), torch.ones(6)[::2], torch.ones(()), "out, source, factor: expected contiguous"),
            (torch.empty(3).bfloat16(), torch.ones(3), torch.ones(3), "and a scalar"),
        ],
    )
    def test_errors(self, out, source, factor, message):
        with pytest.raises(RuntimeError, match=message):
            op_for_cuda("scaled_copy_", out, source, factor)


class TestErrors:
    def test_ids_out_of_range_stop_the_kernel(self):
        ids = torch.full((4, 2), 9)
        for function in (fused, on_logits):
            with pytest.raises(IndexError, match="labels: out of range"):
                function(torch.ones(4, 8), torch.ones(9, 8), None, ids)
        with pytest.raises(IndexError, match="input_ids: out of range"):
            bag_embedding(ids, torch.ones(9, 8))
        with pytest.raises(IndexError, match="input_ids: out of range"):
            op_for_cuda("bag_embedding_backward", torch.ones(4, 8), ids, 9, "mean")

    @pytest.mark.parametrize("device", emulated.DEVICES)
    def test_bags_of_too_many_labels(self, device):
        emulated.set_device(device)
        labels = torch.full((1, 100_000), IGNORE)
        with pytest.raises(RuntimeError, match=r"labels: .* at most \d{4,5} labels on this device, got 100000"):
            linear_multi_hot_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), labels)
        assert emulated.launches() == []

    ONES, LABELS = torch.ones(4, 9), torch.zeros(4, 2, dtype=torch.long)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (dict(logits=ONES.long()), "logits: expected float32, bfloat16, float16 or float64"),
            (dict(logits=ONES.T.contiguous().T), "logits: expected .* adjacent columns"),
            (dict(logits=torch.empty(0, 2**30), labels=LABELS[:0]), f"logits: .* fewer than 2\\^30 .* got {2**30}"),
            (dict(labels=LABELS.to("meta")), "logits, labels: expected tensors on one CUDA device"),
            (dict(labels=LABELS.float()), "labels: expected int64 or int32"),
            (dict(labels=LABELS[:3]), "labels, label_scale: expected"),
            (dict(label_scale=torch.ones(3)), "labels, label_scale: expected"),
            (dict(label_scale=torch.ones(3, 2)), "labels, label_scale: expected"),
            (dict(label_scale=torch.ones(4, 2, 1)), "labels, label_scale: expected"),
            (dict(loss=torch.ones(3)), "loss, lse: expected"),
            (dict(lse=torch.ones(4).double()), "loss, lse: expected"),
            (dict(grad_loss=torch.ones(3)), "grad_loss: expected"),
            (dict(grad_lse=torch.ones(())), "grad_lse: expected"),
        ],
    )
    def test_rows(self, changed, message):
        arguments = dict(
            logits=self.ONES, labels=self.LABELS, label_scale=torch.ones(2), loss=torch.ones(4), lse=torch.ones(4)
        )
        with pytest.raises(RuntimeError, match=message):
            op_for_cuda("multi_hot_cross_entropy_rows_", **(arguments | changed))
        with pytest.raises(ValueError, match="z_loss: expected"):  # by csrc/loss.h, for all ops
            op_for_cuda("multi_hot_cross_entropy_rows_", **arguments, z_loss=-1.0)
        assert emulated.launches() == []

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (dict(mode="max"), "mode: .* 'max'"),
            (dict(input_ids=torch.zeros(2, 0).long()), "input_ids: expected"),
            (dict(input_ids=torch.zeros(2, 3)), "input_ids: expected int64 or int32"),
            (dict(input_ids=torch.zeros(1, 1).long().expand(2**31, 1)), f"input_ids: .* 2\\^31, got {2**31}"),
            (dict(weight=torch.ones(9)), "weight: expected"),
            (dict(weight=torch.ones(9, 8).long()), "weight: expected float32"),
            (dict(weight=torch.ones(9, 8, device="meta")), "input_ids, weight: .* one CUDA device"),
            (dict(weight=torch.ones(1, 64 * 65535 + 1)), "weight: rows too long .* 4194241 columns"),
            (dict(position_weights=torch.ones(4)), "position_weights: expected"),
        ],
    )
    def test_bags(self, changed, message):
        arguments = dict(input_ids=torch.zeros(2, 3).long(), weight=torch.ones(9, 8), mode="mean")
        with pytest.raises(RuntimeError, match=message):
            op_for_cuda("bag_embedding", **(arguments | changed))
        assert emulated.launches() == []

    def test_tables_of_too_many_rows_or_columns(self):
        ids = torch.zeros(1, 1).long()
        with pytest.raises(RuntimeError, match=f"weight: expected fewer than 2\\^31 rows, got {2**31}"):
            op_for_cuda("bag_embedding_backward", torch.ones(1, 1), ids, 2**31, "mean")
        with pytest.raises(RuntimeError, match=f"weight: expected fewer than 2\\^31 rows, got {2**31}"):
            op_for_cuda("bag_embedding", ids, torch.ones(1, 1).expand(2**31, 1), "mean")
        assert emulated.launches() == []
        with pytest.raises(RuntimeError, match="weight: rows too long .* 2097121 columns"):  # half of the forward's
            op_for_cuda("bag_embedding_backward", torch.ones(1, 32 * 65535 + 1), ids, 1, "mean")
