"""From a batch of tokens to a batch of bags: folding ids and labels, and the weights of bag positions.

Pure tensor code, no kernel. Notation: B sequences of L tokens, bag size s, l = L / s bags a sequence.
"""

import torch
from torch import Tensor

__all__ = ["fold_inputs", "fold_labels", "position_weights"]

# C0 + a * i**k: how the mutual information of two tokens decays with their distance, fitted on DCLM (arXiv 2605.06546).
FITTED = (3.63, 1.35, -1.25)


def _check_fold(name: str, tokens: Tensor, bag_size: int) -> None:
    if bag_size < 1:
        raise ValueError(f"bag_size: expected an integer >= 1, got {bag_size}")
    if tokens.dim() < 1:
        raise ValueError(f"{name}: expected [..., L], got a 0-d tensor")
    if tokens.shape[-1] % bag_size:
        raise ValueError(
            f"{name}: expected a last dimension that bag_size = {bag_size} divides, got shape {tuple(tokens.shape)}"
        )


def fold_inputs(input_ids: Tensor, bag_size: int) -> Tensor:
    """Folds a sequence into contiguous bags that do not overlap: `[..., L] -> [..., L / s, s]`.

    A view where the strides allow one. Bag j holds tokens `[j s, (j + 1) s)`.

    Raises:
        ValueError: `bag_size` is below 1 or does not divide L.
    """
    _check_fold("input_ids", input_ids, bag_size)
    return input_ids.unflatten(-1, (input_ids.shape[-1] // bag_size, bag_size))


def fold_labels(labels: Tensor, bag_size: int, *, shifted: bool, ignore_index: int = -100) -> Tensor:
    """Folds labels so that each bag is trained on the tokens of the bag after it: `[..., L] -> [..., L / s, s]`.

    Bag j reads tokens `[j s, (j + 1) s)` and its labels are the tokens `[(j + 1) s, (j + 2) s)`, so no target is
    visible to its own bag. Folding labels without this shift would put s - 1 of the s targets inside the input bag.
    Slots past the end of the sequence hold `ignore_index`.

    Args:
        labels: integer tensor `[..., L]`.
        bag_size: s, tokens a bag; divides L. With s = 1 the result is ordinary next-token labels `[..., L, 1]`.
        shifted: True where `labels[t]` is already the token after `input_ids[t]` (most pre-training loaders), so that
            the last bag keeps one valid label. False where `labels[t]` is `input_ids[t]` itself (Hugging Face).
        ignore_index: the label that the loss skips.

    Raises:
        ValueError: `bag_size` is below 1 or does not divide L.

    Source: arXiv 2605.06546, the label fold of the superposition phase.
    """
    _check_fold("labels", labels, bag_size)
    drop = min(bag_size - 1 if shifted else bag_size, labels.shape[-1])
    filler = labels.new_full((*labels.shape[:-1], drop), ignore_index)
    return fold_inputs(torch.cat((labels[..., drop:], filler), dim=-1), bag_size)


def position_weights(
    name: str,
    bag_size: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w_i of the bag positions i = 1..s in the loss, `[s]`.

    `"uniform"`: 1. `"power_law"`: 1 / i. `"exponential"`: exp(-i). `"first"`: 1, 0, ..., 0. `"fitted"`:
    3.63 + 1.35 i**-1.25. Only their ratios matter: the loss divides by their sum. The paper finds uniform best for
    small bags (s = 4), the power law from s = 8 on, the fitted one slightly better than 1 / i.

    Raises:
        ValueError: unknown name, or `bag_size` below 1.

    Source: arXiv 2605.06546, the ablation of position weights.
    """
    if bag_size < 1:
        raise ValueError(f"bag_size: expected an integer >= 1, got {bag_size}")
    i = torch.arange(1, bag_size + 1, device=device, dtype=torch.promote_types(dtype, torch.float32))
    if name == "uniform":
        weights = torch.ones_like(i)
    elif name == "power_law":
        weights = 1 / i
    elif name == "exponential":
        weights = torch.exp(-i)
    elif name == "first":
        weights = (i == 1).to(i.dtype)
    elif name == "fitted":
        c0, a, k = FITTED
        weights = c0 + a * i**k
    else:
        raise ValueError(
            f"position weights: expected 'uniform', 'power_law', 'exponential', 'first' or 'fitted', got {name!r}"
        )
    return weights.to(dtype)
