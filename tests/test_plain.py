"""Plain torch in place of kernels: without data, and what it warns of.

The tests with the fixture `kernels` run every function on it as well.
"""

import warnings

import pytest
import torch

from helpers.cases import FUNCTIONS, embedding_case, fused, loss_and_gradients, loss_case, some_weights
from tst_ext import bag_embedding, multi_hot_cross_entropy
from tst_ext.ops import plain


def on_meta(*tensors):
    return [None if t is None else t.to("meta") for t in tensors]


class TestMeta:
    """Shapes and dtypes of the public functions without data, also those of gradients."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_bag_embedding(self, dtype):
        ids, weight, _ = embedding_case((2, 3, 4), 11, 5, dtype, "meta")
        weight.requires_grad_()
        out = bag_embedding(ids, weight, padding_idx=-100, position_weights="power_law")
        assert out.is_meta and out.shape == (2, 3, 5) and out.dtype == dtype
        out.sum().backward()
        assert weight.grad.is_meta and weight.grad.shape == weight.shape and weight.grad.dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"reduction": "none", "position_weights": "power_law", "label_weights": some_weights},
            {"objective": "mce_alt", "logit_softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1, "normalizer": 3},
        ],
        ids="-".join,
    )
    def test_loss(self, dtype, function, options):
        case = loss_case(6, 8, 50, 4, dtype, "cpu", bias=True)
        real = loss_and_gradients(function, *case, **options)
        for a, b in zip(loss_and_gradients(function, *on_meta(*case), **options), real, strict=True):
            assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_lse_and_z_loss(self, function):
        case = loss_case(6, 8, 50, 4, torch.float32, "cpu")
        options = dict(return_lse=True, return_z_loss=True, z_loss=0.1)
        for a, b in zip(function(*on_meta(*case), **options), function(*case, **options), strict=True):
            assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype

    def test_errors_come_without_data_too(self):
        hidden, weight, _, labels = on_meta(*loss_case(6, 8, 50, 4, torch.float32, "cpu"))
        with pytest.raises(ValueError, match=r"labels.*\(5, 4\)"):
            fused(hidden, weight, None, labels[:5])


class TestWithoutKernels:
    def test_each_op_runs_plain_torch_and_one_warns(self, without_kernels):
        ids, weight, _ = embedding_case((2, 3), 11, 5, torch.float32, "cpu")
        hidden, head, _, labels = loss_case(6, 8, 50, 4, torch.float32, "cpu")
        calls = [
            lambda: bag_embedding(ids, weight),
            lambda: fused(hidden, head, None, labels),
            lambda: multi_hot_cross_entropy(hidden @ head.T, labels),
        ]
        for call in calls:
            plain._warn.cache_clear()
            with pytest.warns(UserWarning, match="tst_ext: no compiled kernel for cpu"):
                call()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for other in calls:
                    other()

    def test_with_kernels_nothing_warns(self):
        plain._warn.cache_clear()
        ids, weight, _ = embedding_case((2, 3), 11, 5, torch.float32, "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bag_embedding(ids, weight)
            fused(*loss_case(6, 8, 50, 4, torch.float32, "cpu"))
