"""bag_embedding against plain torch in float64, and what its public function promises."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, check_embedding, embedding_and_gradient, embedding_case
from hypothesis import given, settings
from hypothesis import strategies as st

from tst_ext import bag_embedding

PADDING = -100


class TestBagEmbedding:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mode", ["mean", "sum"])
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

    def test_second_derivative_is_refused(self, device):
        weight = torch.randn(5, 3, device=device, requires_grad=True)
        out = bag_embedding(torch.tensor([[1, 2]], device=device), weight)
        (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="twice|once_differentiable"):
            grad.sum().backward()

    @given(
        bags=st.integers(0, 9), bag_size=st.integers(1, 9), vocabulary=st.integers(1, 40), dim=st.integers(1, 70),
        seed=st.integers(0, 1000),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_any_shape(self, bags, bag_size, vocabulary, dim, seed):
        check_embedding(*embedding_case((bags, bag_size), vocabulary, dim, torch.float32, "cpu", seed))

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

    def test_mode(self):
        with pytest.raises(ValueError, match="mode.*'max'"):
            bag_embedding(torch.zeros(2, 3).long(), self.WEIGHT, mode="max")
