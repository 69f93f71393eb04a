"""The loss without options against plain torch in float64: shapes, dtypes, ignored labels, numerics, determinism."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.cases import (
    CAPABILITIES,
    DTYPES,
    FUNCTIONS,
    IGNORE,
    KERNELS,
    check_loss,
    each_device,
    fused,
    generator,
    loss_and_gradients,
    loss_case,
    on_logits,
    pairwise,
    plain,
)
from helpers.numerics import relative_error
from tst_ext import _C, multi_hot_cross_entropy


class TestShapes:
    @pairwise(
        dtype=DTYPES, capability=CAPABILITIES, function=FUNCTIONS, reduction=["mean", "sum"], upstream=[1.0, -2.7],
        fixtures=["capability"],
    )  # fmt: skip
    def test_loss_and_gradients(self, device, dtype, reduction, upstream, function, capability):
        case = loss_case(37, 24, 101, 4, dtype, device)
        check_loss(*case, upstream, function, reduction=reduction, chunk_size=10)

    @pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 4096, 4099])
    def test_every_tail(self, device, vocabulary, capability):
        check_loss(*loss_case(5, 8, vocabulary, 3, torch.float32, device, bias=True))

    @pairwise(bag_size=[1, 2, 6, 16, 64], objective=["mce", "mce_alt"], vocabulary=[1, 50])
    def test_bag_sizes(self, device, bag_size, objective, vocabulary):
        check_loss(*loss_case(11, 8, vocabulary, bag_size, torch.float32, device), objective=objective)

    def test_bag_size_one_is_cross_entropy(self, device):
        hidden, weight, bias, labels = loss_case(13, 8, 50, 1, torch.float64, device, bias=True)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), labels.squeeze(-1))
        for y in (labels, labels.squeeze(-1)):
            for objective in ("mce", "mce_alt"):
                assert relative_error(fused(hidden, weight, bias, y, objective=objective), expected) < 1e-14

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_leading_dimensions(self, device, reduction):
        hidden, weight, bias, labels = loss_case(12, 8, 50, 4, torch.float32, device)
        upstream = torch.ones((), device=device)
        flat = loss_and_gradients(fused, hidden, weight, bias, labels, upstream, reduction=reduction)
        case = hidden.view(2, 3, 2, 8), weight, bias, labels.view(2, 3, 2, 4)
        shaped = loss_and_gradients(fused, *case, upstream, reduction=reduction)
        assert shaped[0].shape == (() if reduction == "mean" else (2, 3, 2)) and shaped[1].shape == (2, 3, 2, 8)
        for a, b in zip(shaped, flat, strict=True):
            assert torch.equal(a.reshape(b.shape), b)

    def test_strides(self, device):
        hidden, weight, bias, labels = loss_case(12, 8, 50, 4, torch.float64, device, bias=True)
        expected = loss_and_gradients(fused, hidden, weight, bias, labels)
        strided = (
            hidden.T.contiguous().T,
            weight.T.contiguous().T,
            torch.stack((bias, bias), 1)[:, 0],
            labels.T.contiguous().T,
        )
        assert not any(t.is_contiguous() for t in strided)
        # .clone() in loss_and_gradients keeps the strides of matrices.
        for a, b in zip(loss_and_gradients(fused, *strided), expected, strict=True):
            assert relative_error(a, b) < 1e-14
        logits = F.linear(hidden, weight, bias).T.contiguous().T.requires_grad_()
        assert not logits.is_contiguous()
        loss = multi_hot_cross_entropy(logits, strided[3])
        loss.backward()
        assert relative_error(loss, expected[0]) < 1e-14
        assert relative_error(logits.grad.T @ hidden, expected[2]) < 1e-14

    @pairwise(
        function=FUNCTIONS, reduction=["mean", "sum", "none"], shape=[(0,), (2, 0)], kernels=KERNELS,
        fixtures=["kernels"],
    )  # fmt: skip
    def test_no_rows(self, device, shape, function, reduction, kernels):
        _, weight, bias, _ = loss_case(1, 8, 50, 4, torch.float32, device, bias=True)
        hidden, labels = torch.empty(*shape, 8, device=device), torch.empty(*shape, 4, dtype=torch.long, device=device)
        loss, dh, dw, db = loss_and_gradients(function, hidden, weight, bias, labels, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ()) and not loss.any()
        assert dh.shape == hidden.shape and torch.equal(dw, torch.zeros_like(weight)) and not db.any()

    def test_one_vector(self, device):
        hidden, weight, bias, labels = loss_case(1, 8, 50, 4, torch.float64, device, ignored=0)
        assert fused(hidden[0], weight, bias, labels[0]) == fused(hidden, weight, bias, labels)
        assert fused(hidden[0], weight, bias, labels[0], reduction="none").shape == ()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_vocabulary(self, device, dtype, kernels, bfloat16_gemms):
        labels = torch.full((600, 3), IGNORE)
        torch.full((600, 4), 7.0, dtype=torch.promote_types(dtype, torch.float32))  # leaves memory that is not 0
        _, dh, dw = loss_and_gradients(
            fused, torch.ones(600, 4, dtype=dtype), torch.ones(0, 4, dtype=dtype), None, labels
        )
        assert not dh.any() and dw.shape == (0, 4)

    def test_no_columns(self, device, kernels):
        # d = 0: all logits are 0
        loss = fused(torch.empty(3, 0), torch.empty(50, 0), None, torch.zeros(3, 4, dtype=torch.long))
        assert relative_error(loss, torch.tensor(50.0, dtype=torch.float64).log()) < 1e-6

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_int32_labels(self, device, function, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float32, device)
        for a, b in zip(
            loss_and_gradients(function, hidden, weight, bias, labels.int()),
            loss_and_gradients(function, hidden, weight, bias, labels),
            strict=True,
        ):
            assert torch.equal(a, b)


class TestLabels:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_label_twice_in_a_bag_counts_twice(self, device, dtype):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, dtype, device)
        labels[:, 2] = labels[:, 0] = 7
        labels[3] = 7
        check_loss(hidden, weight, bias, labels)

    def test_a_position_without_labels_drops_out(self, device):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[:, 1:3] = IGNORE
        expected = fused(hidden, weight, bias, labels[:, [0, 3]])
        assert relative_error(fused(hidden, weight, bias, labels), expected) < 1e-14
        check_loss(hidden, weight, bias, labels)

    def test_one_bag_a_sequence(self, device):
        # One bag per sequence leaves one position with labels; the paper's listing is NaN here.
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[:, 1:] = IGNORE
        check_loss(hidden, weight, bias, labels)

    @pairwise(
        dtype=DTYPES, function=FUNCTIONS, reduction=["mean", "sum", "none"], objective=["mce", "mce_alt"],
        kernels=KERNELS, fixtures=["kernels"],
    )  # fmt: skip
    def test_all_ignored(self, device, dtype, reduction, objective, function, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, dtype, device, bias=True)
        labels[:] = IGNORE
        options = dict(reduction=reduction, objective=objective, z_loss=0.1, label_smoothing=0.1)
        for result in loss_and_gradients(function, hidden, weight, bias, labels, **options):
            assert not result.any()

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}, {"objective": "mce_alt"}])
    def test_ignored_rows_do_not_leak_into_the_gradient(self, device, function, options, kernels):
        # One of their logits is infinite and their softmax NaN: only a row written as zeros keeps the GEMMs clean.
        hidden, weight, _, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        labels[2] = IGNORE
        hidden[:, 0], weight[:, 0] = 0, 0
        keep = [0, 1, 3, 4, 5]
        expected = loss_and_gradients(function, hidden[keep], weight, None, labels[keep], **options)
        hidden[2, 0] = weight[7, 0] = 1e200
        assert (hidden @ weight.T)[2, 7] == torch.inf
        loss, dh, dw = loss_and_gradients(function, hidden, weight, None, labels, **options)
        assert relative_error(loss, expected[0]) < 1e-14
        assert not dh[2].any() and relative_error(dh[keep, 1:], expected[1][:, 1:]) < 1e-14
        assert relative_error(dw, expected[2]) < 1e-14

    def test_ignore_index_inside_the_vocabulary(self, device):
        check_loss(*loss_case(13, 8, 50, 4, torch.float64, device, ignored=0), ignore_index=0)

    def test_fresh_model_has_loss_log_v(self, device, kernels):
        hidden, weight, bias, labels = loss_case(64, 8, 1000, 16, torch.float32, device)
        for bag_size in (1, 4, 16):
            loss = fused(hidden, weight * 0, bias, labels[:, :bag_size])
            assert relative_error(loss, torch.tensor(1000.0, dtype=torch.float64).log()) < 1e-6


class TestNumerics:
    @pairwise(dtype=DTYPES, function=FUNCTIONS, objective=["mce", "mce_alt"], kernels=KERNELS, fixtures=["kernels"])
    def test_confident_rows_keep_their_gradient(self, device, dtype, function, objective, kernels):
        # p of the label is about 1 - 1e-3: in bfloat16 it rounds to 1, and p - 1 must not be formed from that.
        vocabulary = 16
        weight = torch.eye(vocabulary, dtype=dtype, device=device)
        hidden = torch.zeros(4, vocabulary, dtype=dtype, device=device)
        labels = torch.arange(4, device=device)[:, None].expand(4, 3)
        diagonal = torch.arange(4), labels[:, 0]
        hidden[diagonal] = 9.5
        options = dict(reduction="sum", objective=objective)
        dh = loss_and_gradients(function, hidden, weight, None, labels, **options)[1][diagonal]
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), None, labels, **options)[1][diagonal]
        assert (dh.double() < -5e-4).all()
        # The sum of exponentials is a float32 number near 1, and 1 - p = 1.1e-3 is what is left of it.
        allowed = 2 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps / 1.1e-3
        assert relative_error(dh, exact) < allowed

    @pairwise(
        options=[{}, {"objective": "mce_alt"}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}], function=FUNCTIONS,
        offset=[1e4, -1e4],
    )  # fmt: skip
    def test_large_logits(self, device, offset, options, function):
        # 1e4 more on every logit changes no gradient but z_loss's. Entries in sixteenths, so that float32 holds the
        # logits exactly and errors are the loss's alone. (In bfloat16 such logits are 64 apart, in torch as here.)
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float32, device, bias=True)
        hidden, weight, bias = ((16 * t).round() / 16 for t in (hidden, weight, bias))
        assert torch.equal(
            (hidden @ weight.T + (bias + offset)).double(), hidden.double() @ weight.double().T + bias.double() + offset
        )
        check_loss(hidden, weight, bias + offset, labels, 1.0, function, **options)
        if "z_loss" not in options:
            exact = loss_and_gradients(plain, *(t.double() for t in (hidden, weight, bias)), labels, **options)
            shifted = loss_and_gradients(function, hidden, weight, bias + offset, labels, **options)
            for a, b in zip(shifted, exact, strict=True):
                assert relative_error(a, b) < 20 * torch.finfo(torch.float32).eps

    def test_float16_gradients_survive_a_large_mean(self, device):
        # 1 / N of a softmax over V columns is below float16's smallest number; a loss scale must bring it back.
        hidden, weight, bias, labels = loss_case(64, 16, 3000, 4, torch.float16, device)
        scale, weight = 2.0**16, weight * 0.01
        _, dh, _ = loss_and_gradients(fused, hidden, weight, bias, labels, scale)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), bias, labels, scale)[1]
        assert relative_error(dh, exact) < 4 * torch.finfo(torch.float16).eps

    def test_float16_gradients_do_not_overflow(self, device):
        # 8192 rows of 16 add up to twice float16's largest number before the mean divides by their count.
        hidden = torch.full((8192, 4), 16.0, dtype=torch.float16, device=device)
        weight = torch.zeros(100, 4, dtype=torch.float16, device=device)
        labels = torch.zeros(8192, dtype=torch.long, device=device)
        _, _, dw = loss_and_gradients(fused, hidden, weight, None, labels, 2.0**-10)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), None, labels[:, None], 2.0**-10)[2]
        assert relative_error(dw[0], exact[0]) < torch.finfo(torch.float16).eps

    @pytest.mark.parametrize("chunk_size", [16, 256, 4096])
    def test_bfloat16_weight_gradient_does_not_drift_with_chunks(self, device, chunk_size, bfloat16_gemms):
        # 4096 rows in 256 chunks: summed in bfloat16, whose eps is 1 / 128, late chunks would be lost.
        hidden, weight, bias, labels = loss_case(4096, 16, 64, 2, torch.bfloat16, device, bias=True)
        check_loss(hidden, weight, bias, labels, chunk_size=chunk_size)
        results = loss_and_gradients(fused, hidden, weight, bias, labels, chunk_size=chunk_size)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), bias.double(), labels)
        for actual, wanted in zip(results[2:], exact[2:], strict=True):
            # dlogits and the result are rounded to bfloat16, and so is each chunk's product: half an eps each, at
            # random, in parts of random sign.
            assert relative_error(actual, wanted) < 2 * torch.finfo(torch.bfloat16).eps

    def test_bfloat16_weight_gradient_in_blocks(self, device, bfloat16_gemms):
        # Products wait in 1 MiB, 8 rows of this d, to be added to the float32 sum.
        hidden, weight, bias, labels = loss_case(4, 65536, 60, 3, torch.bfloat16, device)
        for a, b in zip(
            loss_and_gradients(fused, hidden, weight, bias, labels, chunk_size=3),
            loss_and_gradients(plain, hidden.double(), weight.double(), bias, labels),
            strict=True,
        ):
            assert relative_error(a, b) < 2 * torch.finfo(torch.bfloat16).eps

    @pairwise(
        dtype=[torch.float32, torch.bfloat16, torch.float16], upstream=[None, -0.25, 0.7], function=[fused, on_logits],
        objective=["mce", "mce_alt"],
    )  # fmt: skip
    @pytest.mark.parametrize("gemm", ["blas"], indirect=True)  # plain torch's own: oneDNN adds in another order
    def test_no_less_exact_than_plain_torch(self, device, dtype, function, objective, upstream, gemm):
        # A case so large that luck averages out: 1.1 times plain torch's error with nothing allowed besides. But where
        # the fused gradient, rounded when it was computed, is multiplied by no power of two, it is rounded again.
        hidden, weight, bias, labels = loss_case(600, 64, 3000, 4, dtype, device, bias=True)
        again = torch.finfo(dtype).eps / 2 if upstream == 0.7 and function == fused else 0
        options = dict(objective=objective, reduction="none" if upstream is None else "mean")
        upstream = torch.randn(600, generator=generator()).to(device) if upstream is None else upstream
        case = hidden, weight, bias, labels
        mine = loss_and_gradients(function, *case, upstream, **options)
        beside = loss_and_gradients(plain, *case, upstream, **options)
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), bias.double(), labels, upstream, **options)
        target = torch.zeros(3000, dtype=torch.bool, device=device)
        target[labels[labels != IGNORE]] = True
        assert 100 < target.sum() < 2900
        assert relative_error(mine[1], exact[1]) <= 1.1 * relative_error(beside[1], exact[1]) + again
        for columns in (target, ~target):
            for actual, wanted, other in zip(mine[2:], exact[2:], beside[2:], strict=True):
                error = relative_error(actual[columns], wanted[columns])
                assert error <= 1.1 * relative_error(other[columns], wanted[columns]) + again

    @each_device
    @given(
        rows=st.integers(1, 40), dim=st.integers(1, 20), vocabulary=st.integers(1, 130), bag_size=st.integers(1, 9),
        chunk_size=st.none() | st.integers(1, 13), reduction=st.sampled_from(["mean", "sum", "none"]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        ignored=st.sampled_from([0, 0.3, 0.9, 1]), function=st.sampled_from(FUNCTIONS), bias=st.booleans(),
        weights=st.sampled_from([None, "power_law", "first"]), transposed=st.booleans(), seed=st.integers(0, 1000),
    )  # fmt: skip
    def test_as_close_to_float64_as_plain_torch(
        self, device, rows, dim, vocabulary, bag_size, chunk_size, reduction, dtype, ignored, function, bias, weights,
        transposed, seed,
    ):  # fmt: skip
        hidden, weight, b, labels = loss_case(rows, dim, vocabulary, bag_size, dtype, device, seed, ignored, bias)
        if transposed:
            hidden, weight, labels = hidden.T.contiguous().T, weight.T.contiguous().T, labels.T.contiguous().T
        upstream = torch.randn(rows if reduction == "none" else (), generator=generator(seed), dtype=torch.float64)
        check_loss(
            hidden, weight, b, labels, upstream, function,
            chunk_size=chunk_size, reduction=reduction, position_weights=weights,
        )  # fmt: skip


class TestGemm:
    """Float32 on CPU by either of torch's libraries, in blocks of some 1000 columns of the logits."""

    @pytest.mark.parametrize("vocabulary", [1000, 1024, 2500])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_loss_and_gradients(self, gemm, dtype, vocabulary):
        case = loss_case(700, 48, vocabulary, 3, dtype, "cpu", bias=True)
        check_loss(*case, chunk_size=300)

    def test_same_results(self, gemm):
        case = loss_case(700, 48, 2500, 3, torch.float32, "cpu", bias=True)
        mine = loss_and_gradients(fused, *case, chunk_size=300)
        _C.set_cpu_gemm("blas")
        # grad_hidden, the worst: 2500 terms each, added by oneDNN one after the other.
        for a, b in zip(mine, loss_and_gradients(fused, *case, chunk_size=300), strict=True):
            assert relative_error(a, b) < 10 * torch.finfo(torch.float32).eps

    def test_repeats_are_bitwise_equal(self, gemm):
        case = loss_case(700, 48, 2500, 3, torch.float32, "cpu", bias=True)
        first = loss_and_gradients(fused, *case, chunk_size=300)
        for _ in range(3):
            again = loss_and_gradients(fused, *case, chunk_size=300)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))

    def test_without_bias_and_weights_that_are_no_contiguous_matrix(self, gemm):
        hidden, weight, _, labels = loss_case(300, 48, 2500, 3, torch.float32, "cpu")
        check_loss(hidden.T.contiguous().T, weight.T.contiguous().T, None, labels)

    def test_strides(self, gemm):
        hidden, weight, bias, labels = loss_case(300, 64, 5000, 3, torch.float32, "cpu", bias=True)
        one = bias[:1]
        for b, strided in ((bias, torch.stack((bias, bias), 1)[:, 0]), (one.expand(5000).clone(), one.expand(5000))):
            for w in (weight, weight.T.contiguous().T, torch.cat((weight, weight), 1)[:, :64]):
                results = []
                for bias_, weight_ in ((b, weight), (strided, w)):
                    h, weight_ = hidden.clone().requires_grad_(), weight_.detach().requires_grad_()
                    loss = fused(h, weight_, bias_, labels)
                    with torch.no_grad():  # another path
                        alone = fused(h, weight_, bias_, labels)
                    results.append((loss, alone, *torch.autograd.grad(loss, (h, weight_))))
                for found, expected in zip(*reversed(results), strict=True):  # sums of 5000 terms, reordered
                    assert relative_error(found, expected) < 20 * torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_without_gradients(self, gemm, reduction):
        case = loss_case(700, 48, 9000, 3, torch.float32, "cpu", bias=True)
        labels = case[-1]  # first and last columns of the blocks, 2048 at 350 rows
        for i, v in enumerate((0, 2047, 2048, 4095, 4096, 8191, 8192, 8999)):
            labels[i] = v
        expected = plain(*(t.double() for t in case[:3]), labels, reduction=reduction)
        with torch.no_grad():
            found = fused(*case, reduction=reduction)
        assert relative_error(found, expected) < 16 * torch.finfo(torch.float32).eps  # as the C++ tests, of lse

    def test_no_rows(self, gemm):
        hidden, weight, bias, labels = loss_case(0, 8, 20, 3, torch.float32, "cpu", bias=True)
        assert all(not g.any() for g in loss_and_gradients(fused, hidden, weight, bias, labels, reduction="sum"))


class TestDeterminism:
    @pairwise(function=FUNCTIONS, reduction=["mean", "none"], kernels=KERNELS, fixtures=["kernels"])
    def test_repeats_are_bitwise_equal(self, device, function, reduction, kernels):
        case = loss_case(200, 32, 1000, 4, torch.float32, device, bias=True)
        first = loss_and_gradients(function, *case, chunk_size=48, reduction=reduction)
        for _ in range(3):
            again = loss_and_gradients(function, *case, chunk_size=48, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_our_reductions_do_not_depend_on_the_number_of_threads(self, dtype):
        # On logits that exist, where no GEMM library has a say; and the bias gradient, which sums over rows.
        # A thread has at least 1024 columns of the bias gradient.
        hidden, weight, bias, labels = loss_case(600, 8, 2500, 4, dtype, "cpu", bias=True)
        logits = F.linear(hidden, weight, bias)
        zero = torch.zeros(2500, 1, dtype=dtype)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                leaf, b = logits.clone().requires_grad_(), bias.clone().requires_grad_()
                loss = multi_hot_cross_entropy(leaf, labels, z_loss=0.1)
                # All logits are the bias: d = 1 and a weight of zeros.
                other = fused(torch.zeros(600, 1, dtype=dtype), zero, b, labels, chunk_size=250)
                results.append([loss, *torch.autograd.grad(loss, leaf), other, *torch.autograd.grad(other, b)])
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))

    @pytest.mark.parametrize("threads", [2, 3])
    def test_several_threads_add_up_bfloat16_gradients(self, threads, bfloat16_gemms):
        # 160,000 numbers of the weight's gradient, of which a thread adds at least 16,384 to the float32 sum.
        case = loss_case(90, 64, 2500, 4, torch.bfloat16, "cpu", bias=True)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            check_loss(*case, chunk_size=30)
            first, again = (loss_and_gradients(fused, *case, chunk_size=30) for _ in range(2))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("chunk_size", [1, 7, 16, 37, 1000])
    def test_chunk_size_changes_nothing(self, device, dtype, chunk_size):
        case = loss_case(37, 24, 101, 4, dtype, device, bias=True)
        whole = loss_and_gradients(fused, *case, chunk_size=37)
        cut = loss_and_gradients(fused, *case, chunk_size=chunk_size)
        for a, b in zip(cut, whole, strict=True):  # sums of at most 101 terms, reordered
            assert relative_error(a, b) < 20 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("chunk_size", [1, 100, 333, None])
    def test_same_loss_for_any_chunk_size(self, device, chunk_size):
        case = loss_case(2000, 32, 1000, 4, torch.float32, device)
        assert relative_error(fused(*case, chunk_size=chunk_size), fused(*case, chunk_size=2000)) < 1e-6


class TestGradients:
    def test_frozen_weight_and_frozen_hidden(self, device):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device, bias=True)
        expected = loss_and_gradients(fused, hidden, weight, bias, labels)[1:]
        for reduction in ("mean", "none"):
            for i, wanted in enumerate(expected):
                leaves = [hidden.clone(), weight.clone(), bias.clone()]
                leaves[i].requires_grad_()
                loss = fused(*leaves, labels, reduction=reduction)
                upstream = None if reduction == "mean" else torch.ones_like(loss)
                loss.backward(upstream)
                if reduction == "mean":
                    assert torch.equal(leaves[i].grad, wanted)
                assert leaves[i].grad.any() and all(t.grad is None for j, t in enumerate(leaves) if j != i)

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_no_grad_gives_the_same_loss(self, device, function):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        with_graph = function(hidden.requires_grad_(), weight.requires_grad_(), bias, labels)
        with torch.no_grad():
            without = function(hidden, weight, bias, labels)
        assert not without.requires_grad and relative_error(without, with_graph) < 1e-14

    @pytest.mark.parametrize("tells", [True, False], ids=["torch tells of the graph", "a torch that does not"])
    def test_a_second_gradient_does_not_share_memory_with_the_first(self, device, tells, monkeypatch):
        if not tells:
            monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        hidden.requires_grad_(), weight.requires_grad_()
        loss = fused(hidden, weight, bias, labels)
        once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a, b)
            a.zero_()
            assert b.any()

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_gradients_do_not_share_memory_with_the_arguments(self, device, function):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        before = hidden.clone(), weight.clone()
        for gradient in loss_and_gradients(function, hidden, weight, bias, labels)[1:]:
            gradient.fill_(7)
        assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])

    @pairwise(
        options=[
            {},
            {"reduction": "sum", "position_weights": "power_law"},
            {"reduction": "none"},
            {"objective": "mce_alt", "z_loss": 0.1},
            {"logit_softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2},
            {"reduction": "none", "objective": "mce_alt", "logit_softcap": 2.0, "label_smoothing": 0.2},
        ],
        function=[fused, on_logits],
        kernels=KERNELS,
        fixtures=["kernels"],
    )
    def test_gradcheck(self, device, function, options, kernels):
        hidden, weight, bias, labels = loss_case(5, 4, 9, 3, torch.float64, device, bias=True)
        leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

        def call(*leaves):
            return function(*leaves, labels, chunk_size=2, return_lse=True, return_z_loss=True, **options)

        assert torch.autograd.gradcheck(call, leaves)
