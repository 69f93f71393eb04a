"""Each option of the loss against plain torch in float64, alone and together, and the identities it promises."""

import math

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
    some_weights,
)
from helpers.numerics import relative_error
from tst_ext import multi_hot_cross_entropy, position_weights
from tst_ext.ops.chunked import compute_dtype

EPS = torch.finfo(torch.float32).eps

OPTIONS = {
    "mce_alt": dict(objective="mce_alt"),
    "power_law": dict(position_weights="power_law"),
    "weights with zeros": dict(position_weights=torch.tensor([0.3, 0, 7, 0])),
    "label_weights": dict(label_weights=some_weights),
    "softcap": dict(logit_softcap=2.0),
    "z_loss": dict(z_loss=0.03),
    "label_smoothing": dict(label_smoothing=0.2),
    "smoothing alone": dict(label_smoothing=1.0),
    "normalizer": dict(normalizer=17),
    "all": dict(
        position_weights="fitted", label_weights=some_weights, logit_softcap=2.0, z_loss=0.03, label_smoothing=0.2
    ),
    "all of mce_alt": dict(objective="mce_alt", logit_softcap=2.0, z_loss=0.03, label_smoothing=0.2, normalizer=17),
}
functions = pytest.mark.parametrize("function", FUNCTIONS)


def for_reduction(options, reduction):
    """Options with this reduction; a normalizer is that of the mean alone."""
    kept = {name: value for name, value in options.items() if name != "normalizer" or reduction == "mean"}
    return dict(kept, reduction=reduction)


def upstream_of(rows, options, seed=1):
    """Random: one number, or one per row where the loss has rows."""
    shape = rows if options.get("reduction") == "none" else ()
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class TestAgainstPlainTorch:
    @pairwise(
        options=list(OPTIONS), dtype=DTYPES, function=FUNCTIONS, reduction=["mean", "none"], kernels=KERNELS,
        fixtures=["kernels"],
    )  # fmt: skip
    def test_loss_and_gradients(self, device, dtype, function, options, reduction, kernels):
        options = dict(for_reduction(OPTIONS[options], reduction), chunk_size=10)
        case = loss_case(23, 12, 51, 4, dtype, device, bias=True)
        check_loss(*case, upstream_of(23, options).to(device), function, **options)

    @pairwise(options=list(OPTIONS), vocabulary=[1, 3, 31, 33, 300], capability=CAPABILITIES, fixtures=["capability"])
    def test_every_instruction_set(self, device, options, vocabulary, capability):
        case = loss_case(7, 6, vocabulary, 4, torch.float32, device, bias=True)
        check_loss(*case, function=on_logits, **OPTIONS[options])

    @each_device
    @given(
        rows=st.integers(1, 30), dim=st.integers(1, 12), vocabulary=st.integers(1, 100), bag_size=st.integers(1, 9),
        chunk_size=st.none() | st.integers(1, 13), reduction=st.sampled_from(["mean", "sum", "none"]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        ignored=st.sampled_from([0, 0.3, 0.9, 1]), function=st.sampled_from(FUNCTIONS), bias=st.booleans(),
        objective=st.sampled_from(["mce", "weighted", "mce_alt"]), softcap=st.sampled_from([None, 0.5, 30.0]),
        z_loss=st.sampled_from([0.0, 0.1]), smoothing=st.sampled_from([0.0, 0.3]), normalizer=st.none() | st.just(7.5),
        seed=st.integers(0, 1000),
    )  # fmt: skip
    def test_all_options_together(
        self, device, rows, dim, vocabulary, bag_size, chunk_size, reduction, dtype, ignored, function, bias, objective,
        softcap, z_loss, smoothing, normalizer, seed,
    ):  # fmt: skip
        options = dict(
            objective=objective.replace("weighted", "mce"), logit_softcap=softcap, z_loss=z_loss,
            label_smoothing=smoothing, reduction=reduction, chunk_size=chunk_size,
            normalizer=normalizer if reduction == "mean" else None,
            label_weights=some_weights if objective == "weighted" else None,
        )  # fmt: skip
        case = loss_case(rows, dim, vocabulary, bag_size, dtype, device, seed, ignored, bias)
        check_loss(*case, upstream_of(rows, options, seed), function, **options)


class TestReductionNone:
    @pairwise(options=list(OPTIONS), function=FUNCTIONS, kernels=KERNELS, fixtures=["kernels"])
    def test_its_sum_is_the_sum(self, device, function, options, kernels):
        options = OPTIONS[options]
        case = loss_case(23, 12, 51, 4, torch.float32, device, bias=True)
        rows = loss_and_gradients(function, *case, **for_reduction(options, "none"), chunk_size=10)
        whole = loss_and_gradients(function, *case, **for_reduction(options, "sum"), chunk_size=10)
        assert rows[0].shape == (23,)
        for a, b in zip((rows[0].double().sum(), *rows[1:]), whole, strict=True):
            assert relative_error(a, b) < 4 * EPS

    @functions
    def test_a_row_has_its_own_upstream(self, device, function, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device, ignored=0)
        upstream = torch.tensor([0, 0, 3.0, 0, 0, 0], dtype=torch.float64, device=device)
        _, dh, dw = loss_and_gradients(function, hidden, weight, bias, labels, upstream, reduction="none")
        alone = loss_and_gradients(function, hidden[2:3], weight, bias, labels[2:3], 3.0, reduction="sum")
        assert not dh[[0, 1, 3, 4, 5]].any()
        assert relative_error(dh[2:3], alone[1]) < 1e-14 and relative_error(dw, alone[2]) < 1e-14

    @functions
    def test_a_row_without_upstream_cannot_spoil_the_gradient(self, device, function, kernels):
        # loss[mask].sum() of rows whose logits are infinite: what the mask drops must not become 0 * inf.
        hidden, weight, bias, labels = loss_case(4, 8, 50, 3, torch.float32, device, ignored=0)
        hidden[1] = 3e38
        loss, dh, dw = loss_and_gradients(
            function, hidden, weight, bias, labels, torch.tensor([1.0, 0, 1, 1], device=device), reduction="none"
        )
        assert not loss[1].isfinite()
        # The weight gradient is dlogits.T @ hidden: 0 * 3e38 is 0.
        assert not dh[1].any() and dh.isfinite().all() and dw.isfinite().all() and dw.any()


class TestLse:
    @pairwise(dtype=DTYPES, function=FUNCTIONS, softcap=[None, 2.0], kernels=KERNELS, fixtures=["kernels"])
    def test_value(self, device, function, dtype, softcap, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, dtype, device, bias=True)
        loss, lse = function(
            hidden.view(2, 3, 8), weight, bias, labels.view(2, 3, 4), return_lse=True, logit_softcap=softcap
        )
        compute = compute_dtype(dtype, hidden.device) if function is fused else dtype
        z = F.linear(*(t.to(compute) for t in (hidden, weight, bias))).to(lse.dtype)  # as rounded as the op's own
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        assert lse.shape == (2, 3) and lse.dtype == loss.dtype == torch.promote_types(dtype, torch.float32)
        assert relative_error(lse.flatten(), z.double().logsumexp(-1)) < 8 * torch.finfo(lse.dtype).eps

    @functions
    def test_of_nothing_but_minus_infinity(self, device, function, kernels):
        hidden, weight, bias, labels = loss_case(2, 8, 50, 4, torch.float32, device, bias=True)
        labels.fill_(IGNORE)
        leaf = hidden.requires_grad_()
        loss, lse = function(leaf, weight, torch.full_like(bias, -torch.inf), labels, return_lse=True)
        assert (lse == -torch.inf).all() and loss == 0  # as torch.logsumexp has it, not NaN
        loss.backward()
        assert not leaf.grad.any()

    @pairwise(
        options=list(OPTIONS), function=FUNCTIONS, reduction=["mean", "sum", "none"], kernels=KERNELS,
        fixtures=["kernels"],
    )  # fmt: skip
    def test_its_gradient_adds_to_that_of_the_loss(self, device, function, reduction, options, kernels):
        options = for_reduction(OPTIONS[options], reduction)
        hidden, weight, bias, labels = loss_case(11, 8, 50, 4, torch.float64, device, bias=True)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        w = torch.randn(11, generator=generator(), dtype=torch.float64).to(device)
        v = upstream_of(11, dict(reduction=reduction)).to(device)

        def plain_lse():
            z, cap = F.linear(*leaves), options.get("logit_softcap")
            return (z if cap is None else cap * torch.tanh(z / cap)).logsumexp(-1)

        loss, lse = function(*leaves, labels, return_lse=True, chunk_size=4, **options)
        mine = torch.autograd.grad((v * loss).sum() + (w * lse).sum(), leaves)
        expected = (v * plain(*leaves, labels, **options)).sum() + (w * plain_lse()).sum()
        for a, b in zip(mine, torch.autograd.grad(expected, leaves), strict=True):
            assert relative_error(a, b) < 1e-13
        # lse alone, also of rows without labels
        _, lse = function(*leaves, labels, return_lse=True, chunk_size=4, **options)
        mine = torch.autograd.grad((w * lse).sum(), leaves)
        for a, b in zip(mine, torch.autograd.grad((w * plain_lse()).sum(), leaves), strict=True):
            assert relative_error(a, b) < 1e-13

    def test_an_own_z_loss_is_the_built_in(self, device):
        hidden, weight, bias, labels = loss_case(11, 8, 50, 4, torch.float64, device, ignored=0)
        builtin = loss_and_gradients(fused, hidden, weight, bias, labels, z_loss=0.1)

        def own(*arguments):
            loss, lse = fused(*arguments, return_lse=True)
            return loss + 0.1 * lse.square().mean()

        for a, b in zip(loss_and_gradients(own, hidden, weight, bias, labels), builtin, strict=True):
            assert relative_error(a, b) < 1e-13


class TestZLoss:
    @pairwise(
        function=FUNCTIONS, reduction=["mean", "sum", "none"], objective=["mce", "mce_alt"], kernels=KERNELS,
        fixtures=["kernels"],
    )  # fmt: skip
    def test_returned_apart(self, device, function, objective, reduction, kernels):
        case = loss_case(11, 8, 50, 4, torch.float64, device, bias=True)
        options = dict(objective=objective, reduction=reduction)
        loss, lse, z_loss = function(*case, z_loss=0.1, return_lse=True, return_z_loss=True, **options)
        assert torch.equal(z_loss, function(*case, z_loss=0.1, return_z_loss=True, **options)[1])
        assert z_loss.shape == loss.shape
        # float64 sums of terms of one sign
        assert relative_error(loss - z_loss, function(*case, **options)) < 1e-13
        if reduction == "sum" and objective == "mce_alt":
            rows = (case[3] != IGNORE).any(1)
            assert relative_error(z_loss, 0.1 * lse[rows].square().sum()) < 1e-13

    @functions
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_its_gradient(self, device, function, reduction, kernels):
        hidden, weight, bias, labels = loss_case(11, 8, 50, 4, torch.float64, device, bias=True)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        loss, z_loss = function(*leaves, labels, z_loss=0.1, return_z_loss=True, reduction=reduction)
        mine = torch.autograd.grad((loss - z_loss).sum(), leaves)
        expected = torch.autograd.grad(function(*leaves, labels, reduction=reduction).sum(), leaves)
        for a, b in zip(mine, expected, strict=True):
            assert relative_error(a, b) < 1e-12

    def test_without_labels_it_is_zero(self, device, kernels):
        case = loss_case(5, 8, 50, 4, torch.float32, device, ignored=1)
        loss, z_loss = fused(*case, z_loss=0.1, return_z_loss=True)
        assert loss == 0 and z_loss == 0


class TestPositionWeights:
    @pytest.mark.parametrize("name", ["uniform", "power_law", "exponential", "first", "fitted"])
    @functions
    def test_a_name_is_its_tensor(self, device, name, function):
        case = loss_case(11, 8, 50, 4, torch.float32, device)
        by_name = loss_and_gradients(function, *case, position_weights=name)
        by_tensor = loss_and_gradients(function, *case, position_weights=position_weights(name, 4, device=device))
        assert all(torch.equal(a, b) for a, b in zip(by_name, by_tensor, strict=True))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
    def test_any_dtype(self, device, dtype):
        case = loss_case(11, 8, 50, 4, torch.float32, device)
        weights = torch.tensor([1, 2, 0, 4])
        assert torch.equal(
            fused(*case, position_weights=weights.to(dtype)), fused(*case, position_weights=weights * 1.0)
        )

    @pytest.mark.parametrize("factor", [3.0, 1e-60, 1e38])
    def test_only_ratios_matter(self, device, factor):
        case = loss_case(11, 8, 50, 4, torch.float32, device)
        weights = torch.tensor([1, 0.5, 0, 0.25], dtype=torch.float64)
        expected = loss_and_gradients(fused, *case, position_weights=weights)
        for a, b in zip(loss_and_gradients(fused, *case, position_weights=weights * factor), expected, strict=True):
            assert relative_error(a, b) < 8 * EPS

    @functions
    def test_all_zero(self, device, function, kernels):
        case = loss_case(6, 8, 50, 4, torch.float32, device, bias=True)
        for reduction in ("mean", "sum", "none"):
            results = loss_and_gradients(function, *case, position_weights=torch.zeros(4), reduction=reduction)
            assert not any(result.any() for result in results)

    def test_a_position_of_weight_zero_is_ignored(self, device, kernels):
        hidden, weight, bias, labels = loss_case(6, 8, 50, 4, torch.float64, device)
        w = torch.tensor([1.0, 0, 2, 0])
        expected = loss_and_gradients(fused, hidden, weight, bias, labels[:, ::2], position_weights=w[::2])
        for a, b in zip(
            loss_and_gradients(fused, hidden, weight, bias, labels, position_weights=w), expected, strict=True
        ):
            assert relative_error(a, b) < 1e-13

    def test_first_is_the_next_token_loss(self, device):
        hidden, weight, bias, labels = loss_case(13, 8, 50, 4, torch.float64, device)
        expected = F.cross_entropy(hidden @ weight.T, labels[:, 0])
        assert relative_error(fused(hidden, weight, bias, labels, position_weights="first"), expected) < 1e-14


class TestLabelWeights:
    @functions
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_of_one_label_are_class_weights(self, device, function, reduction, kernels):
        hidden, weight, bias, labels = loss_case(13, 8, 50, 1, torch.float64, device, ignored=0.3)
        labels = labels.squeeze(1)
        classes = torch.rand(50, generator=generator(), dtype=torch.float64).to(device)
        u, upstream = classes[labels.clamp_min(0)], upstream_of(13, dict(reduction=reduction)).to(device)
        mine = loss_and_gradients(
            function, hidden, weight, bias, labels, upstream, label_weights=u, reduction=reduction
        )
        expected = loss_and_gradients(
            lambda h, w, b, y: F.cross_entropy(h @ w.T, y, classes, reduction=reduction),
            hidden, weight, bias, labels, upstream,
        )  # fmt: skip
        for a, b in zip(mine, expected, strict=True):
            assert relative_error(a, b) < 1e-13

    @functions
    def test_of_a_set_are_probabilities(self, device, function, kernels):
        hidden, weight, bias, _ = loss_case(7, 8, 50, 1, torch.float64, device)
        labels = torch.stack([torch.randperm(50, generator=generator(i))[:4] for i in range(7)]).to(device)
        u = torch.rand(7, 4, generator=generator(), dtype=torch.float64).softmax(1).to(device)
        target = torch.zeros(7, 50, dtype=torch.float64, device=device).scatter(1, labels, u)
        mine = loss_and_gradients(function, hidden, weight, bias, labels, label_weights=u, normalizer=7)
        expected = loss_and_gradients(lambda h, w, b, y: F.cross_entropy(h @ w.T, target), hidden, weight, bias, labels)
        for a, b in zip(mine, expected, strict=True):
            assert relative_error(a, b) < 1e-13

    @pairwise(reduction=["mean", "sum", "none"], position_weights=[None, "power_law"], return_lse=[True, False])
    def test_of_one_change_nothing(self, device, reduction, position_weights, return_lse):
        case = loss_case(13, 8, 50, 4, torch.float32, device)
        options = dict(reduction=reduction, position_weights=position_weights, return_lse=return_lse)
        with_ones = fused(*case, label_weights=torch.ones(13, 4, device=device), **options)
        torch.testing.assert_close(with_ones, fused(*case, **options), rtol=0, atol=0)

    @functions
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_label_of_weight_zero_is_ignored(self, device, function, reduction, kernels):
        hidden, weight, bias, labels = loss_case(13, 8, 50, 4, torch.float64, device)
        mask = torch.rand(13, 4, generator=generator()).to(device) < 0.5
        mask[:3], mask[:, 1] = False, False  # rows and a position without a label
        options = dict(reduction=reduction, z_loss=0.1)
        hidden[0] = 1e200  # whose infinite logits reach no gradient
        expected = loss_and_gradients(function, hidden, weight, bias, labels.masked_fill(~mask, IGNORE), 1.7, **options)
        for u in (mask, mask.int(), mask.bfloat16(), mask.double()):
            mine = loss_and_gradients(function, hidden, weight, bias, labels, 1.7, label_weights=u, **options)
            for a, b in zip(mine, expected, strict=True):
                assert relative_error(a, b) < 1e-14

    @pytest.mark.parametrize(("factor", "dtype"), [(3.0, torch.float32), (1e-60, torch.float64), (2e38, torch.float32)])
    def test_only_their_ratios_matter_to_the_mean(self, device, factor, dtype):
        case = loss_case(11, 8, 50, 4, torch.float32, device)
        u = some_weights(case[3]).to(dtype)
        expected = loss_and_gradients(fused, *case, label_weights=u)
        for a, b in zip(loss_and_gradients(fused, *case, label_weights=u * factor), expected, strict=True):
            assert relative_error(a, b) < 8 * EPS

    @functions
    def test_of_other_scales_at_each_position(self, device, function, kernels):
        case = loss_case(11, 8, 50, 4, torch.float32, device, ignored=0)
        scales = torch.tensor([1e-30, 1, 1e30, 0], device=device)
        expected = loss_and_gradients(
            function, *case, label_weights=some_weights(case[3]) * (scales > 0), position_weights=torch.ones(4)
        )
        for a, b in zip(
            loss_and_gradients(function, *case, label_weights=some_weights(case[3]) * scales), expected, strict=True
        ):
            assert relative_error(a, b) < 8 * EPS

    @functions
    def test_one_normalizer_makes_parts_add_up(self, device, function, kernels):
        hidden, weight, bias, labels = loss_case(23, 8, 50, 4, torch.float64, device, bias=True)
        u = some_weights(labels)
        total = (u * (labels != IGNORE)).sum()
        whole = loss_and_gradients(function, hidden, weight, bias, labels, label_weights=u, normalizer=total)
        parts = [
            loss_and_gradients(function, hidden[p], weight, bias, labels[p], label_weights=u[p], normalizer=total)
            for p in (slice(0, 1), slice(1, 8), slice(8, 23))
        ]
        loss, dh, dw, db = zip(*parts, strict=True)
        for a, b in zip((sum(loss), torch.cat(dh), sum(dw), sum(db)), whole, strict=True):
            assert relative_error(a, b) < 1e-13
        nll = -F.linear(hidden, weight, bias).log_softmax(-1).gather(1, labels.clamp_min(0))
        assert relative_error(whole[0], (u * nll)[labels != IGNORE].sum() / total) < 1e-13

    @functions
    @pytest.mark.parametrize("rows", [0, 6])
    def test_all_zero(self, device, function, rows, kernels):
        case = loss_case(rows, 8, 50, 4, torch.float32, device, bias=True)
        for reduction in ("mean", "sum", "none"):
            options = dict(label_weights=torch.zeros(rows, 4, device=device), reduction=reduction, z_loss=0.1)
            assert not any(r.any() for r in loss_and_gradients(function, *case, **options))

    def test_strides_and_leading_dimensions(self, device):
        hidden, weight, bias, labels = loss_case(12, 8, 50, 4, torch.float32, device)
        u = some_weights(labels)
        expected = fused(hidden, weight, bias, labels, label_weights=u)
        shaped = hidden.view(2, 6, 8), weight, bias, labels.view(2, 6, 4)
        strided = u.T.contiguous().T.view(2, 6, 4)
        assert not strided.is_contiguous()
        assert torch.equal(fused(*shaped, label_weights=strided), expected)


class TestObjectiveAlt:
    @pairwise(dtype=DTYPES, function=FUNCTIONS, kernels=KERNELS, fixtures=["kernels"])
    def test_never_negative(self, device, function, dtype, kernels):
        # The labels are the whole vocabulary, or all of the probability: -log of 1, which rounding must not make less.
        for vocabulary in (1, 2, 3, 7, 16):
            hidden, weight, bias, _ = loss_case(64, 8, vocabulary, 1, dtype, device)
            labels = torch.arange(vocabulary, device=device).expand(64, vocabulary)
            rows = function(hidden, weight, bias, labels, objective="mce_alt", reduction="none")
            assert (rows >= 0).all() and (rows < 4 * torch.finfo(rows.dtype).eps).all()
        confident = torch.zeros(3, 20, dtype=torch.float32, device=device)
        confident[:, 4], confident[:, 9] = 60, 59
        rows = multi_hot_cross_entropy(
            confident, torch.tensor([[4, 9]] * 3, device=device), objective="mce_alt", reduction="none"
        )
        assert (rows >= 0).all() and (rows < EPS).all()

    @functions
    def test_a_bag_is_a_set(self, device, function, kernels):
        hidden, weight, bias, labels = loss_case(9, 8, 50, 3, torch.float64, device, ignored=0)
        expected = loss_and_gradients(function, hidden, weight, bias, labels, objective="mce_alt")
        for again in (labels.flip(1), labels[:, [0, 1, 2, 1, 0, 1]], F.pad(labels, (1, 2), value=IGNORE)):
            results = loss_and_gradients(function, hidden, weight, bias, again, objective="mce_alt")
            for a, b in zip(results, expected, strict=True):
                assert relative_error(a, b) < 1e-13

    def test_one_label_is_cross_entropy(self, device):
        hidden, weight, bias, labels = loss_case(9, 8, 50, 1, torch.float64, device)
        for a, b in zip(
            loss_and_gradients(fused, hidden, weight, bias, labels, objective="mce_alt", z_loss=0.1),
            loss_and_gradients(fused, hidden, weight, bias, labels, objective="mce", z_loss=0.1),
            strict=True,
        ):
            assert relative_error(a, b) < 1e-13

    def test_no_more_than_mce_less_the_entropy_of_the_bag(self, device):
        # Of all ways to share a probability among s distinct labels the equal one has the least mce, log s above this.
        hidden, weight, bias, _ = loss_case(9, 8, 50, 1, torch.float64, device)
        labels = torch.stack([torch.randperm(50, generator=generator(i))[:4] for i in range(9)]).to(device)
        alt = fused(hidden, weight, bias, labels, objective="mce_alt", reduction="none")
        mce = fused(hidden, weight, bias, labels, reduction="none")
        assert (alt <= mce - math.log(4) + 1e-12).all()


class TestBias:
    @pairwise(
        options=[{}, dict(z_loss=0.1), dict(label_smoothing=0.2), dict(objective="mce_alt"), dict(reduction="none")],
        dtype=DTYPES,
        function=FUNCTIONS,
        kernels=KERNELS,
        fixtures=["kernels"],
    )
    def test_minus_infinity_leaves_the_entry_out(self, device, dtype, function, options, kernels):
        hidden, weight, bias, labels = loss_case(11, 8, 50, 4, dtype, device, bias=True)
        kept = torch.arange(50, device=device) % 3 != 1
        kept[labels[labels != IGNORE]] = True
        assert not kept.all()
        masked = bias.masked_fill(~kept, -torch.inf)
        renumbered = torch.where(labels == IGNORE, IGNORE, (kept.cumsum(0) - 1)[labels.clamp_min(0)])
        loss, dh, dw, db = loss_and_gradients(function, hidden, weight, masked, labels, **options)
        expected = loss_and_gradients(function, hidden, weight[kept], bias[kept], renumbered, **options)
        assert all(t.isfinite().all() for t in (loss, dh, dw, db))
        assert not dw[~kept].any() and not db[~kept].any()
        # Other GEMM shapes, other orders: one rounding of the result apart, and of the logits in 16 bits.
        allowed = 4 * torch.finfo(dtype).eps
        for a, b in zip((loss, dh, dw[kept], db[kept]), expected, strict=True):
            assert relative_error(a, b) < allowed

    @functions
    def test_a_row_of_nothing_but_minus_infinity_is_nan_as_in_torch(self, device, function):
        logits = torch.full((2, 5), -torch.inf, device=device)
        labels = torch.zeros(2, dtype=torch.long, device=device)
        assert multi_hot_cross_entropy(logits, labels).isnan() and F.cross_entropy(logits, labels).isnan()

    @pairwise(rows=[1, 127, 128, 129, 1000], dtype=DTYPES)
    def test_gradient_over_many_rows(self, device, rows, dtype):
        check_loss(*loss_case(rows, 4, 70, 2, dtype, device, bias=True), chunk_size=300)

    def test_gradient_does_not_drift_with_the_rows(self, device):
        # 20,000 equal terms. Each softmax errs by 1 eps at most; a plain sum of blocks of 16 terms errs by 67.
        rows = 20_000
        hidden, weight, bias = (torch.zeros(size, device=device) for size in ((rows, 1), (3, 1), (3,)))
        labels = torch.zeros(rows, dtype=torch.long, device=device)
        db = loss_and_gradients(fused, hidden, weight, bias, labels, reduction="sum", chunk_size=rows)[3]
        exact = torch.tensor([-2.0, 1.0, 1.0], dtype=torch.float64) * rows / 3
        assert relative_error(db, exact) < 2 * EPS


class TestSoftcap:
    @functions
    @pytest.mark.parametrize("size", [1e4, 1e30])
    def test_huge_logits(self, device, function, size, kernels):
        # tanh is +-1 there: the loss is that of +-cap, the gradient 0 or below what float32 holds.
        sign = torch.tensor([[1.0, -1, 1, -1, -1], [-1, -1, 1, 1, 1]], device=device)
        hidden, weight = sign * size, torch.eye(5, device=device)
        labels = torch.tensor([[0, 1], [2, 2]], device=device)
        loss, dh, _ = loss_and_gradients(function, hidden, weight, None, labels, logit_softcap=30.0)
        assert relative_error(loss, plain(sign.double() * 30, weight.double(), None, labels)) < 4 * EPS
        assert dh.isfinite().all() and dh.abs().max() < 1e-6

    @functions
    def test_logits_whose_square_overflows(self, device, function, kernels):
        hidden, weight = torch.tensor([[1e20, 0, 0]], device=device), torch.eye(3, device=device)
        labels = torch.tensor([[0, 0]], device=device)
        assert function(hidden, weight, None, labels) == 0

    @functions
    def test_a_wide_cap_changes_little(self, device, function):
        case = loss_case(6, 8, 50, 4, torch.float64, device)
        for a, b in zip(
            loss_and_gradients(function, *case, logit_softcap=1e9), loss_and_gradients(function, *case), strict=True
        ):
            assert relative_error(a, b) < 1e-12


class TestNormalizer:
    """One normalizer for all parts of a batch: losses and gradients of the parts add up to those of the whole."""

    def recipes(self, labels):
        valid = labels != IGNORE
        counts = valid.sum(0)
        some, power_law = counts > 0, position_weights("power_law", 4).to(counts.device)
        return {
            "per token": dict(normalizer=valid.sum()),
            "per row": dict(normalizer=valid.any(1).sum() * labels.shape[1]),
            "per position": dict(position_weights=torch.where(some, 1 / counts, 0), normalizer=some.sum()),
            "power law per position": dict(
                position_weights=torch.where(some, power_law / counts, 0),
                normalizer=torch.where(some, power_law, 0).sum(),
            ),
            "mce_alt": dict(objective="mce_alt", normalizer=valid.any(1).sum()),
        }

    @functions
    @pytest.mark.parametrize("name", ["per token", "per row", "per position", "power law per position", "mce_alt"])
    def test_parts_add_up(self, device, function, name, kernels):
        hidden, weight, bias, labels = loss_case(23, 8, 50, 4, torch.float64, device, ignored=0.4, bias=True)
        labels[8:11] = IGNORE  # one part has no label at all
        options = dict(self.recipes(labels)[name], z_loss=0.1, label_smoothing=0.1)
        whole = loss_and_gradients(function, hidden, weight, bias, labels, **options)
        parts = [
            loss_and_gradients(function, hidden[part], weight, bias, labels[part], **options)
            for part in (slice(0, 1), slice(1, 8), slice(8, 11), slice(11, 23))
        ]
        loss, dh, dw, db = zip(*parts, strict=True)
        assert loss[2] == 0 and not dw[2].any()
        for a, b in zip((sum(loss), torch.cat(dh), sum(dw), sum(db)), whole, strict=True):
            assert relative_error(a, b) < 1e-13

    @pytest.mark.parametrize("ignored", [0, 0.4])
    def test_what_the_recipes_are(self, device, ignored):
        hidden, weight, bias, labels = loss_case(23, 8, 50, 4, torch.float64, device, ignored=ignored)
        recipes, case = self.recipes(labels), (hidden, weight, bias, labels)
        nll = -F.linear(hidden, weight, bias).log_softmax(-1).gather(1, labels.clamp_min(0))
        valid = labels != IGNORE
        assert relative_error(fused(*case, **recipes["per token"]), nll[valid].mean()) < 1e-13
        assert relative_error(fused(*case, **recipes["per row"]), (nll * valid).sum() / valid.any(1).sum() / 4) < 1e-13
        # The weights are float32 numbers where counts divide.
        assert relative_error(fused(*case, **recipes["per position"]), fused(*case)) < 2 * EPS
        named = fused(*case, position_weights="power_law")
        assert relative_error(fused(*case, **recipes["power law per position"]), named) < 2 * EPS
        alt = fused(*case, objective="mce_alt")
        assert relative_error(fused(*case, **recipes["mce_alt"]), alt) < 1e-13

    @functions
    def test_a_number_is_its_tensor(self, device, function, kernels):
        case = loss_case(6, 8, 50, 4, torch.float32, device)
        expected = loss_and_gradients(function, *case, normalizer=13)
        for normalizer in (13.0, torch.tensor(13), torch.tensor(13.0, dtype=torch.float64, device=device)):
            results = loss_and_gradients(function, *case, normalizer=normalizer)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    @functions
    def test_zero_of_a_batch_without_labels(self, device, function, kernels):
        # A count that came out 0 must not turn the sum over ranks into NaN.
        case = loss_case(6, 8, 50, 4, torch.float32, device, ignored=1)
        for normalizer in (0, torch.tensor(0)):
            assert not any(r.any() for r in loss_and_gradients(function, *case, normalizer=normalizer))

    def test_mean_without_ignored_labels_is_sum_over_rows(self, device):
        case = loss_case(13, 8, 50, 4, torch.float64, device, ignored=0)
        for options in ({}, dict(position_weights="power_law"), dict(objective="mce_alt"), dict(z_loss=0.1)):
            assert relative_error(fused(*case, **options), fused(*case, **options, reduction="sum") / 13) < 1e-14
