"""Make the batch of a step in each phase, and read ahead of the loop in a thread."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..bags import document_offsets, fold_inputs, fold_labels, slide_labels
from .config import TrainConfig
from .data import Shard
from .files import UserError, check
from .order import EpochOrder, tokens_needed
from .tokens import phases

T = TypeVar("T")
PADDING = -100  # in empty slots of bags, on both sides


@dataclass(frozen=True)
class Batch:
    """Hold one process's share of a step's batch."""

    ids: Tensor  # [b, l] tokens or [b, l, s] bags
    labels: Tensor  # [b, l] or [b, l, s]
    counts: list[int]  # for each of the s bag positions how many of its labels count
    tokens: int  # data tokens read


def check_batches(config: TrainConfig, training: Shard, world: int) -> None:
    """Raise UserError if `world` processes cannot make the batches of `config` from `training`."""
    share, rest = divmod(config.batch, world)
    check("batch", config.batch, rest == 0, f"a multiple of the {world} processes")
    micro_batch, options = config.run.micro_batch or share, config.superposition
    check("micro_batch", micro_batch, share % micro_batch == 0, f"a divisor of the {share} sequences per process")
    if not options.straddle and training.end_of_text is None:
        raise UserError(f"straddle: shard {training.name}: its end-of-text token is not known (--end-of-text)")
    lengths = [_window(config, s) for s in (1, *options.bag_sizes())]
    if config.order == "epoch":
        lengths.append(tokens_needed(config.latent_tokens, _lookahead(config), _stages(config)) - 1)
    training.check_length(max(lengths))


def _window(config: TrainConfig, bag_size: int) -> int:
    """Return the tokens of a sequence in the data, without the labels of its last position."""
    options = config.superposition
    if options.sides == "output":
        return config.latent_tokens + bag_size - 1  # the last position's bag of labels reaches beyond it
    return config.latent_tokens * (bag_size if options.scale == "sequence" else 1)


def _lookahead(config: TrainConfig) -> int:
    """Return how many tokens after a sequence its labels need, at most."""
    return max(config.superposition.bag_sizes(), default=1) if config.superposition.sides == "output" else 1


def _stages(config: TrainConfig) -> list[tuple[int, int, int]]:
    """Return of each stage its steps, sequences per step, and windows of `latent_tokens` tokens per sequence."""
    scale, sides = config.superposition.scale, config.superposition.sides
    return [
        (steps, config.batch * (s if scale == "batch" else 1), s if scale == "sequence" and sides != "output" else 1)
        for _, steps, s in phases(config)
    ]


@lru_cache(maxsize=4)
def epoch_order(config: TrainConfig, tokens: int) -> EpochOrder:
    """Return where the sequences of a run on a shard of so many tokens begin."""
    return EpochOrder(tokens, config.latent_tokens, _lookahead(config), config.seed, _stages(config))


def read_batch(shard: Shard, config: TrainConfig, bag_size: int, step: int, rank: int = 0, world: int = 1) -> Batch:
    """Read this process's share of the batch of `step`, a function of `step` and `config` alone.

    Both phases have equal FLOPs: bags take s times longer sequences of tokens, or s times more sequences.
    """
    options, s = config.superposition, bag_size
    sequences = config.batch * (s if options.scale == "batch" else 1)
    share = sequences // world
    rows = slice(rank * share, (rank + 1) * share)
    if config.order == "epoch":
        starts = epoch_order(config, len(shard)).starts(step, rows)
        ids, labels = shard.sequences(starts, _window(config, s))
    else:
        ids, labels = shard.batch(config.seed, step, sequences, _window(config, s), rows)
    if s > 1 and options.sides == "output":
        if options.straddle:
            labels = slide_labels(labels, s, shifted=True)
        else:
            assert shard.end_of_text is not None
            text = torch.cat((ids[:, :1], labels), 1)  # with the last label, which may be of the last document
            labels = slide_labels(text, s, shifted=False, cu_seqlens=document_offsets(text, shard.end_of_text))
        ids, labels = ids[:, : config.latent_tokens], labels[:, : config.latent_tokens]
    elif s > 1:
        folds: dict[str, Any] = {}
        if not options.straddle:
            assert shard.end_of_text is not None
            # The fold keeps its shape: what short bags displace is dropped.
            folds = {"cu_seqlens": document_offsets(ids, shard.end_of_text), "num_bags": ids.shape[1] // s}
        ids, labels = fold_inputs(ids, s, **folds), fold_labels(labels, s, shifted=True, **folds)
        if options.sides == "input":
            labels = labels[..., 0]  # the first token of the next bag is the next token
    # Without documents all sequences are alike. NumPy's count takes 60 us less than torch's.
    counted, times = (labels[:1], len(labels)) if options.straddle else (labels, 1)
    counts = np.atleast_1d(np.count_nonzero(counted.numpy() != PADDING, axis=(0, 1))) * times
    tokens = ids.numel() if options.straddle else np.count_nonzero(ids.numpy() != PADDING)
    return Batch(ids.contiguous(), labels.contiguous(), counts.tolist(), int(tokens))


@contextmanager
def ahead(read: Callable[[int], T], start: int, stop: int, depth: int = 8) -> Iterator[Iterator[T]]:
    """Yield an iterator of `read(start)`, ..., `read(stop - 1)`, read by a thread while the loop works.

    The thread fills up to `depth` items as soon as half of them are gone. It costs 2 % of a small model's step of 17 ms
    on two cores; woken for every item it finds cold caches and costs 5 %. An exception in it is raised where its item
    would have come. It ends with the context, because a thread at work would abort the interpreter's shutdown.
    """
    items: deque[T | BaseException] = deque()
    changed = threading.Condition()
    closed = False

    def put(item: T | BaseException) -> None:
        with changed:
            items.append(item)
            changed.notify()
            if len(items) >= depth:
                changed.wait_for(lambda: closed or len(items) <= depth // 2)

    def work() -> None:
        try:
            for step in range(start, stop):
                if closed:
                    return
                put(read(step))
        except BaseException as error:
            put(error)

    def results() -> Iterator[T]:
        for _ in range(start, stop):
            with changed:
                changed.wait_for(lambda: items)
                item = items.popleft()
                if len(items) == depth // 2:
                    changed.notify()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        yield results()
    finally:
        with changed:
            closed = True
            changed.notify()
        thread.join()
