"""Both operations against plain torch in float64, and what their public functions promise."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, relative_error

from tst_ext import _C, bag_embedding, fallback, linear_multi_hot_cross_entropy, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE = -100


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request):
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf_ids(shape, vocabulary, seed=0):
    """Token ids as frequent as text's: p(k) ~ 1 / k, so that bags repeat tokens."""
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=torch.long)
    return torch.multinomial(p, count, replacement=True, generator=generator(seed)).reshape(shape)


# ---- bag_embedding ---------------------------------------------------------------------------------------------------


def embedding_case(shape, vocabulary, dim, dtype, device, seed=0):
    g = generator(seed)
    ids = zipf_ids(shape, vocabulary, seed).to(device)
    weight = torch.randn(vocabulary, dim, dtype=torch.float64, generator=g).to(device, dtype)
    grad = torch.randn(*shape[:-1], dim, dtype=torch.float64, generator=g).to(device, dtype)
    return ids, weight, grad


def embedding_and_gradient(function, ids, weight, grad, mode="mean"):
    weight = weight.detach().clone().requires_grad_()
    out = function(ids, weight, mode=mode)
    (gradient,) = torch.autograd.grad(out, weight, grad)
    return out.detach(), gradient


def check_embedding(ids, weight, grad, mode="mean"):
    out, gradient = embedding_and_gradient(bag_embedding, ids, weight, grad, mode)
    exact = embedding_and_gradient(reference.bag_embedding, ids, weight.double(), grad.double(), mode)
    if weight.element_size() > 2:
        plain = embedding_and_gradient(reference.bag_embedding, ids, weight, grad, mode)
    else:  # torch sums gradients in 16 bits, which drifts: float64 rounded once is what to stand beside
        plain = tuple(t.to(weight.dtype) for t in exact)
    assert out.dtype == gradient.dtype == weight.dtype
    assert out.is_contiguous() and gradient.is_contiguous()
    hits = int(torch.bincount(ids.flatten()).max()) if ids.numel() else 0
    assert_accurate(out, exact[0], plain[0], terms=ids.shape[-1])
    assert_accurate(gradient, exact[1], plain[1], terms=hits)


class TestBagEmbedding:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mode", ["mean", "sum"])
    def test_forward_and_gradient(self, device, dtype, mode, capability):
        check_embedding(*embedding_case((3, 5, 4), 23, 70, dtype, device), mode)

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


# ---- linear_multi_hot_cross_entropy ----------------------------------------------------------------------------------


def loss_case(rows, dim, vocabulary, bag_size, dtype, device, seed=0, ignored=0.2):
    g = generator(seed)
    hidden = torch.randn(rows, dim, dtype=torch.float64, generator=g).to(device, dtype)
    weight = (2 * torch.randn(vocabulary, dim, dtype=torch.float64, generator=g) / max(1, dim) ** 0.5).to(device, dtype)
    labels = zipf_ids((rows, bag_size), vocabulary, seed)
    labels[torch.rand(rows, bag_size, generator=g) < ignored] = IGNORE
    return hidden, weight, labels.to(device)


def fused(hidden, weight, labels, **options):
    return linear_multi_hot_cross_entropy(hidden, weight, labels, **options)


def plain(hidden, weight, labels, chunk_size=None, **options):
    return reference.multi_hot_cross_entropy(hidden @ weight.T, labels, **options)


def loss_and_gradients(function, hidden, weight, labels, upstream=1.0, **options):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = function(hidden, weight, labels, **options)
    dh, dw = torch.autograd.grad(loss * upstream, (hidden, weight))
    return loss.detach(), dh, dw


def check_loss(hidden, weight, labels, upstream=1.0, **options):
    mine = loss_and_gradients(fused, hidden, weight, labels, upstream, **options)
    exact = loss_and_gradients(plain, hidden.double(), weight.double(), labels, upstream, **options)
    torch_s = loss_and_gradients(plain, hidden, weight, labels, upstream, **options)
    assert mine[0].dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert mine[1].dtype == mine[2].dtype == hidden.dtype
    terms = max(*hidden.shape, *weight.shape, labels.shape[-1])
    for actual, wanted, beside in zip(mine, exact, torch_s, strict=True):
        assert_accurate(actual, wanted, beside, terms)
    # The rows of dW that are labels, apart: there p - 1 cancels, and an error would drown in the other columns.
    targets = labels[labels != options.get("ignore_index", IGNORE)].unique()
    assert_accurate(mine[2][targets], exact[2][targets], torch_s[2][targets], terms)


class TestLinearMultiHotCrossEntropy:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("upstream", [1.0, -2.7])
    def test_loss_and_gradients(self, device, dtype, reduction, upstream, capability):
        check_loss(*loss_case(37, 24, 101, 4, dtype, device), upstream, reduction=reduction, chunk_size=10)

    @pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 4096, 4099])
    def test_every_tail(self, device, vocabulary, capability):
        check_loss(*loss_case(5, 8, vocabulary, 3, torch.float32, device))

    @pytest.mark.parametrize("bag_size", [1, 2, 6, 16, 64])
    def test_bag_sizes(self, device, bag_size):
        check_loss(*loss_case(11, 8, 50, bag_size, torch.float32, device))

    @pytest.mark.parametrize("weights", [[1, 0.5, 1 / 3, 0.25], [0, 3, 0, 1.5], [0, 0, 0, 0]])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_position_weights(self, device, weights, reduction):
        check_loss(
            *loss_case(13, 8, 50, 4, torch.float64, device),
            position_weights=torch.tensor(weights, dtype=torch.float64),
            reduction=reduction,
        )

    def test_position_weights_by_name(self, device):
        case = loss_case(13, 8, 50, 4, torch.float32, device)
        assert fused(*case, position_weights="power_law") == fused(
            *case, position_weights=1 / torch.arange(1.0, 5.0, dtype=torch.float32, device=device)
        )

    def test_mean_without_ignored_labels_is_sum_over_rows(self, device):
        case = loss_case(13, 8, 50, 4, torch.float64, device, ignored=0)
        assert relative_error(fused(*case), fused(*case, reduction="sum") / 13) < 1e-14

    def test_bag_size_one_is_cross_entropy(self, device):
        hidden, weight, labels = loss_case(13, 8, 50, 1, torch.float64, device)
        expected = F.cross_entropy(hidden @ weight.T, labels.squeeze(-1))
        assert relative_error(fused(hidden, weight, labels), expected) < 1e-14
        assert relative_error(fused(hidden, weight, labels.squeeze(-1)), expected) < 1e-14

    def test_leading_dimensions(self, device):
        hidden, weight, labels = loss_case(12, 8, 50, 4, torch.float32, device)
        flat = loss_and_gradients(fused, hidden, weight, labels)
        shaped = loss_and_gradients(fused, hidden.view(2, 3, 2, 8), weight, labels.view(2, 3, 2, 4))
        assert shaped[1].shape == (2, 3, 2, 8)
        assert torch.equal(flat[0], shaped[0]) and torch.equal(flat[1], shaped[1].view(12, 8))
        assert torch.equal(flat[2], shaped[2])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_label_twice_in_a_bag_counts_twice(self, device, dtype):
        hidden, weight, labels = loss_case(6, 8, 50, 4, dtype, device)
        labels[:, 2] = labels[:, 0] = 7
        labels[3] = 7
        check_loss(hidden, weight, labels)

    def test_a_position_without_labels_drops_out(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[:, 1:3] = IGNORE
        assert relative_error(fused(hidden, weight, labels), fused(hidden, weight, labels[:, [0, 3]])) < 1e-14
        check_loss(hidden, weight, labels)

    def test_one_bag_a_sequence(self, device):
        # One bag per sequence leaves one position with labels; the paper's listing is NaN here.
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[:, 1:] = IGNORE
        check_loss(hidden, weight, labels)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_all_ignored(self, device, dtype, reduction):
        hidden, weight, labels = loss_case(6, 8, 50, 4, dtype, device)
        labels[:] = IGNORE
        loss, dh, dw = loss_and_gradients(fused, hidden, weight, labels, reduction=reduction)
        assert loss == 0 and not dh.any() and not dw.any()

    def test_ignored_rows_do_not_leak_into_the_gradient(self, device):
        # One of their logits is infinite and their softmax NaN: only a row written as zeros keeps the GEMMs clean.
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[2] = IGNORE
        hidden[:, 0], weight[:, 0] = 0, 0
        keep = [0, 1, 3, 4, 5]
        expected = loss_and_gradients(fused, hidden[keep], weight, labels[keep])
        hidden[2, 0] = weight[7, 0] = 1e200
        assert (hidden @ weight.T)[2, 7] == torch.inf
        loss, dh, dw = loss_and_gradients(fused, hidden, weight, labels)
        assert relative_error(loss, expected[0]) < 1e-14
        assert not dh[2].any() and relative_error(dh[keep, 1:], expected[1][:, 1:]) < 1e-14
        assert relative_error(dw, expected[2]) < 1e-14

    def test_ignore_index_inside_the_vocabulary(self, device):
        check_loss(*loss_case(13, 8, 50, 4, torch.float64, device, ignored=0), ignore_index=0)

    def test_int32_labels(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float32, device)
        assert fused(hidden, weight, labels.int()) == fused(hidden, weight, labels)

    def test_strides(self, device):
        hidden, weight, labels = loss_case(12, 8, 50, 4, torch.float64, device)
        expected = loss_and_gradients(fused, hidden, weight, labels)
        strided = hidden.T.contiguous().T, weight.T.contiguous().T, labels.T.contiguous().T
        assert not any(t.is_contiguous() for t in strided)
        # .clone() in loss_and_gradients keeps these strides.
        for a, b in zip(loss_and_gradients(fused, *strided), expected, strict=True):
            assert relative_error(a, b) < 1e-14

    @pytest.mark.parametrize("shape", [(0,), (2, 0)])
    def test_no_rows(self, device, shape):
        hidden = torch.empty(*shape, 8, device=device, requires_grad=True)
        weight = torch.randn(50, 8, device=device, requires_grad=True)
        loss = fused(hidden, weight, torch.empty(*shape, 4, dtype=torch.long, device=device))
        loss.backward()
        assert loss == 0 and hidden.grad.shape == hidden.shape and torch.equal(weight.grad, torch.zeros_like(weight))

    def test_one_vector(self, device):
        hidden, weight, labels = loss_case(1, 8, 50, 4, torch.float64, device, ignored=0)
        assert fused(hidden[0], weight, labels[0]) == fused(hidden, weight, labels)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("chunk_size", [1, 7, 16, 37, 1000])
    def test_chunk_size_changes_nothing(self, device, dtype, chunk_size):
        case = loss_case(37, 24, 101, 4, dtype, device)
        whole = loss_and_gradients(fused, *case, chunk_size=37)
        cut = loss_and_gradients(fused, *case, chunk_size=chunk_size)
        for a, b in zip(cut, whole, strict=True):  # sums of at most 101 terms, reordered
            assert relative_error(a, b) < 20 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_confident_rows_keep_their_gradient(self, device, dtype):
        # p of the label is about 1 - 1e-3: in bfloat16 it rounds to 1, and p - 1 must not be formed from that.
        vocabulary = 16
        weight = torch.eye(vocabulary, dtype=dtype, device=device)
        hidden = torch.zeros(4, vocabulary, dtype=dtype, device=device)
        labels = torch.arange(4, device=device)[:, None].expand(4, 3)
        hidden[torch.arange(4), labels[:, 0]] = 9.5
        _, dh, _ = loss_and_gradients(fused, hidden, weight, labels, reduction="sum")
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), labels, reduction="sum")[1]
        diagonal = dh[torch.arange(4), labels[:, 0]]
        assert (diagonal.double() < -5e-4).all()
        # The sum of exponentials is a float32 number near 1, and 1 - p = 1.1e-3 is what is left of it.
        allowed = 2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps / 1.1e-3
        assert relative_error(diagonal, exact[torch.arange(4), labels[:, 0]]) < allowed

    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_large_logits(self, device, offset):
        # One constant hidden column adds `offset` to every logit: the loss stays what it is without it. (In bfloat16
        # such logits are 64 apart, in torch as here.)
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float32, device)
        hidden[:, 0], weight[:, 0] = 1, offset
        check_loss(hidden, weight, labels)

    def test_fresh_model_has_loss_log_v(self, device):
        hidden, weight, labels = loss_case(64, 8, 1000, 16, torch.float32, device)
        for bag_size in (1, 4, 16):
            loss = fused(hidden, weight * 0, labels[:, :bag_size])
            assert relative_error(loss, torch.tensor(1000.0, dtype=torch.float64).log()) < 1e-6

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gradcheck(self, device, reduction):
        hidden, weight, labels = loss_case(5, 4, 9, 3, torch.float64, device)
        assert torch.autograd.gradcheck(
            lambda h, w: fused(h, w, labels, reduction=reduction, position_weights="power_law", chunk_size=2),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )

    @given(
        rows=st.integers(1, 12), dim=st.integers(1, 9), vocabulary=st.integers(1, 70), bag_size=st.integers(1, 9),
        chunk_size=st.none() | st.integers(1, 13), reduction=st.sampled_from(["mean", "sum"]),
        dtype=st.sampled_from([torch.float32, torch.float64]), ignored=st.sampled_from([0, 0.3, 0.9, 1]),
        upstream=st.floats(0.1, 10), seed=st.integers(0, 1000),
    )  # fmt: skip
    @settings(max_examples=100, deadline=None)
    def test_any_shape(self, rows, dim, vocabulary, bag_size, chunk_size, reduction, dtype, ignored, upstream, seed):
        hidden, weight, labels = loss_case(rows, dim, vocabulary, bag_size, dtype, "cpu", seed, ignored)
        mine = loss_and_gradients(fused, hidden, weight, labels, upstream, reduction=reduction, chunk_size=chunk_size)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), labels, upstream, reduction=reduction)
        # Few elements, so the reference's own error is luck. The bound: a logit is a sum of dim products, an error of
        # dim eps times its size (below 20) goes into p; p - c cancels to no less than the other columns' norm.
        for actual, wanted in zip(mine, exact, strict=True):
            distance = (actual.double() - wanted).norm()
            scale = wanted.norm() + upstream * (1.0 if reduction == "mean" else rows) * torch.finfo(dtype).eps
            assert distance <= 100 * dim * torch.finfo(dtype).eps * max(1.0, scale.item())


class TestGradientBookkeeping:
    def test_frozen_weight_and_frozen_hidden(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        _, dh, dw = loss_and_gradients(fused, hidden, weight, labels)
        h = hidden.clone().requires_grad_()
        fused(h, weight, labels).backward()
        assert torch.equal(h.grad, dh)
        w = weight.clone().requires_grad_()
        fused(hidden, w, labels).backward()
        assert torch.equal(w.grad, dw)

    def test_no_grad_gives_the_same_loss(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        with_graph = fused(hidden.requires_grad_(), weight.requires_grad_(), labels)
        with torch.no_grad():
            without = fused(hidden, weight, labels)
        assert not without.requires_grad and relative_error(without, with_graph) < 1e-14

    def test_second_backward_through_a_kept_graph(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        hidden.requires_grad_(), weight.requires_grad_()
        loss = fused(hidden, weight, labels)
        loss.backward(retain_graph=True)
        once = hidden.grad.clone(), weight.grad.clone()
        loss.backward(retain_graph=True)
        (3 * loss).backward()
        assert relative_error(hidden.grad, 5 * once[0]) < 1e-14
        assert relative_error(weight.grad, 5 * once[1]) < 1e-14

    def test_gradients_of_a_kept_graph_do_not_share_memory(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        weight.requires_grad_()
        loss = fused(hidden, weight, labels)
        (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
        expected = first.clone()
        (second,) = torch.autograd.grad(loss, weight, retain_graph=True)
        first.zero_()
        (third,) = torch.autograd.grad(loss, weight)
        assert torch.equal(second, expected) and torch.equal(third, expected)

    def test_tied_weight(self, device):
        _, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        ids = zipf_ids((6, 4), 50).to(device)
        results = []
        for embed, loss in ((bag_embedding, fused), (reference.bag_embedding, plain)):
            tied = weight.clone().requires_grad_()
            loss(embed(ids, tied), tied, labels).backward()
            results.append(tied.grad)
        assert relative_error(*results) < 1e-14

    def test_second_derivative_is_refused(self, device):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        hidden.requires_grad_()
        (grad,) = torch.autograd.grad(fused(hidden, weight, labels) ** 2, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="twice|once_differentiable"):
            grad.sum().backward()

    def test_float16_gradients_survive_a_large_mean(self, device):
        # 1 / N of a softmax over V columns is below float16's smallest number; a loss scale must bring it back.
        hidden, weight, labels = loss_case(64, 16, 3000, 4, torch.float16, device)
        scale = 2.0**16
        _, dh, _ = loss_and_gradients(fused, hidden, weight * 0.01, labels, scale)
        exact = loss_and_gradients(plain, hidden.double(), (weight * 0.01).double(), labels, scale)[1]
        assert relative_error(dh, exact) < 4 * torch.finfo(torch.float16).eps

    def test_float16_gradients_do_not_overflow(self, device):
        # 8192 rows of 16 add up to twice float16's largest number before the mean divides by their count.
        hidden = torch.full((8192, 4), 16.0, dtype=torch.float16, device=device)
        weight = torch.zeros(100, 4, dtype=torch.float16, device=device)
        labels = torch.zeros(8192, dtype=torch.long, device=device)
        _, _, dw = loss_and_gradients(fused, hidden, weight, labels, 2.0**-10)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), labels[:, None], 2.0**-10)[2]
        assert relative_error(dw[0], exact[0]) < torch.finfo(torch.float16).eps

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
    def test_autocast_follows_linear(self, device, dtypes, compiled):
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float32, device)
        hidden, weight = hidden.to(dtypes[0]).requires_grad_(), weight.to(dtypes[1]).requires_grad_()
        expected = loss_and_gradients(fused, hidden.bfloat16(), weight.bfloat16(), labels)

        def step(hidden, weight):
            with torch.autocast(device.type, torch.bfloat16):
                return fused(hidden, weight, labels)

        torch._dynamo.reset()
        loss = (torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step)(hidden, weight)
        loss.backward()
        assert loss == expected[0] and weight.grad.dtype == dtypes[1]
        assert torch.equal(weight.grad, expected[2].to(dtypes[1]))
        assert torch.equal(hidden.grad, expected[1].to(dtypes[0]))

    def test_repeats_are_bitwise_equal(self, device):
        case = loss_case(200, 32, 1000, 4, torch.float32, device)
        first = loss_and_gradients(fused, *case, chunk_size=48)
        for _ in range(3):
            for a, b in zip(loss_and_gradients(fused, *case, chunk_size=48), first, strict=True):
                assert torch.equal(a, b)


class TestLossErrors:
    H, W, Y = loss_case(6, 8, 10, 4, torch.float32, "cpu", ignored=0)

    @pytest.mark.parametrize("bad", [10, -1, -101, 2**40])
    def test_label_out_of_range(self, bad):
        labels = self.Y.clone().view(2, 3, 4)
        labels[1, 2, 3] = bad
        with pytest.raises(IndexError, match=rf"labels\[1, 2, 3\] = {bad} .* 0 <= id < 10"):
            fused(self.H.view(2, 3, 8), self.W, labels)

    @pytest.mark.parametrize(
        ("hidden", "weight", "labels", "options", "error", "message"),
        [
            (H.long(), W, Y, {}, TypeError, "hidden.*int64"),
            (H, W, Y.float(), {}, TypeError, "labels.*float32"),
            (H, W.bfloat16(), Y, {}, TypeError, "weight.*float32.*bfloat16"),
            (H, W.T, Y, {}, ValueError, r"weight.*\(8, 10\)"),
            (H, W[0], Y, {}, ValueError, r"weight.*\(8,\)"),
            (torch.tensor(1.0), W, Y, {}, ValueError, r"hidden.*\(\)"),
            (H, W, Y[:5], {}, ValueError, r"labels.*\(6, 's'\).*\(5, 4\)"),
            (H, W, Y[:, :0], {}, ValueError, r"labels.*\(6, 0\)"),
            (H.view(2, 3, 8), W, Y, {}, ValueError, r"labels.*\(2, 3, 's'\).*\(6, 4\)"),
            (H, W, Y, {"reduction": "none"}, ValueError, "reduction.*'none'"),
            (H, W, Y, {"chunk_size": 0}, ValueError, "chunk_size.*0"),
            (H, W, Y, {"chunk_size": 2.5}, ValueError, "chunk_size.*2.5"),
            (H, None, Y, {}, TypeError, "weight.*NoneType"),
            (H, W.to_sparse(), Y, {}, ValueError, "weight.*sparse"),
            (H, W, Y, {"position_weights": [1, 1, 1, 1]}, TypeError, "position_weights.*list"),
            (H, W, Y[:, 0] + torch.tensor([0, 0, 0, 77, 0, 0]), {}, IndexError, r"labels\[3\] = [78]"),
            (H, W, Y, {"position_weights": "cubic"}, ValueError, "'cubic'"),
            (H, W, Y, {"position_weights": torch.ones(3)}, ValueError, r"position_weights.*\(4,\).*\(3,\)"),
            (H, W, Y, {"position_weights": torch.ones(4, requires_grad=True)}, ValueError, "position_weights"),
            (H, W, Y, {"position_weights": torch.tensor([1, 1, -1.0, 1])}, ValueError, r"position_weights\[2\].*-1"),
            (H, W, Y, {"position_weights": torch.tensor([1, torch.nan, 1, 1])}, ValueError, r"weights\[1\].*nan"),
            (H, W, Y.to("meta"), {}, ValueError, "cpu.*meta"),
        ],
    )
    def test_arguments(self, hidden, weight, labels, options, error, message):
        with pytest.raises(error, match=message):
            fused(hidden, weight, labels, **options)


# ---- torch.compile and torch.library ---------------------------------------------------------------------------------


class TestRegistration:
    TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def test_bag_embedding(self):
        ids, weight, grad = embedding_case((4, 3), 11, 5, torch.float32, "cpu")
        torch.library.opcheck(torch.ops.tst_ext.bag_embedding, (ids, weight, "mean"), test_utils=self.TESTS)
        torch.library.opcheck(torch.ops.tst_ext.bag_embedding_backward, (grad, ids, 11, "mean"), test_utils=self.TESTS)

    @pytest.mark.parametrize("grads", [(False, False), (True, True), (True, False)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear_multi_hot_cross_entropy(self, grads, dtype):
        torch.library.opcheck(
            torch.ops.tst_ext.linear_multi_hot_cross_entropy,
            loss_case(6, 8, 50, 4, dtype, "cpu"),
            dict(grad_hidden=grads[0], grad_weight=grads[1], chunk_size=4),
            test_utils=self.TESTS,
        )

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_without_graph_break(self, dynamic):
        torch._dynamo.reset()
        ids, table, _ = embedding_case((2, 3, 4), 50, 8, torch.float32, "cpu")
        _, head, labels = loss_case(6, 8, 50, 4, torch.float32, "cpu")

        def step(ids, labels, table, head):
            return linear_multi_hot_cross_entropy(bag_embedding(ids, table), head, labels)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        results = []
        for function in (step, compiled):
            parameters = table.clone().requires_grad_(), head.clone().requires_grad_()
            loss = function(ids, labels.view(2, 3, 4), *parameters)
            results.append((loss, *torch.autograd.grad(2.5 * loss, parameters)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


# ---- devices without kernels -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:tst_ext")
class TestFallback:
    """Plain torch stands in where there is no kernel. Called by name here, on the CPU, beside the kernels."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mode", ["mean", "sum"])
    def test_bag_embedding(self, dtype, mode):
        ids, weight, grad = embedding_case((3, 5, 4), 23, 70, dtype, "cpu")
        mine = fallback.bag_embedding(ids, weight, mode), fallback.bag_embedding_backward(grad, ids, 23, mode)
        exact = embedding_and_gradient(reference.bag_embedding, ids, weight.double(), grad.double(), mode)
        plain = embedding_and_gradient(reference.bag_embedding, ids, weight, grad, mode)
        for actual, wanted, beside in zip(mine, exact, plain, strict=True):
            assert_accurate(actual, wanted, beside, terms=20)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("chunk_size", [None, 10])
    @pytest.mark.parametrize("ignored", [0.2, 1.0])
    def test_loss_and_gradients(self, dtype, reduction, chunk_size, ignored):
        hidden, weight, labels = loss_case(37, 24, 101, 4, dtype, "cpu", ignored=ignored)
        weights = torch.tensor([1, 0.5, 0, 0.25])
        options = dict(position_weights=weights, reduction=reduction, grad_hidden=True, grad_weight=True)
        mine = fallback.linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)
        kernel = torch.ops.tst_ext.linear_multi_hot_cross_entropy(hidden, weight, labels, **options)
        case = hidden.double(), weight.double(), labels
        exact = loss_and_gradients(plain, *case, position_weights=weights, reduction=reduction)
        for i, wanted in zip((0, 2, 3), exact, strict=True):
            assert mine[i].dtype == kernel[i].dtype and mine[i].shape == kernel[i].shape
            # Judged beside the kernel, whose own error TestLinearMultiHotCrossEntropy bounds.
            assert_accurate(mine[i], wanted, kernel[i], terms=101)
        assert_accurate(mine[1], kernel[1].double(), kernel[1], terms=101)

    def test_bad_weights(self):
        hidden, weight, labels = loss_case(6, 8, 50, 2, torch.float32, "cpu")
        for bad in (-1.0, torch.nan, torch.inf):
            with pytest.raises(ValueError, match="position_weights"):
                fallback.linear_multi_hot_cross_entropy(hidden, weight, labels, position_weights=torch.tensor([1, bad]))

    def test_no_columns(self):
        out = fallback.linear_multi_hot_cross_entropy(torch.empty(3, 0), torch.empty(50, 0), torch.zeros(3, 4).long())
        assert relative_error(out[0], torch.tensor(50.0, dtype=torch.float64).log()) < 1e-6

    def test_no_rows(self):
        out = fallback.linear_multi_hot_cross_entropy(
            torch.empty(0, 8), torch.randn(50, 8), torch.empty(0, 4).long(), grad_hidden=True, grad_weight=True
        )
        assert out[0] == 0 and out[2].shape == (0, 8) and torch.equal(out[3], torch.zeros(50, 8))

    def test_shapes_on_meta(self):
        ids, weight, _ = embedding_case((2, 3, 4), 11, 5, torch.float32, "meta")
        assert bag_embedding(ids, weight).shape == (2, 3, 5)
        hidden, weight, labels = loss_case(6, 8, 50, 4, torch.float32, "cpu")
        hidden = hidden.to("meta").requires_grad_()
        loss = fused(hidden, weight.to("meta"), labels.to("meta"))
        loss.backward()
        assert loss.shape == () and hidden.grad.shape == hidden.shape and hidden.grad.is_meta

    def test_warns_once(self):
        fallback._warn.cache_clear()
        ids, weight, _ = embedding_case((2, 3), 11, 5, torch.float32, "cpu")
        with pytest.warns(UserWarning, match="bag_embedding: no compiled kernel for cpu"):
            fallback.bag_embedding(ids, weight, "mean")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fallback.bag_embedding(ids, weight, "mean")
