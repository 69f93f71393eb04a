"""The comparison that every numerical test relies on must fail on wrong gradients."""

import pytest
import torch

from helpers.numerics import assert_accurate, relative_error

EXACT = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-4


def one_row_wrong(gradient):
    gradient = gradient.clone()
    gradient[7] = 0
    return gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
class TestAssertAccurate:
    def test_accepts_the_rounded_gradient(self, dtype):
        assert_accurate(EXACT.to(dtype), EXACT, EXACT.to(dtype))

    @pytest.mark.parametrize(
        "spoil",
        [
            torch.zeros_like,
            torch.neg,
            lambda g: g * 1.02,
            lambda g: g.flip(0),
            lambda g: g.roll(1, dims=1),
            one_row_wrong,
        ],
        ids=["zeroed", "negated", "scaled", "permuted", "shifted", "one row wrong"],
    )
    def test_rejects_a_wrong_gradient(self, dtype, spoil):
        with pytest.raises(AssertionError, match="relative error"):
            assert_accurate(spoil(EXACT.to(dtype)), EXACT, EXACT.to(dtype))

    def test_rejects_nan(self, dtype):
        spoiled = EXACT.to(dtype)
        spoiled[0, 0] = torch.nan
        with pytest.raises(AssertionError, match="not finite"):
            assert_accurate(spoiled, EXACT, EXACT.to(dtype))


def test_relative_error_of_zero():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")
