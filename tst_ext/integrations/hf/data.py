"""Turn rows and batches of Transformers into bags."""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ... import fold_inputs, fold_labels

__all__ = ["SampleStream", "Samples", "fold_batch"]

PADDING = -100  # in empty slots of bags, of ids and labels alike


def fold_batch(batch: dict[str, Any], bag_size: int, objective: str = "mce") -> dict[str, Any]:
    """Fold a batch of a collator into bags, for a model after `superpose`.

    Args:
        batch: input_ids, labels (`labels[t]` is `input_ids[t]`, or -100) and perhaps attention_mask, each `[B, L]`. L
            need not be a multiple of s.
        bag_size: s.
        objective: the objective of the loss.

    Returns:
        input_ids and labels `[B, ceil(L / s), s]`, with -100 in slots of padding; attention_mask `[B, ceil(L / s)]`;
        shift_labels, in which Trainer counts `num_items_in_batch`: the labels, or for "mce_alt" one per bag.

    Raises:
        ValueError: the batch has other tensors, or lacks one of these.
    """
    unknown = batch.keys() - {"input_ids", "labels", "attention_mask"}
    if unknown or not {"input_ids", "labels"} <= batch.keys():
        raise ValueError(f"batch: expected input_ids, labels and perhaps attention_mask, got {sorted(batch)}")
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    short = -ids.shape[-1] % bag_size
    if mask is not None:
        ids = torch.where(mask == 0, PADDING, ids)
    ids, labels = (F.pad(t, (0, short), value=PADDING) for t in (ids, labels))
    labels = fold_labels(labels, bag_size, shifted=False, ignore_index=PADDING)
    counted = labels.amax(-1) if objective == "mce_alt" else labels
    folded = {"input_ids": fold_inputs(ids, bag_size), "labels": labels, "shift_labels": counted}
    if mask is not None:
        folded["attention_mask"] = fold_inputs(F.pad(mask, (0, short)).long(), bag_size).amax(-1)
    return folded


def _join(rows: list[dict[str, Any]], columns: set[str] | None) -> dict[str, Any]:
    """Join the lists or tensors of each column."""
    joined: dict[str, Any] = {}
    for name in rows[0].keys() if columns is None else rows[0].keys() & columns:
        parts = [row[name] for row in rows]
        if len(rows) == 1:
            joined[name] = parts[0]
        elif all(isinstance(part, list) for part in parts):
            joined[name] = [t for part in parts for t in part]
        else:
            try:
                joined[name] = torch.cat([torch.as_tensor(part) for part in parts])
            except (TypeError, RuntimeError) as error:
                raise TypeError(f"train_dataset: expected a list or tensor as {name!r}, got {parts[0]!r}") from error
    return joined


class Samples(Dataset):
    """Read a dataset in samples: `bag_size` rows each for i < `bagged`, one row each afterwards, pass after pass.

    A sample depends on i alone, so skipping samples to resume a run costs nothing.
    """

    def __init__(
        self, rows: Any, columns: set[str] | None, bag_size: int, bagged: int, total: int, shuffle: int | None
    ) -> None:
        if len(rows) < bag_size:
            raise ValueError(f"train_dataset: expected at least bag_size = {bag_size} rows, got {len(rows)}")
        self.rows, self.columns, self.bag_size = rows, columns, bag_size
        self.bagged, self.total, self.shuffle = bagged, total, shuffle
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))  # rows of the pass that was read last

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> dict[str, Any]:
        size = self.bag_size if i < self.bagged else 1
        first = min(i, self.bagged) * self.bag_size + max(0, i - self.bagged)
        number, place = divmod(first, len(self.rows) // self.bag_size * self.bag_size)
        if self.order[0] != number:
            self.order = (number, self._order(number))
        return _join([self.rows[k] for k in self.order[1][place : place + size].tolist()], self.columns)

    def _order(self, number: int) -> Tensor:
        """Order the rows of pass `number`: groups at random as far as bags read them, then single rows at random."""
        s = self.bag_size
        groups = len(self.rows) // s
        if self.shuffle is None:
            return torch.arange(groups * s)
        generator = torch.Generator().manual_seed(self.shuffle + number)
        order = (torch.randperm(groups, generator=generator).unsqueeze(1) * s + torch.arange(s)).flatten()
        rest = order[min(max(0, self.bagged * s - number * len(order)), len(order)) :]
        rest.copy_(rest[torch.randperm(len(rest), generator=generator)])
        return order


class SampleStream(IterableDataset):
    """Read an iterable dataset in samples, in its own order, and from its beginning again when it ends."""

    def __init__(self, rows: Any, columns: set[str] | None, bag_size: int, bagged: int) -> None:
        self.rows, self.columns, self.bag_size, self.bagged = rows, columns, bag_size, bagged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self._endless()
        for i in count():
            sample = list(islice(rows, self.bag_size if i < self.bagged else 1))
            if not sample:
                return
            yield _join(sample, self.columns)

    def _endless(self) -> Iterator[dict[str, Any]]:
        empty = False
        while not empty:
            empty = True
            for row in self.rows:
                empty = False
                yield row
