"""How the tests judge a float result: by its relative error against float64, beside that of plain torch.

An absolute tolerance accepts a zero gradient where gradients are small, so none is used. `test_numerics.py` shows what
this comparison rejects.
"""

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 where both are all zeros or empty, infinite where exact alone is."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.isfinite(actual).all(), "not finite"
    distance, norm = (actual - exact).norm().item(), exact.norm().item()
    return distance / norm if norm else (float("inf") if distance else 0.0)


def assert_accurate(actual: Tensor, exact: Tensor, reference: Tensor, terms: int = 1) -> None:
    """Fails unless `actual` is about as close to `exact` (float64) as `reference` (plain torch, same dtype) is.

    The bound is 1.1 times the reference's error, but no less than the result's own rounding, one eps of its dtype, and
    no less than what another order of the additions makes of a sum of `terms` terms in float32 or float64: each
    addition errs by up to eps / 2, at random, and errors come in through logits, sum and product: 2 sqrt(terms) eps.
    """
    error, allowed = relative_error(actual, exact), 1.1 * relative_error(reference, exact)
    accumulation = torch.promote_types(reference.dtype, torch.float32)
    allowed = max(
        allowed,
        torch.finfo(reference.dtype).eps,
        2 * max(terms, 4) ** 0.5 * torch.finfo(accumulation).eps,
    )
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
