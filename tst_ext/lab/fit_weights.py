"""Measure position weights on your own text: how the mutual information of two tokens decays with their distance.

C0 + a * d**k is fitted to I(d), the mutual information of x_t and x_{t+d}. The weights are w_i = C0 + a * i**k; only
their ratios matter. The paper (arXiv 2605.06546, Figure 10) has 3.63 + 1.35 * d**-1.25 on DCLM.

An estimate by frequencies is too high even for independent tokens, by a floor: for V = 128,256 and Zipf's law 2.7 nats
from 4 M tokens and 3.4 from 1 M. The floor draws weights towards uniform. It is measured by pairing each x_t with the
partner of another, and can be subtracted. Dependent pairs are less biased, so what is left is rather too low.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..bags import FITTED
from ..train.data import Shard
from ..train.files import UserError, check, write_text
from ..train.plot import figure

LONGEST = 64  # bag positions whose weights must be usable; the paper's largest bag has 16
STEEPEST, FLATTEST = -10.0, -0.01  # k; at these ends the curve is a step after d = 1, and a logarithm of d


def _pairs(tokens: np.ndarray, distance: int, end_of_text: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return all x_t and x_{t+distance} of one document, `[N]` each."""
    x, y = tokens[:-distance], tokens[distance:]
    if end_of_text is not None:
        ends = np.concatenate(([0], np.cumsum(tokens == end_of_text)))
        inside = ends[distance + 1 :] == ends[: -distance - 1]
        x, y = x[inside], y[inside]
    if not len(x):
        raise UserError(f"distances: expected pairs of tokens of one document at each distance, got none at {distance}")
    return x, y


def _estimate(x: np.ndarray, y: np.ndarray, vocabulary: int) -> float:
    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / len(x)
        return -float(p @ np.log(p))

    # One integer per pair and a sort: a [V, V] table would take 131 GB at V = 128,256.
    joint = np.unique(x * vocabulary + y, return_counts=True)[1]
    return entropy(np.bincount(x)) + entropy(np.bincount(y)) - entropy(joint)


def mutual_information(tokens: np.ndarray, distance: int, vocabulary: int, end_of_text: int | None) -> float:
    """Estimate the mutual information between x_t and x_{t+distance} from frequencies, in nats; biased upwards.

    Args:
        tokens: `[n]`, int64, ids in [0, vocabulary).
        distance: in tokens, 1 or more.
        end_of_text: id that ends a document. Pairs with it in [t, t + distance] do not count; with None all count.

    Raises UserError if there is no pair to count. Source: arXiv 2605.06546, Figure 10.
    """
    return _estimate(*_pairs(tokens, distance, end_of_text), vocabulary)


def independent_floor(tokens: np.ndarray, distance: int, vocabulary: int, end_of_text: int | None) -> float:
    """Return `mutual_information` of the same pairs with their second halves permuted, by a fixed seed."""
    x, y = _pairs(tokens, distance, end_of_text)
    return _estimate(x, np.random.Generator(np.random.Philox(key=0)).permutation(y), vocabulary)


def fit(distances: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Fit C0 + a * d**k with k in [-10, -0.01] by least squares and return (C0, a, k); a < 0 if the curve rises.

    `distances` `[D]` are positive, at least 3 different ones; `values` are `[D]`. A flat curve has no k: if values
    differ by no more than rounding, the result is (their mean, 0, -1).
    """
    d, y = np.asarray(distances, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if np.ptp(y) <= 1e-12 * np.abs(y).max():  # some thousand roundings of float64
        return float(y.mean()), 0.0, -1.0

    def solve(k: float) -> tuple[float, float, float]:
        """Return the squared error at k with the best C0 and a, in which the curve is linear."""
        basis = d**k
        centred = basis - basis.mean()
        a = centred @ (y - y.mean()) / (centred @ centred)
        c0 = y.mean() - a * basis.mean()
        return float(np.sum((c0 + a * basis - y) ** 2)), float(c0), float(a)

    # k alone is searched, on ever finer grids. scipy would be a dependency for one curve.
    low, high = STEEPEST, FLATTEST
    while high - low > 1e-12:
        grid = np.linspace(low, high, 201)
        best = int(np.argmin([solve(k)[0] for k in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
    k = float(grid[best])
    return *solve(k)[1:], k


def fit_weights(shard: Shard, *, tokens: int, distances: int, subtract_floor: bool, folder: Path) -> dict[str, Any]:
    """Measure a shard and fit its position weights; write fit_weights.json and fit_weights.png to `folder`.

    Args:
        shard: the text; documents are kept apart if it names an end-of-text token.
        tokens: read from the start of the shard, at most all. Each takes about 70 bytes of memory.
        distances: D, the largest distance.
        subtract_floor: fit the mutual information less its floor, or 0 if that is negative.

    Returns:
        The content of fit_weights.json: distances, values and floor `[D]`, the latter two in nats and as measured; c0,
        a and k, for `--position-weights fitted --fitted C0 A K`; tokens read; the shard's sha256; subtract_floor.

    Raises:
        UserError: fewer than 3 distances, too few tokens, no pair of one document at some distance, a fit with unusable
            weights, or the folder cannot be written.
    """
    check("distances", distances, distances >= 3, "at least 3, for three constants")
    count = min(tokens, len(shard))
    if count <= distances:
        has = f"shard {shard.name} has {len(shard)}"
        raise UserError(f"tokens: expected more than distances = {distances}, got {count}; {has}")
    text, d = shard.read(0, count), np.arange(1, distances + 1)
    values, floor = (
        np.array([estimate(text, i, shard.vocabulary, shard.end_of_text) for i in d.tolist()])
        for estimate in (mutual_information, independent_floor)
    )
    c0, a, k = fit(d, np.maximum(values - floor, 0) if subtract_floor else values)
    weights = c0 + a * np.arange(1.0, LONGEST + 1) ** k
    # The first must not be 0: the last bag of a sequence has no other label.
    if not (np.isfinite(weights).all() and weights.min() >= 0 < weights[0]):
        remedy = "measure more distances" + (", or do not subtract the floor" if subtract_floor else "")
        raise UserError(
            f"fit: expected no negative weight for i = 1..{LONGEST}, and a positive one for 1, got {c0:.4g} + {a:.4g} "
            f"* i**{k:.4g}, from {weights[0]:.4g} to {weights[-1]:.4g}; {remedy}"
        )
    result = {"distances": d.tolist(), "values": values.tolist(), "floor": floor.tolist(), "c0": c0, "a": a, "k": k}
    result |= {"tokens": count, "sha256": shard.sha256, "subtract_floor": subtract_floor}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "fit_weights.json", json.dumps(result, indent=2) + "\n")
        _plot(result, folder / "fit_weights.png")
    except OSError as error:
        raise UserError(f"folder {folder}: {error}") from error
    return result


def _plot(result: dict[str, Any], path: Path) -> None:
    """Draw the paper's Figure 10 for this text."""
    d, values, floor = (np.array(result[name]) for name in ("distances", "values", "floor"))
    fitted = (result["c0"], result["a"], result["k"])
    with figure(path, "distance (tokens)", "mutual information (nats)") as axes:
        axes.plot(d, values, "o", color="C0", markersize=4, label="measured")
        if result["subtract_floor"]:
            axes.plot(d, np.maximum(values - floor, 0), "o", color="C2", markersize=4, label="measured, less the floor")
        for (c0, a, k), color, name in ((fitted, "C1", "fit"), (FITTED, "gray", "paper, DCLM")):
            axes.plot(d, c0 + a * d**k, color=color, label=f"{name}: {c0:.3g} + {a:.3g} d^{k:.3g}")
        axes.plot(d, floor, "--", color="C0", linewidth=1, label="floor: independent tokens")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
