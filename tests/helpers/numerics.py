"""How the tests judge a float result: by its relative error against float64, beside that of plain torch.

An absolute tolerance accepts a zero gradient where gradients are small, so none is used. `test_numerics.py` shows what
this comparison rejects.
"""

import torch
from torch import Tensor


def distance(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| in float64."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    return (actual.detach().double().cpu() - exact.detach().double().cpu()).norm().item()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; 0 where both are all zeros or empty, infinite where exact alone is."""
    error, norm = distance(actual, exact), exact.detach().double().norm().item()
    return error / norm if norm else (float("inf") if error else 0.0)


def assert_accurate(
    actual: Tensor, exact: Tensor, reference: Tensor, terms: int = 1, magnitude: Tensor | None = None
) -> None:
    """Fails unless `actual` is about as close to `exact` (float64) as `reference` (plain torch, same dtype) is.

    The bound is 1.1 times the reference's error, and besides what is a matter of luck in a small case:

    - one eps, where the reference happens to err less: half for the rounding of the result to its dtype, half for that
      of the terms it is summed from;
    - no less than another order of the additions in a sum of `terms` terms in float32 or float64: each addition errs by
      up to eps / 2, at random, and errors come in through logits, sum and product: 2 sqrt(terms) eps.

    Both of the result, or of `magnitude`, the root of the sum of the squares of its terms, where those cancel.
    """
    norm = exact.double().norm().item()
    scale = max(norm, 0 if magnitude is None else magnitude.double().norm().item())
    error, beside = distance(actual, exact), distance(reference, exact)
    eps = torch.finfo(reference.dtype).eps
    accumulation = torch.finfo(torch.promote_types(reference.dtype, torch.float32)).eps
    allowed = max(1.1 * beside + eps * scale, 2 * max(terms, 4) ** 0.5 * accumulation * scale)
    assert error <= allowed, f"relative error {error / (norm or 1):.2e}, allowed {allowed / (norm or 1):.2e}"
