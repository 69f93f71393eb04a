"""Arguments that the losses refuse: each error names the argument, what was expected and what came."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from helpers.cases import fused, loss_case, on_logits
from helpers.processes import needs_gloo
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy


class TestErrors:
    H, W, B, Y = loss_case(6, 8, 10, 4, torch.float32, "cpu", ignored=0, bias=True)

    @pytest.mark.parametrize("bad", [10, -1, -101, 2**40])
    def test_label_out_of_range(self, bad):
        labels = self.Y.clone().view(2, 3, 4)
        labels[1, 2, 3] = bad
        hidden = self.H.view(2, 3, 8)
        for function in (fused, on_logits):
            with pytest.raises(IndexError, match=rf"labels\[1, 2, 3\] = {bad} .* 0 <= id < 10"):
                function(hidden, self.W, None, labels)

    @pytest.mark.parametrize(
        ("hidden", "weight", "labels", "options", "error", "message"),
        [
            (H.long(), W, Y, {}, TypeError, "hidden.*int64"),
            (H, W, Y.float(), {}, TypeError, "labels.*float32"),
            (H, W.T, Y, {}, ValueError, r"weight.*\(8, 10\)"),
            (H, W[0], Y, {}, ValueError, r"weight.*\(8,\)"),
            (torch.tensor(1.0), W, Y, {}, ValueError, r"hidden.*\(\)"),
            (H, W, Y[:5], {}, ValueError, r"labels.*\(6, 's'\).*\(5, 4\)"),
            (H, W, Y[:, :0], {}, ValueError, r"labels.*\(6, 0\)"),
            (H, W, torch.tensor(3), {}, ValueError, r"labels.*\(\)"),
            (H.view(2, 3, 8), W, Y, {}, ValueError, r"labels.*\(2, 3, 's'\).*\(6, 4\)"),
            (H, None, Y, {}, TypeError, "weight.*NoneType"),
            (H, W.to_sparse(), Y, {}, ValueError, "weight.*sparse"),
            (H, W, Y[:, 0] + torch.tensor([0, 0, 0, 77, 0, 0]), {}, IndexError, r"labels\[3\] = [78]"),
            (H, W, Y.to("meta"), {}, ValueError, "cpu.*meta"),
            (H, W, Y, {"bias": W}, ValueError, r"bias.*\(10,\).*\(10, 8\)"),
            (H, W, Y, {"bias": B[:9]}, ValueError, r"bias.*\(10,\).*\(9,\)"),
            (H, W, Y, {"bias": 1.0}, TypeError, "bias.*float"),
            (H, W, Y, {"bias": B.to("meta")}, ValueError, "bias on meta"),
            (H, W, Y, {"chunk_size": 0}, ValueError, "chunk_size.*0"),
            (H, W, Y, {"chunk_size": 2.5}, ValueError, "chunk_size.*2.5"),
        ],
    )  # fmt: skip
    def test_arguments(self, hidden, weight, labels, options, error, message):
        with pytest.raises(error, match=message):
            linear_multi_hot_cross_entropy(hidden, weight, labels, **options)

    @pytest.mark.parametrize(
        ("logits", "labels", "options", "error", "message"),
        [
            (H.long(), Y, {}, TypeError, "logits.*int64"),
            (torch.tensor(1.0), Y, {}, ValueError, r"logits.*0-d"),
            (H, Y[:5], {}, ValueError, r"labels.*\(6, 's'\).*\(5, 4\)"),
            (H, Y.to("meta"), {}, ValueError, "cpu.*meta"),
            (H[:, ::2], Y, {"inplace": True}, ValueError, "inplace.*contiguous"),
            (H.clone().requires_grad_(), Y, {"inplace": True}, ValueError, "inplace.*is_leaf=True"),
        ],
    )  # fmt: skip
    def test_arguments_on_logits(self, logits, labels, options, error, message):
        with pytest.raises(error, match=message):
            multi_hot_cross_entropy(logits, labels, **options)

    @pytest.mark.parametrize("function", [fused, on_logits])
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (dict(objective="bce"), ValueError, "objective.*'bce'"),
            (dict(reduction="max"), ValueError, "reduction.*'max'"),
            (dict(objective="mce_alt", position_weights="power_law"), ValueError, "position_weights.*mce_alt"),
            (dict(objective="mce_alt", label_weights=torch.ones(6, 4)), ValueError, "^label_weights.*mce_alt"),
            (dict(label_weights="power_law"), TypeError, "^label_weights.*str"),
            (dict(label_weights=torch.ones(6, 4).cfloat()), TypeError, "^label_weights.*complex64"),
            (dict(label_weights=torch.ones(4)), ValueError, r"^label_weights.*\(6, 4\).*\(4,\)"),
            (dict(label_weights=torch.ones(6, 4, requires_grad=True)), ValueError, "^label_weights.*requires_grad"),
            (dict(label_weights=torch.tensor([[1.0, -2, 1, 1]] * 6)), ValueError, "^label_weights.*-2.0 to 1.0"),
            (dict(label_weights=torch.tensor([[1, torch.nan, 1, 1]] * 6)), ValueError, "^label_weights.*a NaN"),
            (dict(label_weights=torch.full((6, 4), 1e39, dtype=torch.float64)), ValueError, r"^label_weights.*1e\+39"),
            (dict(label_weights=torch.ones(6, 4, device="meta")), ValueError, "label_weights on meta"),
            (dict(position_weights=[1, 1, 1, 1]), TypeError, "position_weights.*list"),
            (dict(position_weights="cubic"), ValueError, "'cubic'"),
            (dict(position_weights=torch.ones(3)), ValueError, r"position_weights.*\(4,\).*\(3,\)"),
            (dict(position_weights=torch.ones(4, requires_grad=True)), ValueError, "position_weights.*requires_grad"),
            (dict(position_weights=torch.tensor([1, 1, -1.0, 1])), ValueError, r"position_weights\[2\].*-1"),
            (dict(position_weights=torch.tensor([1, torch.nan, 1, 1])), ValueError, r"position_weights\[1\].*nan"),
            (dict(position_weights=torch.tensor([1, 1, 1, 1e39], dtype=torch.float64)), ValueError, r"\[3\].*1e\+39"),
            (dict(ignore_index=None), ValueError, "ignore_index.*None"),
            (dict(ignore_index=2**64), ValueError, f"ignore_index.*{2**64}"),
            (dict(position_weights=torch.ones(4, device="meta")), ValueError, "position_weights.*cpu.*meta"),
            (dict(normalizer=torch.ones((), device="meta")), ValueError, "^normalizer: .*cpu.*meta"),
            (dict(logit_softcap=0), ValueError, "logit_softcap.*> 0"),
            (dict(logit_softcap=1e39), ValueError, "logit_softcap.*1e\\+39"),
            (dict(logit_softcap=1e-50), ValueError, "logit_softcap.*1e-50"),
            (dict(z_loss=10**400), ValueError, "z_loss.*1000"),
            (dict(logit_softcap=-30.0), ValueError, "logit_softcap.*-30"),
            (dict(logit_softcap=math.inf), ValueError, "logit_softcap.*inf"),
            (dict(z_loss=-0.1), ValueError, "z_loss.*-0.1"),
            (dict(z_loss="1e-4"), ValueError, "z_loss.*'1e-4'"),
            (dict(z_loss=math.nan), ValueError, "z_loss.*nan"),
            (dict(label_smoothing=1.5), ValueError, "label_smoothing.*1.5"),
            (dict(label_smoothing=-0.1), ValueError, "label_smoothing.*-0.1"),
            (dict(normalizer=3, reduction="sum"), ValueError, "normalizer.*'sum'"),
            (dict(normalizer=3, reduction="none"), ValueError, "normalizer.*'none'"),
            (dict(normalizer=-3), ValueError, "normalizer.*-3"),
            (dict(normalizer=torch.tensor(-3)), ValueError, "normalizer.*-3"),
            (dict(normalizer=torch.tensor(math.nan)), ValueError, "normalizer.*nan"),
            (dict(normalizer=torch.ones(1)), ValueError, r"normalizer.*0-d.*\(1,\)"),
            (dict(normalizer=torch.tensor(1.0, requires_grad=True)), ValueError, "normalizer.*requires_grad=True"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_options(self, function, options, error, message):
        with pytest.raises(error, match=message):
            function(self.H, self.W, None, self.Y, **options)


def tensors_of_each_function():
    """A tensor for each argument, and a call with another tensor in its place."""
    h, w, b, y = loss_case(6, 8, 10, 4, torch.float32, "cpu", ignored=0, bias=True)
    weights, each, normalizer, z = torch.ones(4), torch.ones(6, 4), torch.tensor(7.0), h @ w.T
    return [
        ("hidden", h, lambda t: linear_multi_hot_cross_entropy(t, w, y)),
        ("weight", w, lambda t: linear_multi_hot_cross_entropy(h, t, y)),
        ("bias", b, lambda t: linear_multi_hot_cross_entropy(h, w, y, bias=t)),
        ("labels", y, lambda t: linear_multi_hot_cross_entropy(h, w, t)),
        ("position_weights", weights, lambda t: linear_multi_hot_cross_entropy(h, w, y, position_weights=t)),
        ("label_weights", each, lambda t: linear_multi_hot_cross_entropy(h, w, y, label_weights=t)),
        ("normalizer", normalizer, lambda t: linear_multi_hot_cross_entropy(h, w, y, normalizer=t)),
        ("logits", z, lambda t: multi_hot_cross_entropy(t, y)),
        ("labels", y, lambda t: multi_hot_cross_entropy(z, t)),
        ("position_weights", weights, lambda t: multi_hot_cross_entropy(z, y, position_weights=t)),
        ("label_weights", each, lambda t: multi_hot_cross_entropy(z, y, label_weights=t)),
        ("normalizer", normalizer, lambda t: multi_hot_cross_entropy(z, y, normalizer=t)),
        ("input_ids", y, lambda t: bag_embedding(t, w)),
        ("weight", w, lambda t: bag_embedding(y, t)),
        ("position_weights", weights, lambda t: bag_embedding(y, w, position_weights=t)),
    ]


each_tensor = pytest.mark.parametrize(("name", "tensor", "call"), tensors_of_each_function())
each_float = pytest.mark.parametrize(
    ("name", "tensor", "call"), [c for c in tensors_of_each_function() if c[1].is_floating_point()]
)


class TestTransforms:
    """Each argument in a form that no op takes: the error names it and says what to do."""

    @each_tensor
    def test_vmap(self, name, tensor, call):
        # Of these the op sees what it made of them.
        derived = name in ("normalizer", "position_weights", "label_weights") and call(tensor).dim() == 0
        named = "normalizer, position_weights or label_weights" if derived else name
        message = f"^{named}: expected a plain tensor, got a batch of torch.vmap.* Pass the whole batch"
        batch = torch.stack([tensor, tensor])
        with pytest.raises(RuntimeError, match=message):
            torch.vmap(call)(batch)
        if name in ("hidden", "weight", "bias", "logits"):  # zeros would pass for a gradient
            with pytest.raises(RuntimeError, match=message):
                torch.vmap(torch.func.grad(lambda t: call(t).sum()))(batch)
            with pytest.raises(RuntimeError, match=message):
                torch.func.grad(lambda t: torch.vmap(call)(t).sum())(batch)

    @each_float
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_forward_mode(self, name, tensor, call):
        message = f"^{name}: expected a tensor without a tangent.* Use backward"
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            call(forward_ad.make_dual(tensor, tensor))
        for transform in (torch.func.jacfwd(call), lambda t: torch.func.jvp(call, (t,), (t,))):
            with pytest.raises(RuntimeError, match=message):
                transform(tensor)

    @pytest.mark.parametrize("module", [BagEmbedding, LinearMultiHotCrossEntropy])
    def test_weights_of_a_module_that_are_differentiated(self, module):
        def build(weights):
            module(10, 8, position_weights=weights)
            return weights.sum()

        with pytest.raises(RuntimeError, match="^position_weights: expected a tensor without a tangent"):
            torch.func.jvp(build, (torch.ones(4),), (torch.ones(4),))
        with pytest.raises(ValueError, match="^position_weights: expected a constant.*requires_grad=True"):
            torch.func.grad(build)(torch.ones(4))

    @each_tensor
    @pytest.mark.filterwarnings("ignore:The PyTorch API of")
    def test_tensors_that_are_not_dense(self, name, tensor, call):
        others = {"masked": torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))}
        if tensor.dim():
            others |= {"nested": torch.nested.nested_tensor([tensor]), "torch.sparse_coo": tensor.to_sparse()}
        for kind, other in others.items():
            with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor, got .*{kind}"):
                call(other)

    @needs_gloo
    def test_dtensor(self, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            for name, tensor, call in tensors_of_each_function():
                advice = f"{name}.full_tensor.*, or {name}.to_local"
                with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got a DTensor .*{advice}"):
                    call(distribute_tensor(tensor, mesh, [Replicate()]))
        finally:
            dist.destroy_process_group()


class TestRawOps:
    """The checks in C++, for who calls torch.ops.tst_ext."""

    @pytest.mark.parametrize("short", [0, 1])
    def test_rows_are_not_written_beside_wrong_results(self, short):
        hidden, weight, _, labels = loss_case(6, 8, 10, 1, torch.float32, "cpu")
        logits = hidden @ weight.T
        before, results = logits.clone(), [torch.empty(6), torch.empty(6)]
        results[short] = torch.empty(5)
        with pytest.raises(RuntimeError, match=r"loss, lse: expected \[N\]"):
            torch.ops.tst_ext.multi_hot_cross_entropy_rows_(logits, labels, torch.ones(1), *results, gradient=True)
        assert torch.equal(logits, before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "mse"}, "objective: expected 'mce' or 'mce_alt', got 'mse'"),
            ({"logit_softcap": -1.0}, "logit_softcap: expected a finite number > 0"),
            ({"logit_softcap": float("inf")}, "logit_softcap"),
            ({"z_loss": -0.1}, "z_loss: expected a finite number >= 0"),
            ({"z_loss": float("nan")}, "z_loss"),
            ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        hidden, weight, _, labels = loss_case(6, 8, 10, 1, torch.float32, "cpu")
        logits, scale, rows = hidden @ weight.T, torch.ones(1), torch.empty(2, 6).unbind()
        with pytest.raises(ValueError, match=message):
            torch.ops.tst_ext.multi_hot_cross_entropy(logits, labels, scale, **options)
        with pytest.raises(ValueError, match=message):
            torch.ops.tst_ext.multi_hot_cross_entropy_rows_(logits, labels, scale, *rows, **options)
        with pytest.raises(ValueError, match=message):
            torch.ops.tst_ext.linear_multi_hot_cross_entropy(hidden, weight, labels, scale, **options)
