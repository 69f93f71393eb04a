"""tst_ext.integrations.liger beside torch, and beside the installed Liger Kernel in Triton's interpreter."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import IGNORE, check_loss, loss_and_gradients, loss_case
from helpers.numerics import assert_accurate
from tst_ext import linear_multi_hot_cross_entropy, nn
from tst_ext.integrations.liger import CrossEntropyOutput, FusedLinearCrossEntropyLoss, fused_linear_cross_entropy

DOCS = Path(__file__).parents[2] / "docs" / "liger.md"
ROWS, DIM, VOCABULARY = 23, 8, 61
BY_LIGER = [  # in Triton's interpreter softcap fails
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"lse_square_scale": 0.01, "label_smoothing": 0.1},
    {"ignore_index": 3},
    {"accum_dtype": torch.float32},
]
OPTIONS = [*BY_LIGER, {"softcap": 2.0}, {"softcap": 2.0, "lse_square_scale": 0.01, "reduction": "sum"}]


def case(bag_size=1, dtype=torch.float32, ignore_index=IGNORE, bias=True):
    hidden, weight, bias, labels = loss_case(ROWS, DIM, VOCABULARY, bag_size, dtype, "cpu", bias=bias)
    return hidden, weight, bias, labels.where(labels != IGNORE, ignore_index)


def results(function, options, dtype=torch.float32, bias=True):
    """Loss and gradients of the case that fits the options."""
    given = torch.linspace(-1, 1, ROWS) if options.get("reduction") == "none" else 0.7
    return loss_and_gradients(function, *case(1, dtype, options.get("ignore_index", IGNORE), bias), given, **options)


def loss_class(hidden, weight, bias, labels, **options):
    return FusedLinearCrossEntropyLoss(**options)(weight, hidden, labels.squeeze(-1), bias)


def loss_function(hidden, weight, bias, labels, **options):
    return fused_linear_cross_entropy(hidden, weight, labels.squeeze(-1), bias, **options)


def by_torch(
    hidden, weight, bias, labels, ignore_index=IGNORE, lse_square_scale=0.0, softcap=None, accum_dtype=None,
    reduction="mean", **options,
):  # fmt: skip
    labels = labels.squeeze(-1)
    z = F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, labels, ignore_index=ignore_index, reduction="none", **options)
    loss = loss + lse_square_scale * z.logsumexp(-1).square() * (labels != ignore_index)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (labels != ignore_index).sum()}[reduction]


def check_against_torch(function, options, bias=True):
    mine, exact = results(function, options, bias=bias), results(by_torch, options, torch.float64, bias)
    for actual, wanted, beside in zip(mine, exact, results(by_torch, options, bias=bias), strict=True):
        assert actual.dtype == beside.dtype
        assert_accurate(actual, wanted, beside, VOCABULARY)


class TestAgainstTorch:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("function", [loss_class, loss_function])
    def test_tokens(self, function, options):
        check_against_torch(function, options)

    def test_z_loss_is_returned_with_its_gradient(self):
        hidden, weight, bias, labels = case(dtype=torch.float64)

        def z_loss(*inputs):
            result = loss_class(*inputs, lse_square_scale=0.01, return_z_loss=True)
            assert isinstance(result, CrossEntropyOutput)
            assert result.token_accuracy is None and result.predicted_tokens is None
            torch.testing.assert_close(result.loss, by_torch(*inputs, lse_square_scale=0.01))
            return result.z_loss

        def expected(hidden, weight, bias, labels):
            lse = F.linear(hidden, weight, bias).logsumexp(-1)
            return 0.01 * lse[labels.squeeze(-1) != IGNORE].square().mean()

        both = (loss_and_gradients(f, hidden, weight, bias, labels) for f in (z_loss, expected))
        for actual, exact in zip(*both, strict=True):
            assert_accurate(actual, exact, exact, VOCABULARY)

    def test_bags(self):
        def function(hidden, weight, bias, labels, z_loss, logit_softcap):
            loss = FusedLinearCrossEntropyLoss(lse_square_scale=z_loss, softcap=logit_softcap)
            return loss(weight, hidden, labels, bias)

        check_loss(*case(bag_size=4), function=function, z_loss=0.01, logit_softcap=2.0)


class TestRefusals:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("ce_weight", torch.ones(VOCABULARY)),
            ("accum_dtype", torch.bfloat16),
            ("use_token_scaling", True),
            ("return_token_accuracy", True),
            ("return_predicted_tokens", True),
            ("chunk_mem_const", 4),
        ],
    )
    def test_what_is_not_implemented(self, name, value):
        hidden, weight, bias, labels = case()
        with pytest.raises(ValueError, match=f"^{name}: "):
            loss_function(hidden, weight, bias, labels, **{name: value})
        if name != "chunk_mem_const":  # the function's alone
            with pytest.raises(ValueError, match=f"^{name}: "):
                FusedLinearCrossEntropyLoss(**{name: value})

    def test_bags_that_were_flattened(self):
        hidden, weight, _, labels = case(bag_size=4)
        with pytest.raises(ValueError, match="^labels: "):
            FusedLinearCrossEntropyLoss()(weight, hidden, labels.flatten())


# ---- beside the real one --------------------------------------------------------------------------------------------


def parameters(function):
    return [(p.name, repr(p.default)) for p in inspect.signature(function).parameters.values()]


def run_liger(path):
    """Liger's signatures, its results for `BY_LIGER`, and a Hugging Face model with its loss and with ours."""
    import liger_kernel.transformers.functional as liger
    import transformers
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, apply_liger_kernel_to_llama

    def by_liger(hidden, weight, bias, labels, **options):
        return LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, labels.squeeze(-1), bias)

    signatures = [LigerFusedLinearCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss.forward]
    signatures = [parameters(f) for f in (*signatures, liger.liger_fused_linear_cross_entropy)]
    numbers = [results(by_liger, options) for options in BY_LIGER]

    apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=DIM, num_hidden_layers=1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).train()
    ids = torch.randint(VOCABULARY, (2, 12))
    losses = []
    for assign in ("", code_blocks()[1]):
        exec(assign, {})
        output = model(input_ids=ids, labels=ids)
        losses.append(
            (output.loss.detach(), output.logits, *torch.autograd.grad(output.loss, list(model.parameters())))
        )
    name = liger.liger_fused_linear_cross_entropy.__module__
    torch.save({"signatures": signatures, "numbers": numbers, "model": losses, "assigned": name}, path)


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    path = tmp_path_factory.mktemp("liger") / "results.pt"
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    command = [sys.executable, "-c", f"import test_liger; test_liger.run_liger({str(path)!r})"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return torch.load(path)


class TestBesideLiger:
    def test_signatures(self, liger):
        mine = [FusedLinearCrossEntropyLoss, FusedLinearCrossEntropyLoss.forward, fused_linear_cross_entropy]
        assert [parameters(f) for f in mine] == liger["signatures"]

    @pytest.mark.parametrize("number", range(len(BY_LIGER)), ids=lambda i: str(BY_LIGER[i]))
    def test_numbers(self, liger, number):
        options = BY_LIGER[number]
        mine, exact = results(loss_class, options), results(by_torch, options, torch.float64)
        for actual, wanted, beside in zip(mine, exact, liger["numbers"][number], strict=True):
            assert_accurate(actual, wanted, beside, VOCABULARY)
            assert_accurate(beside, wanted, actual, VOCABULARY)  # Liger's is the same loss: neither is far from float64

    def test_hugging_face_model_that_liger_has_patched(self, liger):
        assert liger["assigned"] == fused_linear_cross_entropy.__module__
        (loss, logits, *gradients), (my_loss, my_logits, *my_gradients) = liger["model"]
        assert logits is None and my_logits is None  # the fused loss ran, not a head
        for actual, wanted in zip((my_loss, *my_gradients), (loss, *gradients), strict=True):
            assert_accurate(actual, wanted, wanted, VOCABULARY)


# ---- docs/liger.md --------------------------------------------------------------------------------------------------


def code_blocks():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


class TestDocumentation:
    def test_class(self):
        hidden, weight, _, labels = case()
        head = torch.nn.Linear(DIM, VOCABULARY, bias=False)
        head.weight = torch.nn.Parameter(weight)
        names = {"head": head, "hidden": hidden, "labels": labels.squeeze(-1)}
        exec(code_blocks()[0], names)
        exact = by_torch(hidden.double(), weight.double(), None, labels, softcap=30.0, lse_square_scale=1e-4)
        beside = by_torch(hidden, weight, None, labels, softcap=30.0, lse_square_scale=1e-4)
        assert_accurate(names["loss"].detach(), exact, beside, VOCABULARY)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("row", ["linear_cross_entropy_func", "chunked_linear_cross_entropy", "LinearCrossEntropy"])
    def test_calls_in_place_of_quack(self, row, reduction):
        (call,) = re.findall(rf"^\| `{row}\(.* \| `(.*)` \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)

        def mapped(x, weight, bias, target, **options):
            names = dict(x=x, weight=weight, bias=bias, target=target.squeeze(-1), chunk_size=5, d=DIM, V=VOCABULARY)
            names |= dict(nn=nn, linear_multi_hot_cross_entropy=linear_multi_hot_cross_entropy, **options)
            if row != "LinearCrossEntropy":
                return eval(call, names)
            head = eval(call.split("(x, target)")[0], {**names, "bias": True})
            return torch.func.functional_call(head, {"weight": weight, "bias": bias}, (x, names["target"]))

        options = {"ignore_index": 3, "reduction": reduction}
        check_against_torch(mapped, options, bias=row != "chunked_linear_cross_entropy")
