"""The operations where torch traces, fakes, counts or transforms them: gradients are those of an eager call."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from helpers.cases import IGNORE
from helpers.model import BAG, DIM, VOCABULARY, assert_equal, leaves, normal, tokens
from helpers.processes import needs_gloo
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy

pytestmark = pytest.mark.usefixtures("default_device")
ROWS = 5


class Case:
    """A function of the library of tensors alone, and its arguments: first those that have gradients."""

    def __init__(self, name, dtype=torch.float32, bag_size=BAG, bias=False, normalizer=False, **options):
        self.name, self.dtype, self.bag_size, self.bias = name, dtype, bag_size, bias
        self.normalizer, self.options = normalizer, options

    def arguments(self, seed=0):
        """How many leaves there are; then leaves, labels, a factor of the loss, position weights and a normalizer."""
        shapes = {"embedding": [(VOCABULARY, DIM)], "logits": [(ROWS, VOCABULARY)]}.get(
            self.name, [(ROWS, DIM), (VOCABULARY, DIM), *[(VOCABULARY,)] * self.bias]
        )
        inputs = [normal(*s, dtype=self.dtype, seed=seed + i) for i, s in enumerate(shapes)]
        labels = tokens(ROWS, self.bag_size, seed=seed, ignored=0.2)
        weights, normalizer = normal(self.bag_size, seed=seed + 8).abs(), torch.tensor(3.0 + seed)
        return len(inputs), (*inputs, labels, normal(seed=seed + 7), weights, normalizer)

    def output(self, *arguments):
        *inputs, labels, _, weights, normalizer = arguments
        options = {**self.options, "position_weights": weights}
        if self.name == "embedding":
            return bag_embedding(labels, *inputs, padding_idx=IGNORE, **options)
        if self.normalizer:
            options["normalizer"] = normalizer
        if self.name == "logits":
            return multi_hot_cross_entropy(*inputs, labels, **options)
        hidden, weight, *bias = inputs
        return linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias[0] if bias else None, **options)

    def loss(self, *arguments):
        outputs = self.output(*arguments)
        factor = arguments[-3]
        return sum((factor * o).sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def gradients(self, count, arguments, loss=None):
        """The loss and the gradients of the first `count` arguments."""
        arguments = [t.detach().clone().requires_grad_(i < count) for i, t in enumerate(arguments)]
        value = (loss or self.loss)(*arguments)
        return value.detach(), *torch.autograd.grad(value, arguments[:count])


CASES = {
    "embedding": Case("embedding"),
    "mean": Case("linear"),
    "mean-bias-bfloat16": Case("linear", torch.bfloat16, bias=True, normalizer=True),
    "sum-bias-s1": Case("linear", bag_size=1, bias=True, reduction="sum"),
    "none-bias-bfloat16": Case("linear", torch.bfloat16, bias=True, reduction="none"),
    "lse": Case("linear", return_lse=True, z_loss=1e-2),
    "logits-s1": Case("logits", bag_size=1, normalizer=True),
    "logits-none-bfloat16": Case("logits", torch.bfloat16, reduction="none", return_lse=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class TestModes:
    @cases
    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx_records_every_number(self, case, mode):
        count, arguments = case.arguments()
        graph = make_fx(lambda *a: case.gradients(count, a), tracing_mode=mode)(*arguments)
        for seed in (0, 10):  # the graph must not hold a number of the call that was traced
            count, arguments = case.arguments(seed)
            assert_equal(graph(*arguments), case.gradients(count, arguments))

    @cases
    def test_make_fx_of_a_backward_pass_runs_again(self, case):
        count, arguments = case.arguments()
        inputs = leaves(*arguments[:count])
        loss = case.loss(*inputs, *arguments[count:])
        graph = make_fx(lambda upstream: torch.autograd.grad(loss, inputs, upstream))(torch.tensor(1.0))
        for factor in (2.0, 2.0, -0.5):  # a gradient that was overwritten would grow from call to call
            upstream = torch.tensor(factor)
            expected = torch.autograd.grad(case.loss(*inputs, *arguments[count:]), inputs, upstream)
            assert_equal(graph(upstream), expected)

    @cases
    @pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # these run as they are
    def test_aot_function(self, case):
        for seed in (0, 10):
            count, arguments = case.arguments(seed)
            if seed == 0:
                traced = aot_function(case.loss, fw_compiler=lambda g, _: g, bw_compiler=lambda g, _: g)
            assert_equal(case.gradients(count, arguments, traced), case.gradients(count, arguments))

    @cases
    @pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
    def test_fake_tensors(self, case):
        count, arguments = case.arguments()
        with FakeTensorMode() as mode:
            fake = case.gradients(count, [mode.from_tensor(t) for t in arguments])
        for a, b in zip(fake, case.gradients(count, arguments), strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())

    @cases
    def test_grad_and_value(self, case):
        count, arguments = case.arguments()
        expected = case.gradients(count, arguments)
        gradients, loss = torch.func.grad_and_value(case.loss, argnums=tuple(range(count)))(*arguments)
        assert_equal((loss, *gradients), expected)

    @pytest.mark.parametrize("factor", [1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_peak_memory_of_fake_tensors_is_that_of_real_ones(self, dtype, factor):
        def peak():
            hidden, weight = (torch.zeros(n, 16, dtype=dtype, requires_grad=True) for n in (64, 512))
            labels = torch.zeros(64, BAG, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(hidden, weight, labels)
            with tracker:
                (factor * linear_multi_hot_cross_entropy(hidden, weight, labels)).backward()
            return tracker.get_tracker_snapshot("peak")[hidden.device]["Total"]

        with FakeTensorMode():
            fake = peak()
        assert fake == peak() > 512 * 16 * dtype.itemsize


class TestBatchesOfGradients:
    """Several upstream gradients in one call: autograd's is_grads_batched, and torch.func.jacrev."""

    def expected(self, case):
        count, arguments = case.arguments()
        inputs = leaves(*arguments[:count])
        outputs = case.output(*inputs, *arguments[count:])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [normal(3, *o.shape, dtype=o.dtype, seed=i) for i, o in enumerate(outputs)]
        upstream[0][(1, *[0] * outputs[0].dim())] = 0
        one_by_one = [
            torch.autograd.grad(outputs, inputs, list(u), retain_graph=True) for u in zip(*upstream, strict=True)
        ]
        return inputs, outputs, upstream, [torch.stack(g) for g in zip(*one_by_one, strict=True)]

    def assert_close(self, case, gradients, expected):
        for a, b in zip(gradients, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if case.name == "logits":  # two products are added up, in place of one pass; then one rounding
                unit = torch.finfo(a.dtype).eps
                assert (a - b).abs().max() <= 4 * unit * b.abs().max()
            else:
                assert torch.equal(a, b)

    @cases
    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's loop over the batch
    def test_is_grads_batched(self, case, kept):
        inputs, outputs, upstream, expected = self.expected(case)
        for _ in range(2 if kept else 1):
            batched = torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, retain_graph=kept)
            self.assert_close(case, batched, expected)

    @pytest.mark.parametrize("name", ["embedding", "mean", "none-bias-bfloat16", "logits-s1"])
    def test_create_graph_is_refused(self, name):
        inputs, outputs, upstream, _ = self.expected(CASES[name])
        with pytest.raises(RuntimeError, match="is_grads_batched=True does not go with create_graph=True"):
            torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, create_graph=True)

    @cases
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_jacrev(self, case):
        count, arguments = case.arguments()

        def function(*inputs):
            outputs = case.output(*inputs, *arguments[count:])
            return outputs if isinstance(outputs, tuple) else (outputs,)

        inputs = leaves(*arguments[:count])
        jacobians = torch.func.jacrev(function, argnums=tuple(range(count)))(*arguments[:count])
        for output, gradients in zip(function(*inputs), jacobians, strict=True):
            rows = [torch.autograd.grad(each, inputs, retain_graph=True) for each in output.flatten()]
            expected = [torch.stack(g).view(output.shape + g[0].shape) for g in zip(*rows, strict=True)]
            self.assert_close(case, gradients, expected)


class TestFlops:
    """As many as torch counts for F.linear and F.cross_entropy; reduction "none" computes the logits twice."""

    GEMM = 2 * ROWS * DIM * VOCABULARY

    def count(self, function, trained, **options):
        hidden, weight, bias = (
            normal(*s).requires_grad_(name in trained)
            for name, s in dict(h=(ROWS, DIM), w=(VOCABULARY, DIM), b=(VOCABULARY,)).items()
        )
        with FlopCounterMode(display=False) as counter:
            loss = function(hidden, weight, bias, tokens(ROWS, BAG), **options).sum()
            if trained:
                loss.backward()
        return counter.get_total_flops()

    def fused(self, hidden, weight, bias, labels, **options):
        return linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, **options)

    @pytest.mark.parametrize("trained", ["hwb", "hw", "h", "w", "b", ""])
    def test_the_head(self, trained, kernels):
        theirs = self.count(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y[:, 0]), trained)
        gemms = 1 + ("h" in trained) + ("w" in trained)
        assert theirs == gemms * self.GEMM
        assert self.count(self.fused, trained) == theirs
        assert self.count(self.fused, trained, reduction="sum", chunk_size=2) == theirs
        assert self.count(self.fused, trained, reduction="none") == theirs + bool(trained) * self.GEMM

    def test_without_data(self):
        with torch.device("meta"):
            hidden, weight = torch.empty(ROWS, DIM), torch.empty(VOCABULARY, DIM, requires_grad=True)
            labels = torch.empty(ROWS, BAG, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            linear_multi_hot_cross_entropy(hidden, weight, labels).backward()
        assert counter.get_total_flops() == 2 * self.GEMM

    @needs_gloo
    def test_a_divided_head_counts_its_own_gemms(self, tmp_path):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            for reduction, gemms in (("mean", 3), ("none", 4)):
                options = dict(tp_group=dist.group.WORLD, reduction=reduction, chunk_size=2)
                assert self.count(self.fused, "hwb", **options) == gemms * self.GEMM
        finally:
            dist.destroy_process_group()

    def test_embeddings_and_row_passes_count_nothing(self):
        (weight,), (logits,) = leaves(normal(VOCABULARY, DIM)), leaves(normal(ROWS, VOCABULARY))
        with FlopCounterMode(display=False) as counter:
            bag_embedding(tokens(ROWS, BAG), weight).sum().backward()
            multi_hot_cross_entropy(logits, tokens(ROWS, BAG)).backward()
        assert counter.get_total_flops() == 0
