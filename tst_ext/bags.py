"""Fold a batch of tokens into bags, and weigh bag positions: pure tensor code, no kernel.

Notation: B sequences of L tokens, bag size s, l = L / s bags per sequence.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATING, INTEGER, check_integer, check_tensor, values_of

__all__ = ["document_offsets", "fold_inputs", "fold_labels", "position_weights"]

# C0 + a * i**k: how the mutual information of two tokens decays with their distance, fitted on DCLM (arXiv 2605.06546).
FITTED = (3.63, 1.35, -1.25)


def _check_fold(name: str, tokens: Tensor, bag_size: int, divides: bool = True) -> None:
    # Not the smaller and unsigned integers of token files: a filler of -100 would come out as a token.
    check_tensor(name, tokens, INTEGER)
    check_integer("bag_size", bag_size, 1)
    if tokens.dim() < 1:
        raise ValueError(f"{name}: expected [..., L], got a 0-d tensor")
    if divides and tokens.shape[-1] % bag_size:
        raise ValueError(
            f"{name}: expected a last dimension that bag_size = {bag_size} divides, got shape {tuple(tokens.shape)}"
        )


def document_offsets(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Find where documents begin and end: `[..., L] -> [D + 1]`, int64, the `cu_seqlens` of the folds.

    A document ends after each `eos_token_id` and at the end of each sequence. Document i holds the tokens
    `[out[i], out[i + 1])` of `input_ids` flattened.

    Raises:
        TypeError: `input_ids` is not int64 or int32.
        ValueError: `input_ids` is 0-d, or `eos_token_id` no integer.
    """
    _check_fold("input_ids", input_ids, 1)
    check_integer("eos_token_id", eos_token_id)
    ends = input_ids == eos_token_id
    if input_ids.shape[-1]:
        ends[..., -1] = True
    return torch.nn.functional.pad(ends.flatten().nonzero().squeeze(1) + 1, (1, 0))


def fold_inputs(
    input_ids: Tensor,
    bag_size: int,
    *,
    cu_seqlens: Tensor | None = None,
    num_bags: int | None = None,
    padding_idx: int = -100,
) -> Tensor:
    """Fold a sequence into contiguous bags that do not overlap: `[..., L] -> [..., L / s, s]`, a view if possible.

    Bag j holds tokens `[j s, (j + 1) s)`. With `cu_seqlens` each document begins a bag, and its last bag may be short.
    The result is then `[..., l, s]`, with l the bags of the sequence that needs most, and `padding_idx` in empty slots.
    Give it to `bag_embedding` too.

    Args:
        input_ids: int64 or int32, `[..., L]`.
        bag_size: s, tokens per bag. It must divide L unless there is a `cu_seqlens`.
        cu_seqlens: `[D + 1]`, int64 or int32, from 0 to `input_ids.numel()`: where documents begin and end, counted in
            `input_ids` flattened, as in `document_offsets` and variable-length attention. Documents also end with
            their sequence.
        num_bags: l, for a shape that does not depend on the documents. Empty bags fill up, and bags beyond it are
            dropped as inputs, but remain as labels. Only with `cu_seqlens`.
        padding_idx: the id in empty slots.

    Raises:
        TypeError: a tensor of another dtype. In a smaller type the filler would wrap to a token.
        ValueError: `bag_size` is below 1 or does not divide L; `cu_seqlens` is not as above.
    """
    _check_fold("input_ids", input_ids, bag_size, divides=cu_seqlens is None)
    if cu_seqlens is None:
        if num_bags is not None:
            raise ValueError("num_bags: only with cu_seqlens; without, there are L / bag_size bags")
        return input_ids.unflatten(-1, (input_ids.shape[-1] // bag_size, bag_size))
    bag, slot, _, bags = _document_bags("input_ids", input_ids, bag_size, cu_seqlens, num_bags)
    return _scatter_bags(input_ids, bag, slot, bag_size, bags, padding_idx)


def fold_labels(
    labels: Tensor,
    bag_size: int,
    *,
    shifted: bool,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    num_bags: int | None = None,
) -> Tensor:
    """Fold labels so that each bag is trained on the tokens of the bag after it: `[..., L] -> [..., L / s, s]`.

    The labels of bag j are the tokens `[(j + 1) s, (j + 2) s)`, so no bag reads its own targets. Without this shift it
    would read s - 1 of s. Slots past the end of the sequence hold `ignore_index`. With `cu_seqlens` a bag is trained on
    the next bag of its own document: the last one has no labels, and a short one gives as many as it has tokens.

    Args:
        labels: int64 or int32, `[..., L]`.
        bag_size, cu_seqlens, num_bags: as in `fold_inputs`. s = 1 gives next-token labels `[..., L, 1]`.
        shifted: True if `labels[t]` is the token after `input_ids[t]` (most pre-training loaders). The last bag of a
            sequence then keeps one label, unless `cu_seqlens` ends a document there. False if `labels[t]` is
            `input_ids[t]` (Hugging Face).
        ignore_index: the label that the loss skips.

    Raises:
        TypeError, ValueError: as in `fold_inputs`.

    Source: arXiv 2605.06546, the label fold of the superposition phase.
    """
    _check_fold("labels", labels, bag_size, divides=cu_seqlens is None)
    if cu_seqlens is None:
        drop = min(bag_size - 1 if shifted else bag_size, labels.shape[-1])
        filler = labels.new_full((*labels.shape[:-1], drop), ignore_index)
        return fold_inputs(torch.cat((labels[..., drop:], filler), dim=-1), bag_size, num_bags=num_bags)
    if shifted and labels.shape[-1]:  # tokens where they are read; the first of a sequence is nobody's target
        labels = torch.cat((labels[..., :1], labels[..., :-1]), dim=-1)
    bag, slot, position, bags = _document_bags("labels", labels, bag_size, cu_seqlens, num_bags)
    target = torch.where(position < bag_size, -1, bag - 1)  # a document's first bag has no predecessor in it
    return _scatter_bags(labels, target, slot, bag_size, bags, ignore_index)


def _document_bags(
    name: str, tokens: Tensor, bag_size: int, cu_seqlens: Tensor, num_bags: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Find each token's bag in its sequence, slot in the bag and position in its document; and the number of bags."""
    if num_bags is not None:
        check_integer("num_bags", num_bags, 1)
    check_tensor("cu_seqlens", cu_seqlens, INTEGER)
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens: expected [D + 1], got shape {tuple(cu_seqlens.shape)}")
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens[:1].tolist() + cu_seqlens[-1:].tolist()
        if ends != [0, tokens.numel()] or bool((cu_seqlens.diff() < 0).any()):
            got = cu_seqlens.tolist() if len(cu_seqlens) < 20 else ends
            raise ValueError(
                f"cu_seqlens: expected offsets that rise from 0 to {name}.numel() = {tokens.numel()}, got {got}"
            )
    starts = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
    starts = starts.index_fill(0, cu_seqlens.to(tokens.device, torch.int64), True)[:-1].view(tokens.shape)
    t = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    position = t - torch.where(starts, t, 0).cummax(-1).values if t.shape[-1] else t
    slot = position % bag_size
    bag = (slot == 0).cumsum(-1) - 1  # [..., L], as slot and position
    if num_bags is None:
        num_bags = int(bag.max()) + 1 if bag.numel() else 0
    return bag, slot, position, num_bags


def _scatter_bags(tokens: Tensor, bag: Tensor, slot: Tensor, bag_size: int, bags: int, filler: int) -> Tensor:
    """Put tokens into bags and slots, `[..., L] -> [..., bags, s]`; drop bag numbers outside `[0, bags)`."""
    slots, length = bags * bag_size, tokens.shape[-1]
    # Each dropped token has a place of its own behind the bags: equal places would be written in no fixed order.
    behind = slots + torch.arange(length, device=tokens.device)
    place = torch.where((bag >= 0) & (bag < bags), bag * bag_size + slot, behind)
    out = tokens.new_full((*tokens.shape[:-1], slots + length), filler).scatter(-1, place, tokens)
    return out[..., :slots].unflatten(-1, (bags, bag_size))


def position_weights(
    name: str,
    bag_size: int,
    *,
    fitted: tuple[float, float, float] = FITTED,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the weights w_i of the bag positions i = 1..s in the loss, `[s]`. Only their ratios matter.

    `"uniform"`: 1. `"power_law"`: 1 / i. `"exponential"`: exp(-i). `"first"`: 1, 0, ..., 0. `"fitted"`: C0 + a i**k,
    (C0, a, k) = `fitted`. The paper finds uniform best for small bags (s = 4), the power law from s = 8 on, and the
    fitted weights slightly better than 1 / i.

    Raises:
        ValueError: unknown name, or `bag_size` below 1.

    Source: arXiv 2605.06546, the ablation of position weights.
    """
    check_integer("bag_size", bag_size, 1)
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
        c0, a, k = fitted
        weights = c0 + a * i**k
    else:
        names = "'uniform', 'power_law', 'exponential', 'first' or 'fitted'"
        raise ValueError(f"position weights: expected {names}, got {name!r}")
    return weights.to(dtype)


def check_constant_weights(given: Any, bag_size: int | None = None) -> None:
    """Refuse a tensor of weights that has another shape than `[s]`, or wants a gradient, which no op computes."""
    if given is None or isinstance(given, str):
        return
    check_tensor("position_weights", given, FLOATING + INTEGER)
    if given.dim() != 1 or given.requires_grad or bag_size not in (None, given.shape[0]):
        wanted = f"({'s' if bag_size is None else bag_size},)"
        got = f"shape {tuple(given.shape)}, requires_grad={given.requires_grad}"
        raise ValueError(f"position_weights: expected a constant tensor of shape {wanted}, got {got}")


def resolved_position_weights(given: str | Tensor | None, bag_size: int, like: Tensor) -> Tensor | None:
    """Return the weights that an op is given, checked, on the device of `like`."""
    if given is None:
        return None
    if isinstance(given, str):
        dtype = torch.promote_types(like.dtype, torch.float32)
        return position_weights(given, bag_size, device=like.device, dtype=dtype)
    check_constant_weights(given, bag_size)
    if given.is_meta and not like.is_meta:
        raise ValueError(f"position_weights: expected a tensor with values for {like.device}, got one on meta")
    for i, w in enumerate(values_of(given) or ()):
        if not 0 <= w <= torch.finfo(torch.float32).max:
            raise ValueError(f"position_weights[{i}]: expected a finite float32 number >= 0, got {w}")
    return given.to(like.device)
