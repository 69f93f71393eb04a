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


def assert_accurate(
    actual: Tensor, exact: Tensor, reference: Tensor, terms: int = 1, magnitude: Tensor | None = None
) -> None:
    """Fails unless `actual` is about as close to `exact` (float64) as `reference` (plain torch, same dtype) is.

    The bound is 1.1 times the reference's error, and besides what is a matter of luck in a small case:

    - one eps, where the reference happens to err less: half for the rounding of the result to its dtype, half for that
      of the logits' gradient;
    - no less than another order of the additions in a sum of `terms` terms in float32 or float64: each addition errs by
      up to eps / 2, at random, and errors come in through logits, sum and product: 2 sqrt(terms) eps;
    - where terms cancel, as p - 1 does at a label, no less than 4 eps (float32 or float64) of `magnitude`, the sum of
      their absolute values.
    """
    norm = exact.double().norm().item()
    error, beside = relative_error(actual, exact), relative_error(reference, exact)
    accumulation = torch.finfo(torch.promote_types(reference.dtype, torch.float32)).eps
    floor = 2 * max(terms, 4) ** 0.5 * accumulation
    if magnitude is not None:
        size = magnitude.double().norm().item()
        if not norm and size:  # all of it cancels
            norm, error, beside = size, actual.double().norm().item() / size, reference.double().norm().item() / size
        floor = max(floor, 4 * accumulation * size / norm) if norm else 0
    allowed = max(1.1 * beside + torch.finfo(reference.dtype).eps, floor)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
