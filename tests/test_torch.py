"""The operations inside torch: func, checkpoint, autograd, autocast, determinism."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers.cases import IGNORE
from helpers.model import (
    BAG,
    DIM,
    VOCABULARY,
    Model,
    all_options,
    assert_equal,
    batch,
    leaves,
    loss_and_gradients,
    normal,
    step,
    tokens,
)
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy, reference

OPS = torch.ops.tst_ext
pytestmark = pytest.mark.usefixtures("default_device")


# ---- torch.func and torch.utils.checkpoint ---------------------------------------------------------------------------


@all_options
def test_functional_call(options):
    model, arguments = Model(**options), (*batch(), normal(4, 2, seed=5))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return step(lambda *a: torch.func.functional_call(model, parameters, a), *arguments)

    expected = loss_and_gradients(step, model, *arguments)
    assert_equal((loss(parameters),), expected[:1])
    gradients, value = torch.func.grad_and_value(loss)(parameters)
    assert_equal((value, *gradients.values()), expected)


@all_options
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(options, use_reentrant):
    model, arguments = Model(**options), (*batch(), normal(4, 2, seed=5))
    # The reentrant kind gives gradients only where an argument wants one.
    switch = torch.zeros((), requires_grad=True)
    expected = loss_and_gradients(step, model, *arguments)
    loss = checkpoint(lambda _: step(model, *arguments), switch, use_reentrant=use_reentrant)
    loss.backward()
    assert_equal((loss.detach(), *(p.grad for p in model.parameters())), expected)


# ---- autograd --------------------------------------------------------------------------------------------------------


def graph(name, dtype=torch.float32, **options):
    """A function of the library as `(output, leaves)`."""
    labels = tokens(8, BAG, seed=7, ignored=0.2)
    if name == "bag_embedding":
        (weight,) = leaves(normal(VOCABULARY, DIM, dtype=dtype))
        return bag_embedding(labels, weight, padding_idx=IGNORE, **options), (weight,)
    if name == "logits":
        (logits,) = leaves(normal(8, VOCABULARY, dtype=dtype))
        inplace = options.get("inplace", False)
        return multi_hot_cross_entropy(logits * 1 if inplace else logits, labels, **options), (logits,)
    hidden, weight, bias = leaves(*(normal(*s, dtype=dtype) for s in ((8, DIM), (VOCABULARY, DIM), (VOCABULARY,))))
    return linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, **options), (hidden, weight, bias)


functions = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bag_embedding", {}),
        ("linear", {}),
        ("linear", dict(reduction="none")),
        ("logits", {}),
        ("logits", dict(reduction="none")),
    ],
    ids=["bag_embedding", "linear", "linear-none", "logits", "logits-none"],
)


class TestKeptGraph:
    @functions
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_two_backwards_accumulate_twice(self, name, options, dtype):
        output, once = graph(name, dtype, **options)
        output.sum().backward()
        output, twice = graph(name, dtype, **options)
        output.sum().backward(retain_graph=True)
        output.sum().backward()
        assert all(t.grad.count_nonzero() for t in once)
        assert_equal([t.grad for t in twice], [2 * t.grad for t in once])

    @functions
    def test_gradients_do_not_share_memory(self, name, options):
        output, inputs = graph(name, **options)
        loss = output.sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        expected = [g.clone() for g in first]
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        for gradient in (*first, *second):
            gradient.zero_()
        third = torch.autograd.grad(loss, inputs)
        assert_equal(third, expected)
        for gradients in zip(first, second, third, strict=True):
            assert len({g.untyped_storage().data_ptr() for g in gradients}) == 3


class TestInplace:
    def case(self):
        (leaf,) = leaves(normal(8, VOCABULARY))
        return leaf, leaf * 1, tokens(8, BAG, ignored=0.2)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_the_gradient_is_the_memory_of_the_logits(self, reduction):
        leaf, logits, labels = self.case()
        (expected,) = torch.autograd.grad(multi_hot_cross_entropy(logits, labels, reduction=reduction).sum(), leaf)
        leaf, logits, labels = self.case()
        seen = []
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
        multi_hot_cross_entropy(logits, labels, reduction=reduction, inplace=True).sum().backward()
        assert seen == [logits.data_ptr()]
        assert_equal((leaf.grad, logits.detach()), (expected, expected))

    def test_out_of_place_the_logits_stay(self):
        leaf, logits, labels = self.case()
        seen = []
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
        multi_hot_cross_entropy(logits, labels).backward()
        assert seen[0] != logits.data_ptr() and torch.equal(logits, leaf)

    def test_second_backward_is_refused(self):
        _, logits, labels = self.case()
        loss = multi_hot_cross_entropy(logits, labels, inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_an_op_that_saved_the_logits_is_refused(self):
        (leaf,) = leaves(normal(8, VOCABULARY))
        logits = leaf.exp()  # exp's backward reads its output
        loss = multi_hot_cross_entropy(logits, tokens(8, BAG), inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_arguments(self):
        leaf, logits, labels = self.case()
        with pytest.raises(ValueError, match="inplace.*is_leaf=True"):
            multi_hot_cross_entropy(leaf, labels, inplace=True)
        with pytest.raises(ValueError, match="inplace.*strides"):
            multi_hot_cross_entropy(logits.t().contiguous().t(), labels, inplace=True)
        assert torch.equal(
            multi_hot_cross_entropy(leaf.detach(), labels, inplace=True), multi_hot_cross_entropy(logits, labels)
        )


class TestSecondDerivative:
    """Refused by every way to ask for it; zeros would pass for a gradient."""

    MESSAGE = "second derivative of this operation is not implemented"

    @functions
    @pytest.mark.parametrize("squared", [False, True])  # without and with a graph of the upstream gradient
    def test_gradient_penalty(self, name, options, squared):
        for i in range(len(graph(name, **options)[1])):
            output, inputs = graph(name, **options)
            loss = (output.square() if squared else output).sum()
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
            penalty = loss + gradients[i].square().sum()
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                torch.autograd.grad(penalty, inputs, retain_graph=True)
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                penalty.backward()

    @functions
    @pytest.mark.filterwarnings("ignore:Using backward")
    def test_first_derivative_with_create_graph(self, name, options):
        output, inputs = graph(name, **options)
        expected = torch.autograd.grad(output.sum(), inputs)
        output, inputs = graph(name, **options)
        gradients = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        assert all(g.requires_grad for g in gradients)
        assert_equal([g.detach() for g in gradients], expected)
        output, inputs = graph(name, **options)
        output.sum().backward(create_graph=True)
        assert_equal([t.grad.detach() for t in inputs], expected)

    def test_hessian(self):
        labels = tokens(4, BAG)
        for function in (
            lambda x: multi_hot_cross_entropy(x, labels),
            lambda x: linear_multi_hot_cross_entropy(x, torch.eye(VOCABULARY), labels),
        ):
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                torch.autograd.functional.hessian(function, normal(4, VOCABULARY))
            once = torch.func.grad(function)
            assert once(normal(4, VOCABULARY)).any()
            with pytest.raises(RuntimeError, match=self.MESSAGE):
                torch.func.grad(lambda x, once=once: once(x).square().sum())(normal(4, VOCABULARY))

    def test_hidden_states_are_not_kept(self):
        # The link to the inputs must not hold their memory until the backward pass.
        hidden, weight = leaves(normal(8, DIM), normal(VOCABULARY, DIM))
        states = hidden * 1
        seen = weakref.ref(states)
        loss = linear_multi_hot_cross_entropy(states, weight, tokens(8, BAG))
        del states
        assert seen() is None
        loss.backward()


class Recorder(TorchDispatchMode):
    """For each call of the linear op which gradients it was asked for, e.g. "hw"."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == OPS.linear_multi_hot_cross_entropy.default:
            flags = {"h": "grad_hidden", "w": "grad_weight", "b": "grad_bias"}
            self.calls.append("".join(k for k, flag in flags.items() if kwargs.get(flag, False)))
        return func(*args, **kwargs)


class TestFrozen:
    @pytest.mark.parametrize("trained", ["hwb", "hw", "hb", "wb", "h", "w", "b", ""])
    @pytest.mark.parametrize(
        ("options", "late"),
        [({}, False), (dict(reduction="none"), True), (dict(return_lse=True), True)],
        ids=["mean", "none", "lse"],
    )
    def test_no_gemm_for_what_is_frozen(self, trained, options, late):
        inputs = dict(h=normal(8, DIM), w=normal(VOCABULARY, DIM, seed=1), b=normal(VOCABULARY, seed=2))
        labels, upstream = tokens(8, BAG, ignored=0.2), normal(8, seed=3)

        def run(names):
            h, w, b = (t.clone().requires_grad_(name in names) for name, t in inputs.items())
            with Recorder() as recorder:
                results = linear_multi_hot_cross_entropy(h, w, labels, bias=b, **options)
                if names:
                    results = results if isinstance(results, tuple) else (results,)
                    sum((upstream * r).sum() if r.dim() else r for r in results).backward()
            return recorder.calls, {"h": h.grad, "w": w.grad, "b": b.grad}

        calls, gradients = run(trained)
        early = "" if options.get("reduction") == "none" else trained
        assert calls == ([early, trained] if late and trained else [early])
        _, everything = run("hwb")
        for name, gradient in gradients.items():
            if name in trained:
                assert_equal((gradient,), (everything[name],))
            else:
                assert gradient is None

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_no_gemm_without_a_graph(self, reduction, context):
        hidden, weight, bias = leaves(normal(8, DIM), normal(VOCABULARY, DIM), normal(VOCABULARY))
        labels = tokens(8, BAG, ignored=0.2)
        with Recorder() as recorder, context():
            loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
        assert recorder.calls == [""] and not loss.requires_grad
        expected = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
        assert_equal((loss.clone(),), (expected.detach(),))

    def test_frozen_embedding_has_no_backward(self):
        out = bag_embedding(tokens(4, BAG), normal(VOCABULARY, DIM))
        assert not out.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_weights(reduction):
    ids, labels, upstream = tokens(8, BAG), tokens(8, BAG, seed=1, ignored=0.2), normal(8, dtype=torch.float64, seed=2)
    table, weight = normal(VOCABULARY, DIM, dtype=torch.float64), normal(DIM, DIM, dtype=torch.float64, seed=1)
    (tied,) = leaves(table)
    rows = linear_multi_hot_cross_entropy(bag_embedding(ids, tied) @ weight, tied, labels, reduction=reduction)
    (gradient,) = torch.autograd.grad((rows * upstream).sum(), tied)
    # Two leaves, so that the sum of the two parts is the test's and not autograd's.
    embedding, head = leaves(table, table)
    logits = reference.bag_embedding(ids, embedding) @ weight @ head.T
    rows = reference.multi_hot_cross_entropy(logits, labels, reduction=reduction)
    parts = torch.autograd.grad((rows * upstream).sum(), (embedding, head))
    assert all(part.norm() > 0.01 * gradient.norm() for part in parts)
    assert (gradient - sum(parts)).norm() <= 1e-12 * sum(parts).norm()


# ---- autocast --------------------------------------------------------------------------------------------------------


class TestAutocast:
    @pytest.mark.parametrize("dtypes", ["b,f,f", "f,b,b", "b,f,b", "f,b,f", "f,f,f", "b,b,b"])
    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
    def test_follows_linear(self, dtypes, low, kernels):
        hidden, weight, bias = leaves(
            *(
                normal(*shape, dtype=dict(b=low, f=torch.float32)[name], seed=i)
                for i, (name, shape) in enumerate(
                    zip(dtypes.split(","), ((8, DIM), (VOCABULARY, DIM), (VOCABULARY,)), strict=True)
                )
            )
        )
        labels = tokens(8, BAG, ignored=0.2)
        with torch.autocast(torch.get_default_device().type, low):
            assert F.linear(hidden, weight, bias).dtype == low
            loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias)
            loss.backward()
        assert loss.dtype == torch.float32
        cast = leaves(*(t.to(low) for t in (hidden, weight, bias)))
        expected = linear_multi_hot_cross_entropy(cast[0], cast[1], labels, bias=cast[2])
        expected.backward()
        assert torch.equal(loss, expected)
        assert_equal(
            [t.grad for t in (hidden, weight, bias)],
            [x.grad.to(t.dtype) for x, t in zip(cast, (hidden, weight, bias), strict=True)],
        )

    def test_float64_stays(self):
        hidden, weight = normal(8, DIM, dtype=torch.float64), normal(VOCABULARY, DIM, dtype=torch.float64)
        labels = tokens(8, BAG)
        expected = linear_multi_hot_cross_entropy(hidden, weight, labels)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            assert F.linear(hidden, weight).dtype == torch.float64
            assert torch.equal(linear_multi_hot_cross_entropy(hidden, weight, labels), expected)

    def test_model_keeps_float32_gradients(self):
        model, arguments = Model(bias=True), batch()
        exact = loss_and_gradients(Model.forward, model, *arguments)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            loss = model(*arguments)
        loss.backward()
        assert loss.dtype == torch.float32 and loss != exact[0]
        for parameter, gradient in zip(model.parameters(), exact[1:], strict=True):
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm()  # two or three bfloat16 roundings

    def test_outside_dtypes_must_agree(self):
        hidden, weight, labels = normal(8, DIM), normal(VOCABULARY, DIM), tokens(8, BAG)
        with pytest.raises(TypeError, match="^weight: .*float32.*bfloat16"):
            linear_multi_hot_cross_entropy(hidden, weight.bfloat16(), labels)
        with pytest.raises(TypeError, match="^weight: .*bfloat16.*float32"):
            linear_multi_hot_cross_entropy(hidden.bfloat16(), weight, labels)
        with pytest.raises(TypeError, match="^bias: .*float32.*bfloat16"):
            linear_multi_hot_cross_entropy(hidden, weight, labels, bias=normal(VOCABULARY, dtype=torch.bfloat16))


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def switch(on):
        torch.use_deterministic_algorithms(on)

    yield switch
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bag_embedding", dict(mode="sum")),
        ("bag_embedding", dict(position_weights="power_law")),
        ("linear", {}),
        ("linear", dict(chunk_size=3, z_loss=1e-2, logit_softcap=5.0, label_smoothing=0.1)),
        ("linear", dict(reduction="none", objective="mce_alt")),
        ("linear", dict(return_lse=True)),
        ("logits", {}),
        ("logits", dict(inplace=True, objective="mce_alt", z_loss=1e-2)),
        ("logits", dict(reduction="none", return_lse=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_algorithms(name, options, dtype, deterministic):
    def run():
        output, inputs = graph(name, dtype, **options)
        output = output if isinstance(output, tuple) else (output,)
        return *output, *torch.autograd.grad(sum((1.5 * o).sum() for o in output), inputs)

    expected = run()
    deterministic(True)
    # The mode also fills new memory with NaN, so what a kernel leaves unwritten shows.
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    for _ in range(2):
        results = run()
        assert all(t.isfinite().all() for t in results)
        assert_equal(results, expected)


def test_deterministic_algorithms_without_rows(deterministic):
    deterministic(True)
    labels = tokens(0, BAG)
    hidden, weight, bias = leaves(normal(0, DIM), normal(VOCABULARY, DIM), normal(VOCABULARY))
    for reduction in ("mean", "sum", "none"):
        loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction).sum()
        for gradient in (loss, *torch.autograd.grad(loss, (hidden, weight, bias))):
            assert gradient.count_nonzero() == 0  # NaN is not zero
    (gradient,) = torch.autograd.grad(bag_embedding(labels, weight).sum(), weight)
    assert gradient.count_nonzero() == 0
