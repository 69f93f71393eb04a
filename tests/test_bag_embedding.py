"""bag_embedding against plain torch in float64, and what its public function promises."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.cases import (
    CAPABILITIES,
    DTYPES,
    KERNELS,
    check_embedding,
    each_device,
    embedding_and_gradient,
    embedding_case,
    generator,
    pairwise,
)
from helpers.numerics import relative_error
from tst_ext import bag_embedding

PADDING = -100


class TestBagEmbedding:
    @pairwise(dtype=DTYPES, capability=CAPABILITIES, mode=["mean", "sum"], fixtures=["capability"])
    def test_forward_and_gradient(self, device, dtype, mode, capability):
        check_embedding(*embedding_case((3, 5, 4), 23, 70, dtype, device), mode=mode)

    @pytest.mark.parametrize("dim", [1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
    def test_every_tail(self, device, dim, capability):
        check_embedding(*embedding_case((6, 3), 7, dim, torch.float32, device))

    @pytest.mark.parametrize("bag_size", [1, 2, 6, 16, 64])
    def test_bag_sizes(self, device, bag_size):
        check_embedding(*embedding_case((9, bag_size), 50, 24, torch.float32, device))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_token_with_10000_hits(self, device, dtype, capability):
        # Rows of more than 256 hits are cut into pieces and joined; 10000 terms would drift if summed in 16 bits.
        ids, weight, grad = embedding_case((5000, 4), 6, 17, dtype, device)
        ids[:, :2] = 3
        assert (ids == 3).sum() >= 10_000
        check_embedding(ids, weight, grad)

    @pytest.mark.parametrize("hits", [255, 256, 257, 512, 513])
    def test_around_the_length_of_a_piece(self, device, hits):
        ids = torch.full((hits, 1), 2, device=device)
        ids[0] = 0
        _, weight, grad = embedding_case((hits, 1), 5, 8, torch.float64, device)
        check_embedding(ids, weight, grad)

    def test_a_token_twice_in_a_bag_counts_twice(self, device):
        weight = torch.eye(4, dtype=torch.float64, device=device).requires_grad_()
        out = bag_embedding(torch.tensor([[1, 1, 1, 3]], device=device), weight)
        assert out.tolist() == [[0, 0.75, 0, 0.25]]
        out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64, device=device))
        assert weight.grad[1].tolist() == [0.75, 1.5, 2.25, 3.0]
        assert weight.grad[[0, 2]].abs().sum() == 0

    def test_bag_size_one_is_the_embedding(self, device):
        ids, weight, _ = embedding_case((4, 6, 1), 11, 5, torch.float32, device)
        assert torch.equal(bag_embedding(ids, weight), F.embedding(ids.squeeze(-1), weight))

    def test_int32_ids(self, device):
        ids, weight, grad = embedding_case((8, 4), 11, 5, torch.float32, device)
        for a, b in zip(
            embedding_and_gradient(bag_embedding, ids.int(), weight, grad),
            embedding_and_gradient(bag_embedding, ids, weight, grad),
            strict=True,
        ):
            assert torch.equal(a, b)

    def test_strides(self, device):
        ids, weight, grad = embedding_case((8, 4), 11, 6, torch.float32, device)
        expected = embedding_and_gradient(bag_embedding, ids, weight, grad)
        strided = (
            ids.T.contiguous().T,
            torch.stack((weight, weight), -1)[..., 0],
            grad.T.contiguous().T,
        )
        assert not any(t.is_contiguous() for t in strided)
        for a, b in zip(embedding_and_gradient(bag_embedding, *strided), expected, strict=True):
            assert torch.equal(a, b)

    def test_expanded_gradient(self, device):
        # out.sum().backward() hands over a gradient with strides of 0
        ids, weight, _ = embedding_case((8, 4), 11, 6, torch.float64, device)
        weight.requires_grad_()
        bag_embedding(ids, weight, mode="sum").sum().backward()
        hits = torch.bincount(ids.flatten(), minlength=11).double()
        assert torch.equal(weight.grad, hits[:, None].expand(11, 6))

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
    def test_no_bags(self, device, shape):
        weight = torch.randn(5, 3, device=device, requires_grad=True)
        out = bag_embedding(torch.empty(shape, dtype=torch.long, device=device), weight)
        assert out.shape == (*shape[:-1], 3)
        out.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))

    def test_one_bag_alone(self, device):
        weight = torch.randn(5, 3, device=device)
        assert bag_embedding(torch.tensor([1, 1], device=device), weight).tolist() == weight[1].tolist()

    def test_gradcheck(self, device):
        ids, weight, _ = embedding_case((3, 2, 4), 7, 5, torch.float64, device)
        assert torch.autograd.gradcheck(lambda w: bag_embedding(ids, w), weight.requires_grad_())

    @each_device
    @given(
        bags=st.integers(0, 9), bag_size=st.integers(1, 9), vocabulary=st.integers(1, 40), dim=st.integers(1, 70),
        seed=st.integers(0, 1000),
    )  # fmt: skip
    def test_any_shape(self, device, bags, bag_size, vocabulary, dim, seed):
        check_embedding(*embedding_case((bags, bag_size), vocabulary, dim, torch.float32, device, seed))

    def test_repeats_and_thread_counts_are_bitwise_equal(self):
        ids, weight, grad = embedding_case((3000, 6), 500, 64, torch.float32, "cpu")
        results = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(embedding_and_gradient(bag_embedding, ids, weight, grad))
        finally:
            torch.set_num_threads(threads)
        for out, gradient in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


class TestPaddingAndWeights:
    @pairwise(
        dtype=DTYPES,
        weights=[None, "power_law", torch.tensor([0.5, 0, 3, 0.125])],
        padding_idx=[PADDING, 0, None],
        mode=["mean", "sum"],
        kernels=KERNELS,
        fixtures=["kernels"],
    )
    def test_forward_and_gradient(self, device, dtype, mode, weights, padding_idx, kernels):
        ids, weight, grad = embedding_case((4, 5, 4), 23, 35, dtype, device)
        if padding_idx is not None:
            ids[torch.rand(ids.shape, generator=generator()) < 0.4] = padding_idx
        check_embedding(ids, weight, grad, mode=mode, position_weights=weights, padding_idx=padding_idx)

    @pytest.mark.parametrize("dim", [1, 16, 31, 65])
    def test_every_instruction_set(self, device, dim, capability):
        ids, weight, grad = embedding_case((6, 3), 7, dim, torch.float32, device)
        ids[2, 1:] = PADDING
        check_embedding(ids, weight, grad, padding_idx=PADDING, position_weights="power_law")

    def test_a_short_bag_is_the_bag_without_the_padding(self, device, kernels):
        ids, weight, _ = embedding_case((5, 3), 11, 6, torch.float32, device)
        padded = F.pad(ids, (0, 2), value=PADDING)
        for mode in ("mean", "sum"):  # three thirds of rows, or a third of their sum
            out = bag_embedding(padded, weight, mode=mode, padding_idx=PADDING)
            assert relative_error(out, bag_embedding(ids, weight, mode=mode)) < 2 * torch.finfo(torch.float32).eps

    def test_a_bag_of_padding_is_zeros_and_has_no_gradient(self, device, kernels):
        ids, weight, grad = embedding_case((4, 3), 11, 6, torch.float32, device)
        ids[2] = PADDING
        others = [0, 1, 3]
        options = dict(padding_idx=PADDING, mode="sum")
        out, gradient = embedding_and_gradient(bag_embedding, ids, weight, grad, **options)
        rest = embedding_and_gradient(bag_embedding, ids[others], weight, grad[others], **options)
        assert not out[2].any() and torch.equal(out[others], rest[0]) and torch.equal(gradient, rest[1])

    def test_padding_inside_the_vocabulary_learns_nothing(self, device, kernels):
        ids, weight, grad = embedding_case((40, 3), 11, 6, torch.float32, device)
        assert (ids == 0).sum() > 5
        assert not embedding_and_gradient(bag_embedding, ids, weight, grad, padding_idx=0)[1][0].any()
        # Nor does it lend anything to its bag.
        changed = weight.clone()
        changed[0] = torch.nan
        for w in (None, "power_law"):
            out = bag_embedding(ids, changed, padding_idx=0, position_weights=w)
            assert torch.equal(out, bag_embedding(ids, weight, padding_idx=0, position_weights=w))

    def test_a_position_of_weight_zero_lends_nothing(self, device, kernels):
        ids, weight, grad = embedding_case((4, 3), 11, 6, torch.float32, device)
        ids[:, 1] = 7
        ids[:, [0, 2]] %= 7
        weight[7] = torch.nan
        w = torch.tensor([1.0, 0, 1])
        out, gradient = embedding_and_gradient(bag_embedding, ids, weight, grad, position_weights=w)
        rest = embedding_and_gradient(bag_embedding, ids[:, [0, 2]], weight, grad, position_weights=w[[0, 2]])
        assert torch.equal(out, rest[0]) and torch.equal(gradient[:7], rest[1][:7]) and not gradient[7].any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_token_with_10000_hits(self, device, dtype):
        ids, weight, grad = embedding_case((5000, 4), 6, 17, dtype, device)
        ids[:, :2] = 3
        ids[::3, 1] = PADDING
        ids[1::3, 3] = 3
        assert (ids == 3).sum() >= 10_000 - 5000 // 3
        check_embedding(ids, weight, grad, padding_idx=PADDING, position_weights="power_law")

    @pytest.mark.parametrize("weights", [torch.tensor([3e38, 3e38]), torch.full((2,), 1e-50, dtype=torch.float64)])
    def test_weights_of_any_size(self, device, weights, kernels):
        table = torch.ones(3, 4, device=device)
        out = bag_embedding(torch.tensor([[0, 2]], device=device), table, position_weights=weights)
        assert relative_error(out, torch.ones(1, 4)) < 2 * torch.finfo(torch.float32).eps

    def test_an_infinite_gradient_stays_in_its_bag(self, device, kernels):
        ids = torch.tensor([[1, PADDING], [2, 2]], device=device)
        weight = torch.zeros(4, 3, device=device, requires_grad=True)
        grad = torch.tensor([[torch.inf] * 3, [1.0] * 3], device=device)
        bag_embedding(ids, weight, padding_idx=PADDING).backward(grad)
        assert weight.grad[1].isinf().all() and weight.grad[[0, 2, 3]].tolist() == [[0] * 3, [1] * 3, [0] * 3]

    def test_equal_weights_change_nothing(self, device, kernels):
        ids, weight, grad = embedding_case((40, 4), 11, 6, torch.float32, device)
        expected = embedding_and_gradient(bag_embedding, ids, weight, grad)
        for w in ("uniform", torch.full((4,), 2), torch.ones(4, dtype=torch.float64)):
            results = embedding_and_gradient(bag_embedding, ids, weight, grad, position_weights=w)
            for a, b in zip(results, expected, strict=True):  # sums of at most 160 terms, one rounding more in each
                assert relative_error(a, b) < 4 * torch.finfo(torch.float32).eps

    def test_gradcheck(self, device, kernels):
        ids, weight, _ = embedding_case((3, 2, 4), 7, 5, torch.float64, device)
        ids[1, 0, 2:] = PADDING

        def call(w):
            return bag_embedding(ids, w, padding_idx=PADDING, position_weights="exponential")

        assert torch.autograd.gradcheck(call, weight.requires_grad_())

    @each_device
    @given(
        bags=st.integers(0, 9), bag_size=st.integers(1, 9), vocabulary=st.integers(1, 40), dim=st.integers(1, 40),
        padded=st.sampled_from([0, 0.3, 1]), padding_idx=st.sampled_from([PADDING, -1, 0]),
        weights=st.sampled_from([None, "power_law", "first"]), mode=st.sampled_from(["mean", "sum"]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=st.integers(0, 1000),
    )  # fmt: skip
    def test_any_shape(self, device, bags, bag_size, vocabulary, dim, padded, padding_idx, weights, mode, dtype, seed):
        ids, weight, grad = embedding_case((bags, bag_size), vocabulary, dim, dtype, device, seed)
        ids[torch.rand(ids.shape, generator=generator(seed)) < padded] = padding_idx
        check_embedding(ids, weight, grad, mode=mode, padding_idx=padding_idx, position_weights=weights)

    def test_thread_counts_are_bitwise_equal(self):
        ids, weight, grad = embedding_case((3000, 6), 500, 64, torch.float32, "cpu")
        ids[torch.rand(ids.shape, generator=generator()) < 0.3] = PADDING
        results, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                options = dict(padding_idx=PADDING, position_weights="power_law")
                results.append(embedding_and_gradient(bag_embedding, ids, weight, grad, **options))
        finally:
            torch.set_num_threads(threads)
        for out, gradient in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


def sparse_beside_dense(ids, weight, grad, **options):
    """The sparse gradient, checked against the dense one."""
    out, dense = embedding_and_gradient(bag_embedding, ids, weight, grad, **options)
    same, gradient = embedding_and_gradient(bag_embedding, ids, weight, grad, **options, sparse=True)
    padding_idx = options.get("padding_idx")
    rows = (ids if padding_idx is None else ids[ids != padding_idx]).unique().long()
    assert gradient.is_sparse and gradient.is_coalesced() and gradient.dtype == weight.dtype
    assert gradient.shape == weight.shape and torch.equal(gradient.indices(), rows[None])
    assert torch.equal(same, out) and torch.equal(gradient.values(), dense[rows])
    return gradient


class TestSparse:
    @pairwise(
        dtype=DTYPES,
        ids_dtype=[torch.int64, torch.int32],
        weights=[None, "power_law", torch.tensor([0.5, 0, 3, 0.125])],
        padding_idx=[PADDING, 0, None],
        mode=["mean", "sum"],
        kernels=KERNELS,
        fixtures=["kernels"],
    )
    def test_bitwise_the_rows_of_the_dense_gradient(
        self, device, dtype, ids_dtype, weights, padding_idx, mode, kernels
    ):
        ids, weight, grad = embedding_case((200, 2, 4), 90, 35, dtype, device)
        ids = ids % 40 * 2  # every other row of the table has no hit
        ids[:80] = 6
        if padding_idx is not None:
            ids[torch.rand(ids.shape, generator=generator()) < 0.4] = padding_idx
        assert (ids == 6).sum() > 256 and len(ids.unique()) > 30
        options = dict(mode=mode, position_weights=weights, padding_idx=padding_idx)
        sparse_beside_dense(ids.to(ids_dtype), weight, grad, **options)

    def test_bags_of_one_and_strides(self, device, kernels):
        ids, weight, grad = embedding_case((40, 3), 23, 5, torch.float32, device)
        ids[::4] = PADDING
        tokens = ids.T.contiguous().T.unsqueeze(-1)
        assert not tokens.is_contiguous()
        sparse_beside_dense(tokens, weight, grad.unsqueeze(1).expand(-1, 3, -1), padding_idx=PADDING)

    @pytest.mark.parametrize("vocabulary", [0, 5])
    @pytest.mark.parametrize("bags", [0, 2])
    def test_without_hits_it_has_no_rows(self, device, vocabulary, bags, kernels):
        ids = torch.full((bags, 4), PADDING, device=device)
        weight, grad = torch.randn(vocabulary, 3, device=device), torch.randn(bags, 3, device=device)
        assert sparse_beside_dense(ids, weight, grad, padding_idx=PADDING)._nnz() == 0

    def test_backwards_add_up_and_stay_sparse(self, device):
        total, weight = 0, None
        for seed in range(3):
            ids, table, grad = embedding_case((8, 4), 40, 6, torch.float32, device, seed)
            weight = table.requires_grad_() if weight is None else weight
            bag_embedding(ids, weight, sparse=True).backward(grad)
            total = total + embedding_and_gradient(bag_embedding, ids, weight, grad)[1]
        # torch adds up what is sparse, on CUDA in any order: two roundings of numbers below 4, 2.4e-7 each at most.
        torch.testing.assert_close(weight.grad.to_dense(), total, rtol=0, atol=0 if device == "cpu" else 1e-6)
        assert weight.grad.is_sparse
        (rows,) = weight.grad.coalesce()._indices()
        assert rows.diff().gt(0).all() and len(rows) == total.any(1).sum() < 40

    def test_used_twice_and_tied_to_a_head(self, device):
        ids, weight, grad = embedding_case((8, 4), 40, 6, torch.float64, device)

        def gradient(sparse, tied):
            table = weight.detach().clone().requires_grad_()
            outs = [bag_embedding(i, table, sparse=sparse) for i in (ids, ids.flip(0)[:3])]
            loss = (outs[0] * grad).sum() + outs[1].sum()
            (loss + (F.linear(grad, table).square().sum() if tied else 0)).backward()
            return table.grad

        assert gradient(True, False).is_sparse and not gradient(True, True).is_sparse
        for tied in (False, True):  # sums of three gradients, in another order
            assert relative_error(gradient(True, tied).to_dense(), gradient(False, tied)) < 1e-15

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
    def test_optimizers(self, device, optimizer):
        ids, weight, grad = embedding_case((8, 4), 40, 6, torch.float32, device)
        hit = torch.zeros(40, dtype=torch.bool, device=device)
        hit[ids.flatten()] = True

        def trained(sparse):
            table = torch.nn.Parameter(weight.detach().clone())
            stepper = optimizer([table], lr=0.1)
            for _ in range(3):
                stepper.zero_grad()
                bag_embedding(ids, table, sparse=sparse).backward(grad)
                if optimizer == torch.optim.SparseAdam and not sparse:
                    table.grad = table.grad.to_sparse(1)
                stepper.step()
            return table.detach()

        ours = trained(True)
        # torch adds what is sparse to a table, on CUDA with a rounding more or less a step: of numbers below 4.
        torch.testing.assert_close(ours, trained(False), rtol=0, atol=0 if device == "cpu" else 1e-6)
        assert torch.equal(ours[~hit], weight[~hit]) and (ours[hit] != weight[hit]).all()

    def test_repeats_and_thread_counts_are_bitwise_equal(self):
        ids, weight, grad = embedding_case((3000, 6), 500, 64, torch.float32, "cpu")
        threads = torch.get_num_threads()
        try:
            torch.use_deterministic_algorithms(True)  # new memory is NaN
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                sparse_beside_dense(ids, weight, grad)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)

    def test_second_derivative_raises(self, device):
        ids, weight, _ = embedding_case((8, 4), 40, 6, torch.float32, device)
        loss = bag_embedding(ids, weight.requires_grad_(), sparse=True).square().sum()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.sparse.sum(gradient).backward()

    def test_a_computed_weight_is_refused(self, device):
        ids, weight, _ = embedding_case((8, 4), 40, 6, torch.float32, device)
        computed = weight.requires_grad_().bfloat16()
        with pytest.raises(ValueError, match="sparse: expected a weight that is a leaf.*cast or scale the output"):
            bag_embedding(ids, computed, sparse=True)
        with torch.no_grad():
            assert torch.equal(bag_embedding(ids, computed, sparse=True), bag_embedding(ids, computed))

    def test_compiled_it_breaks_the_graph(self):
        ids, weight, grad = embedding_case((8, 4), 40, 6, torch.float32, "cpu")

        def doubled(ids, weight):
            return 2 * bag_embedding(ids, weight, padding_idx=0, sparse=True)

        def compiled(*arguments, **options):
            torch._dynamo.reset()
            return torch.compile(doubled, backend="eager", **options)(*arguments)

        expected = embedding_and_gradient(doubled, ids, weight, grad)
        out, gradient = embedding_and_gradient(compiled, ids, weight, grad)
        assert torch.equal(out, expected[0]) and torch.equal(gradient.values(), expected[1].values())
        with torch.no_grad():
            assert torch.equal(compiled(ids, weight.requires_grad_(), fullgraph=True), out)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"bag_embedding\(sparse=True\) has no static shape"):
            compiled(ids, weight, fullgraph=True)


class TestBagEmbeddingErrors:
    WEIGHT = torch.randn(10, 3)

    @pytest.mark.parametrize("bad", [10, -1, -100, 2**40, -(2**63)])
    def test_id_out_of_range(self, bad):
        ids = torch.zeros(2, 3, 4, dtype=torch.long)
        ids[1, 2, 3] = bad
        with pytest.raises(IndexError, match=rf"input_ids\[1, 2, 3\] = {bad} .* 0 <= id < 10"):
            bag_embedding(ids, self.WEIGHT)

    def test_empty_table(self):
        with pytest.raises(IndexError, match=r"input_ids\[0, 0\] = 0 "):
            bag_embedding(torch.zeros(1, 2, dtype=torch.long), torch.empty(0, 3))

    @pytest.mark.parametrize(
        ("ids", "weight", "error", "message"),
        [
            (torch.zeros(2, 3), WEIGHT, TypeError, "input_ids.*int64.*float32"),
            (torch.zeros(2, 3, dtype=torch.int16), WEIGHT, TypeError, "input_ids.*int16"),
            (torch.zeros(2, 3).long(), torch.zeros(4, 3).long(), TypeError, "weight.*float32.*int64"),
            (torch.tensor(1), WEIGHT, ValueError, r"input_ids.*\(\)"),
            (torch.zeros(2, 0).long(), WEIGHT, ValueError, r"input_ids.*\(2, 0\)"),
            (torch.zeros(2, 3).long(), torch.zeros(4), ValueError, r"weight.*\(4,\)"),
            (torch.zeros(2, 3).long(), torch.zeros(4, 3, device="meta"), ValueError, "cpu.*meta"),
        ],
    )
    def test_shapes_and_dtypes(self, ids, weight, error, message):
        with pytest.raises(error, match=message):
            bag_embedding(ids, weight)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (dict(padding_idx=1.5), ValueError, "padding_idx.*1.5"),
            (dict(padding_idx=2**70), ValueError, f"padding_idx.*64 bits.*{2**70}"),
            (dict(position_weights=torch.ones(3, device="meta")), ValueError, "position_weights.*cpu.*meta"),
            (dict(position_weights="cubic"), ValueError, "'cubic'"),
            (dict(position_weights=[1, 1, 1]), TypeError, "position_weights.*list"),
            (dict(position_weights=torch.ones(4)), ValueError, r"position_weights.*\(3,\).*\(4,\)"),
            (
                dict(position_weights=torch.ones(3, requires_grad=True)),
                ValueError,
                "position_weights.*requires_grad=True",
            ),
            (dict(position_weights=torch.tensor([1, -1.0, 1])), ValueError, r"position_weights\[1\].*-1"),
            (dict(position_weights=torch.tensor([1, 1, torch.nan])), ValueError, r"position_weights\[2\].*nan"),
            (dict(position_weights=torch.tensor([torch.inf, 1, 1])), ValueError, r"position_weights\[0\].*inf"),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            bag_embedding(torch.zeros(2, 3).long(), self.WEIGHT, **options)

    def test_an_id_that_is_not_the_padding(self):
        with pytest.raises(IndexError, match=r"input_ids\[0, 1\] = -100 .* 0 <= id < 10"):
            bag_embedding(torch.tensor([[-1, -100]]), self.WEIGHT, padding_idx=-1)

    def test_mode(self):
        with pytest.raises(ValueError, match="mode.*'max'"):
            bag_embedding(torch.zeros(2, 3).long(), self.WEIGHT, mode="max")
