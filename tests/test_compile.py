"""The operations under the dispatcher's checks, torch.compile and torch.export."""

import os
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.cases import IGNORE
from helpers.model import (
    BAG,
    DIM,
    OPTIONS,
    VOCABULARY,
    Model,
    assert_equal,
    batch,
    leaves,
    loss_and_gradients,
    normal,
    step,
    tokens,
)
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from tst_ext.nn import BagEmbedding

OPS = torch.ops.tst_ext
pytestmark = pytest.mark.usefixtures("default_device")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- registration ----------------------------------------------------------------------------------------------------


def opcheck(op, arguments, options):
    results = torch.library.opcheck(
        op, arguments, options, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    assert set(results.values()) == {"SUCCESS"}


class TestOpcheck:
    def test_every_op_is_checked_here(self):
        names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tst_ext::")}
        assert names == {
            "bag_embedding",
            "bag_embedding_backward",
            "linear_multi_hot_cross_entropy",
            "multi_hot_cross_entropy",
            "multi_hot_cross_entropy_rows_",
            "scaled_copy_",
        }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("padding_idx", [None, IGNORE])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_bag_embedding(self, dtype, padding_idx, weighted):
        ids = tokens(4, 2, BAG, ignored=0.3 if padding_idx else 0)
        options = dict(padding_idx=padding_idx, position_weights=torch.tensor([1.0, 0.5, 0.25]) if weighted else None)
        weight, grad = normal(VOCABULARY, DIM, dtype=dtype), normal(4, 2, DIM, dtype=dtype)
        opcheck(OPS.bag_embedding, (ids, weight, "mean"), options)
        opcheck(OPS.bag_embedding_backward, (grad, ids, VOCABULARY, "sum"), options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "options",
        [
            dict(),
            dict(reduction="none"),
            dict(grad_hidden=True),
            dict(grad_weight=True, chunk_size=4),
            dict(grad_hidden=True, grad_weight=True, grad_bias=True, logit_softcap=5.0, z_loss=0.1),
            dict(grad_hidden=True, grad_weight=True, grad_bias=True, objective="mce_alt", label_smoothing=0.1),
            dict(grad_hidden=True, grad_weight=True, grad_bias=True, reduction="none", grad_loss=(8,), grad_lse=(8,)),
            dict(grad_bias=True, grad_loss=(), grad_lse=(8,), chunk_size=3),
        ],
        ids=lambda options: "-".join(options) or "loss",
    )
    def test_linear_multi_hot_cross_entropy(self, options, dtype):
        options = {k: normal(*v, seed=3) if k in ("grad_loss", "grad_lse") else v for k, v in options.items()}
        if "grad_bias" in options:
            options["bias"] = normal(VOCABULARY, dtype=dtype, seed=2)
        arguments = (
            normal(4, 2, DIM, dtype=dtype),
            normal(VOCABULARY, DIM, dtype=dtype, seed=1),
            tokens(4, 2, BAG, ignored=0.2),
        )
        for scale in (torch.tensor([0.1, 0.2, 0.3]), normal(8, BAG, seed=4).abs()):
            opcheck(OPS.linear_multi_hot_cross_entropy, (*arguments, scale), options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("objective", ["mce", "mce_alt"])
    def test_multi_hot_cross_entropy(self, objective, dtype):
        logits, labels = normal(4, 2, VOCABULARY, dtype=dtype), tokens(4, 2, BAG, ignored=0.2)
        scale = torch.tensor([0.1, 0.2, 0.3])
        for reduction in ("sum", "none"):
            options = dict(objective=objective, reduction=reduction, z_loss=0.1, label_smoothing=0.1)
            opcheck(OPS.multi_hot_cross_entropy, (logits, labels, scale), options)
        for grad_loss, grad_lse in ((None, None), (normal(), None), (normal(8), normal(8, seed=1))):
            options = dict(objective=objective, logit_softcap=5.0, grad_loss=grad_loss, grad_lse=grad_lse)
            rows = logits.reshape(8, VOCABULARY).clone(), labels.reshape(8, BAG), scale, torch.empty(8), torch.empty(8)
            opcheck(OPS.multi_hot_cross_entropy_rows_, rows, {**options, "gradient": True})

    def test_scaled_copy(self):
        out = normal(5, 3, dtype=torch.bfloat16)
        for source in (normal(5, 3), normal(5, 3, dtype=torch.bfloat16), out):
            opcheck(OPS.scaled_copy_, (out, source, torch.tensor(0.5)), {})


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


class TestCompile:
    @pytest.mark.parametrize(
        ("options", "dynamic"),
        [
            ("everything", True),
            ("lse", False),
            ("none", False),
            ("mce_alt", True),
            ("lse_and_z_loss", True),
            ("none_lse", True),
            ("position_weights", True),
        ],
    )
    def test_equals_eager_bitwise(self, options, dynamic):
        model, arguments = Model(**OPTIONS[options]), (*batch(), normal(4, 2, seed=5))
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        expected = loss_and_gradients(step, model, *arguments)
        assert all(g.count_nonzero() for g in expected)
        assert_equal(loss_and_gradients(compiled, model, *arguments), expected)

    def test_other_label_weights_do_not_recompile(self):
        counter = CompileCounterWithBackend("aot_eager")
        model, (ids, labels) = Model(bias=True, position_weights="power_law"), batch()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for seed in range(3):
            u = normal(*labels.shape, seed=seed).abs()
            assert torch.equal(compiled(ids, labels, label_weights=u), model(ids, labels, label_weights=u))
        assert counter.frame_count == 1

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    def test_as_many_rows_as_the_data_says(self, reduction):
        hidden, weight, labels = normal(8, DIM), normal(VOCABULARY, DIM, seed=1), tokens(8, BAG)
        weights, mask = normal(8, BAG, seed=2).abs(), torch.arange(8) % 3 > 0

        def step(hidden, mask):
            i = mask.nonzero().squeeze(1)
            options = dict(label_weights=weights[i], reduction=reduction)
            return linear_multi_hot_cross_entropy(hidden[i], weight, labels[i], **options)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, mask), step(hidden, mask))

    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits_op(self, inplace):
        model, (ids, labels) = Model(bias=True), batch()

        def through_logits(model, ids, labels):
            logits = model(ids, None)
            return 1.5 * multi_hot_cross_entropy(logits, labels, z_loss=1e-2, inplace=inplace)

        compiled = torch.compile(through_logits, backend="aot_eager", fullgraph=True)
        expected = loss_and_gradients(through_logits, model, ids, labels)
        assert_equal(loss_and_gradients(compiled, model, ids, labels), expected)

    @pytest.mark.parametrize("producer", [torch.tanh, torch.sigmoid, torch.exp, lambda z: z.softmax(-1)])
    def test_inplace_takes_no_logits_that_another_op_needs(self, producer):
        hidden, weight, labels = normal(8, DIM), normal(VOCABULARY, DIM), tokens(8, BAG)

        def twice(hidden, inplace):
            logits = producer(hidden @ weight.T)
            loss = multi_hot_cross_entropy(logits, labels, inplace=inplace)
            return loss + multi_hot_cross_entropy(logits, labels.flip(0), inplace=inplace)

        (leaf,) = leaves(hidden)
        (expected,) = torch.autograd.grad(twice(leaf, False), leaf)
        compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
        (gradient,) = torch.autograd.grad(compiled(leaf, True), leaf)
        assert_equal((gradient,), (expected,))

    @pytest.mark.parametrize(
        ("numbers", "dynamic"),
        [(range(3, 9), None), ((3.5, 4.5, 5.5, 6.5), None), ((3.5, 4.5, 5.5, 6.5), True), (None, None)],
    )
    def test_another_normalizer_does_not_recompile(self, numbers, dynamic):
        counter = CompileCounterWithBackend("aot_eager")
        model, (ids, labels) = Model(), batch()
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        frames = []
        for n in numbers or map(torch.tensor, range(3, 9)):
            assert torch.equal(compiled(ids, labels, normalizer=n), model(ids, labels, normalizer=n))
            frames.append(counter.frame_count)
        assert len(set(frames[2:])) == 1  # the first number may be taken for a constant

    @pytest.mark.extended
    @pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
    def test_inductor(self, monkeypatch, tmp_path):
        # A cache of its own: code that was generated for other vector instructions is reused, and wrong, after a change
        # of ATEN_CPU_CAPABILITY (torch 2.13).
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        model, arguments = Model(bias=True, z_loss=1e-2, return_lse=True), batch()
        model.body = nn.Identity()  # each kernel that inductor writes takes seconds to compile

        def step(model, ids, labels):
            loss, lse = model(ids, labels)
            return 2 * loss + lse.sum()

        compiled = torch.compile(step, fullgraph=True)
        expected = loss_and_gradients(step, model, *arguments)
        for a, b in zip(loss_and_gradients(compiled, model, *arguments), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("options", [{}, dict(reduction="none", bias=True)], ids=["mean", "none"])
    def test_another_number_of_rows_does_not_recompile(self, options, grad):
        counter = CompileCounterWithBackend("aot_eager")
        model = Model(**options)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        frames = []
        with torch.set_grad_enabled(grad):
            for rows in (5, 6, 7, 12):
                arguments = batch(rows)
                loss = compiled(*arguments)
                assert torch.equal(loss, model(*arguments))
                if grad:
                    loss.sum().backward()
                frames.append(counter.frame_count)  # the first call may take two: dynamo starts over at a float
        assert frames[0] > 0 and set(frames) == {frames[0]}


class TestExport:
    def test_module_with_a_dynamic_batch(self):
        module = BagEmbedding(VOCABULARY, DIM, position_weights="power_law")
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(module, (tokens(4, 2, BAG),), dynamic_shapes=({0: rows},))
        for count in (4, 9):
            ids = tokens(count, 2, BAG, seed=count)
            assert torch.equal(program.module()(ids), module(ids))
        assert any(node.target == OPS.bag_embedding.default for node in program.graph.nodes)

    def test_function_with_padding(self):
        class Padded(nn.Module):
            def forward(self, ids, weight):
                return bag_embedding(ids, weight, mode="sum", padding_idx=IGNORE)

        weight, rows = normal(VOCABULARY, DIM), torch.export.Dim("rows", min=2)
        program = torch.export.export(Padded(), (tokens(4, BAG, ignored=0.3), weight), dynamic_shapes=({0: rows}, None))
        ids = tokens(9, BAG, seed=1, ignored=0.3)
        assert (ids == IGNORE).any()
        assert torch.equal(program.module()(ids, weight), bag_embedding(ids, weight, mode="sum", padding_idx=IGNORE))
