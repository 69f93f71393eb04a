"""Turn rows and batches of Transformers into bags."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ... import fold_inputs, fold_labels

__all__ = ["CollateGroups", "SampleStream", "Samples", "fold_batch", "join_rows"]

PADDING = -100  # in empty slots of bags, of ids and labels alike
ROWS = {"input_ids", "labels", "position_ids", "seq_idx"}  # [B, L]
KNOWN = ROWS | {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def fold_batch(batch: dict[str, Any], bag_size: int, objective: str = "mce") -> dict[str, Any]:
    """Fold a batch of a collator into bags, for a model after `superpose`.

    Padding, on whichever side, is taken out first: bags begin at the first token of a row. Documents that are packed
    into a row begin a bag each, and their last bag may be short. They begin where `position_ids` do not count on, where
    `seq_idx` changes, and at `cu_seq_lens_q`. So packed documents have the loss that they have apart.

    Args:
        batch: input_ids, labels (`labels[t]` is `input_ids[t]`, or -100) and perhaps attention_mask, each `[B, L]`; for
            packed rows position_ids and seq_idx `[B, L]`, or for one row what `DataCollatorWithFlattening` adds for
            FlashAttention. L need not be a multiple of s.
        bag_size: s.
        objective: the objective of the loss.

    Returns:
        input_ids and labels `[B, l, s]`, with -100 in empty slots; l is `ceil(L / s)`, or more where packed documents
        need it. attention_mask, position_ids, seq_idx `[B, l]`, and FlashAttention's numbers, of bags, if given. With
        several documents in a row there are position_ids and no attention_mask: so Transformers keeps them apart.
        shift_labels, in which Trainer counts `num_items_in_batch`: the labels, or for "mce_alt" one per bag.

    Raises:
        TypeError: labels that are not int64, which the model's own loss would refuse after the switch.
        ValueError: the batch has other tensors, lacks one of these, or has one of another shape.
    """
    batch = {name: value for name, value in batch.items() if value is not None}
    if batch.keys() - KNOWN or not {"input_ids", "labels"} <= batch.keys():
        wanted = "input_ids, labels and perhaps attention_mask, position_ids or others of packed rows"
        raise ValueError(f"batch: expected {wanted}, got {sorted(batch)}")
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    for name in batch.keys() & (ROWS | {"attention_mask"}):
        if batch[name].dim() != 2 or batch[name].shape != ids.shape:
            raise ValueError(
                f"{name}: expected [B, L] as input_ids, {tuple(ids.shape)}, got {tuple(batch[name].shape)}"
            )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, as the loss after the switch does, got {labels.dtype}; use .long()")
    tokens = {name: batch[name] for name in batch.keys() & ROWS}
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    holes = not bool(valid.all())
    if holes:
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)  # padding moves to the end
        valid, tokens = valid.gather(1, order), {name: t.gather(1, order) for name, t in tokens.items()}
    starts = _document_starts(batch, tokens, valid)
    bags = max(-(-ids.shape[1] // bag_size), 1)
    position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)  # in its document
    cu_seqlens = F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel())
    options: dict[str, Any] = {}
    if starts[:, 1:].any():  # else rows are folded as they are, without copies of each token
        position = position - torch.where(starts, position, 0).cummax(1).values
        bags = max(bags, int((valid & (position % bag_size == 0)).sum(1).max()))
        options = dict(cu_seqlens=cu_seqlens, num_bags=bags)

    def padded(values: Tensor) -> Tensor:
        values = torch.where(valid, values, PADDING) if holes else values
        return values if options else F.pad(values, (0, bags * bag_size - values.shape[1]), value=PADDING)

    def fold(values: Tensor) -> Tensor:
        return fold_inputs(padded(values), bag_size, padding_idx=PADDING, **options)

    labels = fold_labels(padded(tokens["labels"]), bag_size, shifted=False, ignore_index=PADDING, **options)
    folded: dict[str, Any] = {"input_ids": fold(tokens["input_ids"]), "labels": labels}
    folded["shift_labels"] = labels.amax(-1) if objective == "mce_alt" else labels
    used = (folded["input_ids"] != PADDING).any(-1)
    packed = bool((starts & valid)[:, 1:].any())
    if mask is not None and not packed:
        folded["attention_mask"] = used.long()
    if packed or "position_ids" in tokens:  # by which Transformers keeps documents apart, if there is no mask
        given = tokens.get("position_ids", position)
        first = torch.where(valid, given, given.max()).amin(1, keepdim=True) if given.numel() else 0
        folded["position_ids"] = torch.where(used, fold(first + position // bag_size)[..., 0], 0)
    if "seq_idx" in tokens:
        folded["seq_idx"] = torch.where(used, fold(tokens["seq_idx"])[..., 0], -1)
    lengths = -(-cu_seqlens.diff() // bag_size)  # of the documents, in bags
    for name in batch.keys() & {"cu_seq_lens_q", "cu_seq_lens_k"}:
        folded[name] = F.pad(lengths.cumsum(0), (1, 0)).to(batch[name].dtype)
    for name in batch.keys() & {"max_length_q", "max_length_k"}:
        folded[name] = int(lengths.max())
    return folded


def _document_starts(batch: dict[str, Any], tokens: dict[str, Tensor], valid: Tensor) -> Tensor:
    """Find the first token of each document, `[B, L]`; what is padding counts as a document of its own."""
    starts = valid != F.pad(valid[:, :-1], (1, 0), value=True)
    starts[:, :1] = True
    for name, step in (("position_ids", 1), ("seq_idx", 0)):
        if name in tokens:
            starts[:, 1:] |= tokens[name].diff(dim=1) != step
    for name in batch.keys() & {"cu_seq_lens_q", "cu_seq_lens_k"}:
        offsets = batch[name].long()
        rise = offsets[[0, -1]].tolist() == [0, valid.shape[1]] and bool((offsets.diff() >= 0).all())
        if len(valid) != 1 or "attention_mask" in batch or not rise:
            raise ValueError(
                f"{name}: expected offsets that rise from 0 to L, of one row without an attention_mask, got "
                f"{offsets.tolist()[:20]} for input_ids {tuple(valid.shape)}"
            )
        starts[0, offsets[offsets < valid.shape[1]]] = True
    return starts


def join_rows(batch: dict[str, Any], bag_size: int) -> dict[str, Any]:
    """Join each `bag_size` rows of a batch into one; a batch of one row, of packed documents, stays as it is.

    Raises:
        ValueError: the collator has made another number of rows.
    """
    rows = len(batch["input_ids"])
    if rows == 1:
        return batch
    if rows % bag_size:
        raise ValueError(f"data_collator: expected bag_size = {bag_size} rows for each sample, or one, got {rows} rows")
    return {name: t.reshape(rows // bag_size, -1) if isinstance(t, Tensor) else t for name, t in batch.items()}


class Group(list):
    """The rows of one sample."""


class CollateGroups:
    """Call a collator with the rows of all samples, and make ids and labels int64, as the model's own loss expects."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        rows = [row for sample in samples for row in (sample if isinstance(sample, Group) else [sample])]
        batch = self.collate(rows)
        for name in ("input_ids", "labels"):
            if name in batch and isinstance(batch[name], Tensor) and not batch[name].is_floating_point():
                batch[name] = batch[name].long()
        return batch


class Phases:
    """Which rows each sample reads: in samples, the stages of the superposition phase and then one row each."""

    def __init__(self, stage_ends: tuple[tuple[int, int], ...], samples_per_step: int) -> None:
        self.ends, before = [], 0
        for end, size in stage_ends:
            if end > before:
                self.ends.append((end * samples_per_step, size))
            before = end
        self.ends.append((2**62, 1))

    def size(self, i: int) -> int:
        return next(size for end, size in self.ends if i < end)

    def first_row(self, i: int) -> int:
        row = begin = 0
        for end, size in self.ends:
            row, begin = row + size * max(0, min(i, end) - begin), max(begin, end)
        return row

    def cuts(self, first: int, last: int) -> Tensor:
        """List the rows in `[first, last)` at which a sample begins."""
        cuts, row, begin = [], 0, 0
        for end, size in self.ends:
            after = row + size * (end - begin)
            low, high = row - (row - max(row, first)) // size * size, min(after, last)
            if low < high:
                cuts.append(torch.arange(low, high, size))
            row, begin = after, end
        return torch.cat(cuts) if cuts else torch.empty(0, dtype=torch.int64)


class Samples(Dataset):
    """Read a dataset in samples: neighbouring rows as many as its phase has, pass after pass, each row once a pass.

    A sample depends on i alone, so skipping samples to resume a run costs nothing. At the end of a pass a sample may
    take its last rows from the next one.
    """

    def __init__(self, rows: Any, columns: set[str] | None, phases: Phases, total: int, shuffle: int | None) -> None:
        most = max(size for _, size in phases.ends)
        if len(rows) < most:
            raise ValueError(f"train_dataset: expected at least bag_size = {most} rows, got {len(rows)}")
        self.rows, self.columns, self.phases, self.total, self.shuffle = rows, columns, phases, total, shuffle
        self.orders: dict[int, Tensor] = {}  # of the passes read last

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> Group:
        first = self.phases.first_row(i)
        sample = Group()
        for row in range(first, first + self.phases.size(i)):
            number, place = divmod(row, len(self.rows))
            if number not in self.orders:
                self.orders = {number - 1: self.orders.get(number - 1, torch.empty(0)), number: self._order(number)}
            sample.append(_select(self.rows[int(self.orders[number][place])], self.columns))
        return sample

    def _order(self, number: int) -> Tensor:
        """Order the rows of pass `number`, so that the rows of a sample are neighbours wherever the sample lies."""
        count = len(self.rows)
        if self.shuffle is None:
            return torch.arange(count)
        # The dataset is cut into pieces, one for each sample of this pass, which follow one another at random.
        first = number * count
        begins = torch.cat((torch.zeros(1, dtype=torch.int64), self.phases.cuts(first, first + count) - first)).unique()
        sizes = begins.diff(append=torch.tensor([count]))
        layout = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(self.shuffle + number))
        places = torch.empty_like(sizes)
        places[layout] = sizes[layout].cumsum(0) - sizes[layout]
        return torch.arange(count) + (places - begins).repeat_interleave(sizes)


class SampleStream(IterableDataset):
    """Read an iterable dataset in samples, in its own order, and from its beginning again when it ends."""

    def __init__(self, rows: Any, columns: set[str] | None, phases: Phases) -> None:
        self.rows, self.columns, self.phases = rows, columns, phases

    def __iter__(self) -> Iterator[Group]:
        rows = self._endless()
        for i in count():
            sample = Group(islice(rows, self.phases.size(i)))
            if not sample:
                return
            yield sample

    def _endless(self) -> Iterator[Any]:
        empty = False
        for epoch in count():
            if empty:
                return
            empty = True
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)  # as Trainer does: datasets then shuffles in another order
            for row in self.rows:
                empty = False
                yield _select(row, self.columns)


def _select(row: Any, columns: set[str] | None) -> Any:
    if columns is None or not isinstance(row, dict):
        return row
    if not row.keys() & columns:
        raise ValueError(
            f"train_dataset: expected a column that the model takes, got {sorted(row)}; set "
            "remove_unused_columns=False if the collator makes such columns"
        )
    return {name: row[name] for name in row.keys() & columns}
