"""Fold a batch of tokens into bags, weigh bag positions, measure bags: pure tensor code, no kernel.

Notation: B sequences of L tokens, bag size s, l = L / s bags per sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    FLOATING,
    INTEGER,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    is_readable,
    moved,
    values_of,
)

__all__ = [
    "bag_entropy",
    "bag_positions",
    "cu_bags",
    "document_offsets",
    "fold_inputs",
    "fold_labels",
    "join_documents",
    "position_weights",
    "slide_labels",
]

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
    return F.pad(ends.flatten().nonzero().squeeze(1) + 1, (1, 0))


def join_documents(cu_seqlens: Tensor, least: int, *, length: int | None = None) -> Tensor:
    """Join documents to units of at least `least` tokens: `[D + 1] -> [U + 1]`, offsets of the same dtype and device.

    A unit with n tokens has n - s labels, in the ceil(n / s) s slots of its bags. So short documents leave many slots
    empty: 25 % with s = 6 and 30 tokens on average. With `least = 30 s` it is 3.8 % for these documents, and at most
    6.5 % of a unit's slots whatever the lengths are. The price: inside a unit, bags, labels and attention cross from
    one document to the next, as they do everywhere without `cu_seqlens`.

    It reads the offsets into Python and takes 2 us per document, so call it in the loader, on the CPU.

    Args:
        cu_seqlens: `[D + 1]`, int64 or int32, rising from 0, as in `fold_inputs`.
        least: the fewest tokens of a unit. A unit is shorter only if its whole sequence is.
        length: L, where the offsets are of several sequences of L tokens. None joins one sequence.

    Raises:
        TypeError: `cu_seqlens` is not int64 or int32.
        ValueError: `least` or `length` is below 1, `length` does not divide the tokens, or offsets do not rise from 0.
    """
    check_integer("least", least, 1)
    if length is not None:
        check_integer("length", length, 1)
    check_tensor("cu_seqlens", cu_seqlens, INTEGER)
    if cu_seqlens.is_meta:
        raise ValueError("cu_seqlens: expected a tensor with values, got one on meta")
    offsets = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or offsets[:1] != [0] or offsets != sorted(offsets):
        got = offsets if cu_seqlens.numel() < 20 else f"shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected offsets [D + 1] that rise from 0, got {got}")
    length = length or max(1, offsets[-1])
    if offsets[-1] % length:
        raise ValueError(f"length: expected a divisor of the {offsets[-1]} tokens of cu_seqlens, got {length}")
    kept = [0]
    for offset in offsets:
        sequence = (offset - 1) // length * length  # the start of the sequence that holds the document's last token
        before, after = offset - max(kept[-1], sequence), sequence + length - offset
        if offset > kept[-1] and (after == 0 or min(before, after) >= least):
            kept.append(offset)
    return torch.tensor(kept, dtype=cu_seqlens.dtype, device=cu_seqlens.device)


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
    check_integer("padding_idx", padding_idx)
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
    offset: int = 0,
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
        offset: k >= 0 gives bag j the tokens of bag j + 1 + k, for multi-token prediction. The last k + 1 bags of a
            document or sequence then have no labels, where the last has none above.
        ignore_index: the label that the loss skips.

    Raises:
        TypeError, ValueError: as in `fold_inputs`; `offset` is no integer >= 0.

    Source: arXiv 2605.06546, the label fold of the superposition phase.
    """
    _check_fold("labels", labels, bag_size, divides=cu_seqlens is None)
    check_integer("offset", offset, 0)
    check_integer("ignore_index", ignore_index)
    ahead = (offset + 1) * bag_size  # tokens from a slot of a bag to its label
    if cu_seqlens is None:
        drop = min(ahead - 1 if shifted else ahead, labels.shape[-1])
        filler = labels.new_full((*labels.shape[:-1], drop), ignore_index)
        return fold_inputs(torch.cat((labels[..., drop:], filler), dim=-1), bag_size, num_bags=num_bags)
    if shifted and labels.shape[-1]:  # back to where tokens are read; no bag predicts the first one of a sequence
        labels = torch.cat((labels[..., :1], labels[..., :-1]), dim=-1)
    bag, slot, position, bags = _document_bags("labels", labels, bag_size, cu_seqlens, num_bags)
    target = torch.where(position < ahead, -1, bag - offset - 1)  # a document's first bag has no predecessor in it
    return _scatter_bags(labels, target, slot, bag_size, bags, ignore_index)


def slide_labels(
    labels: Tensor,
    bag_size: int,
    *,
    shifted: bool,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Give each position the s tokens after it as labels, for output-only superposition: `[..., L] -> [..., L, s]`.

    Label i of position t is the token t + 1 + i. Slots past the end of the sequence hold `ignore_index`, and with
    `cu_seqlens` those past the end of the position's document. Without, the result is a view in which positions
    overlap: clone it before you write to it.

    Args:
        labels: int64 or int32, `[..., L]`.
        bag_size: s, labels per position.
        shifted, ignore_index, cu_seqlens: as in `fold_labels`. With `shifted` the last position keeps one label, unless
            there is a `cu_seqlens`.

    Raises:
        TypeError, ValueError: as in `fold_labels`.

    Source: arXiv 2605.06546, the output side of superposition alone.
    """
    _check_fold("labels", labels, bag_size, divides=False)
    check_integer("ignore_index", ignore_index)
    length = labels.shape[-1]

    def following(values: Tensor, filler: int, first: int) -> Tensor:  # [..., L, s]: values[t + first + i]
        return F.pad(values, (0, bag_size), value=filler).unfold(-1, bag_size, 1).narrow(-2, first, length)

    slid = following(labels, ignore_index, 0 if shifted else 1)
    if cu_seqlens is None:
        return slid
    document = _document_starts("labels", labels, cu_seqlens).cumsum(-1, dtype=torch.int32)
    return torch.where(following(document, -1, 1) == document.unsqueeze(-1), slid, ignore_index)


def bag_positions(
    input_ids: Tensor,
    bag_size: int,
    *,
    cu_seqlens: Tensor,
    num_bags: int | None = None,
) -> Tensor:
    """Number the bags of `fold_inputs` in each document, from 0: `[..., L] -> [..., l]`, int64.

    Rotary embeddings want these positions. A document begins where they are 0, and `(positions == 0).cumsum(-1)` are
    the document numbers of a mask. An empty bag is a document of its own.

    Args:
        input_ids, bag_size, cu_seqlens, num_bags: as in `fold_inputs`.

    Raises:
        TypeError, ValueError: as in `fold_inputs`.
    """
    _check_fold("input_ids", input_ids, bag_size, divides=False)
    bag, slot, position, bags = _document_bags("input_ids", input_ids, bag_size, cu_seqlens, num_bags)
    first = torch.where(slot == 0, bag, -1)
    return _scatter_bags(position // bag_size, first, slot, 1, bags, 0).squeeze(-1)


def cu_bags(positions: Tensor) -> Tensor:
    """Find where documents begin and end, counted in bags: `[..., l] -> [D + 1]`, int32, for variable-length attention.

    Document i holds the bags `[out[i], out[i + 1])` of the flattened `[..., l]`. A document also ends with its
    sequence. Reading the number of documents waits for the device.

    Args:
        positions: int64 or int32, as `bag_positions` gives them.

    Raises:
        TypeError: `positions` is not int64 or int32.
        ValueError: `positions` is 0-d.
    """
    _check_fold("positions", positions, 1)
    starts = positions == 0
    starts[..., :1] = True
    return F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel()).to(torch.int32)


def _document_bags(
    name: str, tokens: Tensor, bag_size: int, cu_seqlens: Tensor, num_bags: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Find each token's bag in its sequence, slot in the bag and position in its document; and the number of bags."""
    if num_bags is not None:
        check_integer("num_bags", num_bags, 1)
    starts = _document_starts(name, tokens, cu_seqlens)
    t = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    position = t - torch.where(starts, t, 0).cummax(-1).values if t.shape[-1] else t
    slot = position % bag_size
    bag = (slot == 0).cumsum(-1) - 1  # [..., L], as slot and position
    if num_bags is None:
        num_bags = int(bag.max()) + 1 if bag.numel() else 0
    return bag, slot, position, num_bags


def _document_starts(name: str, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mark the tokens with which documents begin, `[..., L]` bool. Each sequence begins one, marked or not."""
    check_tensor("cu_seqlens", cu_seqlens, INTEGER)
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens: expected [D + 1], got shape {tuple(cu_seqlens.shape)}")
    if is_readable(cu_seqlens):
        ends = cu_seqlens[:1].tolist() + cu_seqlens[-1:].tolist()
        if ends != [0, tokens.numel()] or bool((cu_seqlens.diff() < 0).any()):
            got = cu_seqlens.tolist() if len(cu_seqlens) < 20 else ends
            raise ValueError(
                f"cu_seqlens: expected offsets that rise from 0 to {name}.numel() = {tokens.numel()}, got {got}"
            )
    starts = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
    return starts.index_fill(0, cu_seqlens.to(tokens.device, torch.int64), True)[:-1].view(tokens.shape)


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
    progress: float | Tensor | None = None,
    start: str | None = None,
    fitted: tuple[float, float, float] = FITTED,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the weights w_i of the bag positions i = 1..s in the loss, `[s]`. Only their ratios matter.

    `"uniform"`: 1. `"power_law"`: 1 / i. `"exponential"`: exp(-i). `"first"`: 1, 0, ..., 0. `"fitted"`: C0 + a i**k,
    (C0, a, k) = `fitted`. The paper finds uniform best for small bags (s = 4), the power law from s = 8 on, and the
    fitted weights slightly better than 1 / i.

    `"annealed"` interpolates from the weights named `start`, by default uniform, to `"first"`: w_1 = 1, and (1 - p)
    start_i / start_1 for i > 1, with p = `progress`, a number or a 0-d tensor from 0 to 1. A tensor is read only on the
    CPU, and does not compile a step again when it changes. The result is on its device unless `device` is given.

    Raises:
        TypeError: `progress` is a tensor of another kind than floating point or integer.
        ValueError: unknown name, `bag_size` below 1, `progress` missing or not from 0 to 1, or it or `start` given for
            another name.

    Source: arXiv 2605.06546, the ablation of position weights.
    """
    check_integer("bag_size", bag_size, 1)
    if isinstance(progress, Tensor):
        check_tensor("progress", progress, FLOATING + INTEGER)
        if progress.dim():
            raise ValueError(f"progress: expected a number or a 0-d tensor, got shape {tuple(progress.shape)}")
        device = device or progress.device
    i = torch.arange(1, bag_size + 1, device=device, dtype=torch.promote_types(dtype, torch.float32))
    if name != "annealed":
        for argument, given in (("progress", progress), ("start", start)):
            if given is not None:
                raise ValueError(f"{argument}: only with 'annealed', got {given!r} with {name!r}")
        return _named_weights("position_weights", name, i, fitted).to(dtype)
    values: Any = values_of(progress) if isinstance(progress, Tensor) else [progress]
    for value in values or ():
        check_number("progress", value, 1)
    begin = _named_weights("start", start or "uniform", i, fitted)
    rest: Any = 1 - (progress.to(i) if isinstance(progress, Tensor) else progress)  # type: ignore[operator]
    return torch.where(i == 1, 1, rest * begin / begin[0]).to(dtype)


def _named_weights(argument: str, name: str, i: Tensor, fitted: tuple[float, float, float]) -> Tensor:
    if name == "uniform":
        return torch.ones_like(i)
    if name == "power_law":
        return 1 / i
    if name == "exponential":
        return torch.exp(-i)
    if name == "first":
        return (i == 1).to(i.dtype)
    if name == "fitted":
        c0, a, k = fitted
        return c0 + a * i**k
    names = "'uniform', 'power_law', 'exponential', 'first' or 'fitted'"
    if argument != "start":
        names += ", or 'annealed' with a progress"
    raise ValueError(f"{argument}: expected {names}, got {name!r}")


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
        if given == "annealed":
            raise ValueError(
                "position_weights: 'annealed' needs a progress, so pass the tensor that "
                f'tst_ext.position_weights("annealed", {bag_size}, progress=...) returns'
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        return position_weights(given, bag_size, device=like.device, dtype=dtype)
    check_constant_weights(given, bag_size)
    for i, w in enumerate(values_of(given) or ()):
        if not 0 <= w <= torch.finfo(torch.float32).max:
            raise ValueError(f"position_weights[{i}]: expected a finite float32 number >= 0, got {w}")
    return moved("position_weights", given, like.device)


def check_label_weights(given: Tensor, labels: Tensor) -> None:
    check_tensor("label_weights", given, (*FLOATING, *INTEGER, torch.bool))
    check_same_device(labels=labels, label_weights=given)
    if given.shape != labels.shape or given.requires_grad:
        raise ValueError(
            f"label_weights: expected a constant tensor of the shape of labels, {tuple(labels.shape)}, got shape "
            f"{tuple(given.shape)}, requires_grad={given.requires_grad}"
        )
    if is_readable(given) and given.numel():
        least, most = (float(value) for value in given.aminmax())  # of a NaN both are NaN
        if not 0 <= least <= most <= torch.finfo(torch.float32).max:
            got = "a NaN" if least != least else f"numbers from {least} to {most}"
            raise ValueError(f"label_weights: expected finite float32 numbers >= 0, got {got}")


def bag_entropy(
    labels: Tensor,
    *,
    ignore_index: int = -100,
    position_weights: str | Tensor | None = None,
    label_weights: Tensor | None = None,
) -> Tensor:
    """Compute the entropy in nats of each bag's label distribution: `[..., s] -> [...]`, float32.

    A label's probability is its share of the bag's weights, and equal labels count together. The multi-hot
    cross-entropy of a bag, a mean by the same weights, is never below its entropy, and reaches it where the model
    predicts that distribution. The loss minus this entropy is the Kullback-Leibler divergence. It can be compared
    across bag sizes and with next-token loss, whose entropy is 0. A bag without a label that weighs something has 0.

    Args:
        labels: int64 or int32, `[..., s]`.
        ignore_index: labels that count for nothing.
        position_weights: by name or as a tensor `[s]`, as in the losses.
        label_weights: as in the losses, `[..., s]`.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: weights of another shape, or, on the CPU, below 0 or not finite.
    """
    _check_fold("labels", labels, 1)
    if labels.shape[-1] < 1:
        raise ValueError(f"labels: expected [..., s] with s >= 1, got shape {tuple(labels.shape)}")
    check_integer("ignore_index", ignore_index)
    given = resolved_position_weights(position_weights, labels.shape[-1], labels)
    wide = torch.float32 if labels.device.type == "mps" else torch.float64  # holds any product and sum of weights
    weights = torch.ones(labels.shape, dtype=wide, device=labels.device)
    if given is not None:
        weights = weights * given
    if label_weights is not None:
        check_label_weights(label_weights, labels)
        weights = weights * label_weights
    ordered, order = labels.sort(-1)
    token = F.pad((ordered.diff(dim=-1) != 0).cumsum(-1), (1, 0))  # [..., s]: a number below s for each other label
    weights = torch.where(labels == ignore_index, 0, weights).gather(-1, order)
    sums = torch.zeros_like(weights).scatter_add(-1, token, weights)
    total = sums.sum(-1, keepdim=True)
    return torch.special.entr(sums / torch.where(total > 0, total, 1)).sum(-1).float()
