"""Choose where in the shard each sequence of a step begins, so that an epoch reads every window once.

A window is l tokens, the sequence of the recovery phase. A sequence of the superposition phase is u adjacent windows.
An epoch is N slots, read from the first to the last. A random permutation maps slots to windows. It is computed slot
by slot and needs no table, so a step costs the same for a shard of any length, and a run can resume at any step.

When a stage begins within an epoch, its permutation shuffles the slots that are left. The permutation of the stage
before then maps the shuffled slots to windows. So the new stage reads just what the old one left, in a new order:

    slots           0 1 2 3 4 5 6 7
    superposition   4 5 0 1 6 7 2 3     the windows in these slots: pairs are shuffled; the stage ends after slot 3
    recovery                3 6 2 7     the four windows that are left are shuffled one by one
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

# Rounds of the Feistel network. With 8, neighbours stay neighbours at most 4 % more often than by chance (16 windows),
# less than 1 % from 48 windows on. With 6 it is 13 % and 10 %. With 4 it is 85 % even for 1000 windows.
ROUNDS = 8
# 0-d arrays, because NumPy takes twice as long where an operand is a scalar.
ONE, SHIFT_16, SHIFT_27, SHIFT_30, SHIFT_31 = (np.array(i, np.uint64) for i in (1, 16, 27, 30, 31))
GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)
FACTOR_1, FACTOR_2 = np.array(0xBF58476D1CE4E5B9, np.uint64), np.array(0x94D049BB133111EB, np.uint64)


@dataclass(frozen=True)
class _Stage:
    first_step: int
    sequences: int  # per step
    width: int  # u, windows per sequence
    group: int  # G, windows that the stage's permutation moves as one, so that later stages find whole sequences
    begin: int  # the stage's first slot, counted from the beginning of the run
    key: np.ndarray  # 0-d uint64


class EpochOrder:
    """Give the positions of the sequences of each step, as a function of the arguments and the step alone.

    Within an epoch, no token is read twice, even if several stages share it. Every window is read, with one exception:
    fewer than G windows are skipped at the end of a stage whose u is no multiple of each later u. G is the least common
    multiple of its u and the later ones. A step may read the end of an epoch and the beginning of the next. Each epoch
    begins at a random offset within the tokens that N windows leave over.

    Args:
        tokens: length of the shard, at least `tokens_needed` of the other arguments.
        length: l, tokens per window.
        lookahead: tokens after a sequence that its labels need.
        seed: in `[0, 2**63)`.
        stages: (steps, sequences per step, windows per sequence) of each stage, in order. Stages of 0 steps are left
            out, and steps beyond the last stage continue it.

    Attributes:
        windows: N, windows per epoch.
        epochs: how many epochs the whole run reads.
    """

    def __init__(
        self, tokens: int, length: int, lookahead: int, seed: int, stages: Sequence[tuple[int, int, int]]
    ) -> None:
        stages = [stage for stage in stages if stage[0] > 0]
        unit = _unit(stages)
        self.length = length
        self.windows = (tokens - lookahead) // (unit * length) * unit
        self.offsets = tokens - lookahead - self.windows * length + 1  # of an epoch's first window: 0 to offsets - 1
        self.epochs: float = sum(steps * sequences * width for steps, sequences, width in stages) / self.windows
        keys = _random(np.array(seed, np.uint64), np.arange(len(stages) + 1))
        self.offset_key = keys[0, ...]
        self.stages: list[_Stage] = []
        first_step = begin = 0
        for i, (steps, sequences, width) in enumerate(stages):
            group = _unit(stages[i:])
            self.stages.append(_Stage(first_step, sequences, width, group, begin, keys[i + 1, ...]))
            first_step += steps
            begin += -(-steps * sequences * width // group) * group  # rounded up: the next stage gets whole groups

    def starts(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Return the position of the first token of each of the `rows` sequences of the batch of `step`, int64."""
        number = bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1
        stage = self.stages[number]
        sequence = (step - stage.first_step) * stage.sequences + np.arange(stage.sequences)[rows]
        epoch, slot = np.divmod(stage.begin + sequence * stage.width, self.windows)
        offset = _random(self.offset_key, epoch) % np.uint64(self.offsets)
        return offset.astype(np.int64) + self._window(number, epoch, slot) * self.length

    def first_difference(self, other: "EpochOrder") -> float:
        """Return the first step whose sequences begin elsewhere in `other`, an order of the same shard, or inf."""
        if (self.windows, self.offsets) != (other.windows, other.offsets):
            return 0
        for mine, its in zip_longest(self.stages, other.stages):
            if mine != its:
                return min(stage.first_step for stage in (mine, its) if stage)
        return math.inf

    def _window(self, number: int, epoch: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Return the windows that stage `number` reads in the slots of the epochs; all are `[rows]` int64."""
        stage = self.stages[number]
        begin = np.maximum(stage.begin - epoch * self.windows, 0)  # the stage's first slot in that epoch
        group, rest = np.divmod(slot - begin, stage.group)
        group = permute(group, (self.windows - begin) // stage.group, _random(stage.key, epoch))
        slot = begin + group * stage.group + rest
        shared = begin > 0  # the stage before read the beginning of that epoch
        if shared.any():
            slot[shared] = self._window(number - 1, epoch[shared], slot[shared])
        return slot


def tokens_needed(length: int, lookahead: int, stages: Sequence[tuple[int, int, int]]) -> int:
    """Return the length of the shortest shard that `EpochOrder` takes with these arguments, in tokens."""
    return _unit(stages) * length + lookahead


def _unit(stages: Sequence[tuple[int, int, int]]) -> int:
    """Return the fewest windows that each of the stages can divide into sequences."""
    return math.lcm(*(width for steps, _, width in stages if steps > 0))


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return where the pseudorandom permutation `key` of `[0, size)` takes `index`.

    All are `[rows]`: index and size int64 below 2**48, key uint64. Returns int64.

    Source: the generalised Feistel cipher with cycle walking, Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002. It permutes the pairs (left, right) with left < a and right < b, where a * b is about the size. The
    few indices that land in `[size, a * b)` are permuted again until they leave it.
    """
    n = size.astype(np.uint64)
    a = np.ceil(np.sqrt(n)).astype(np.uint64)
    b = (n + a - ONE) // a
    keys = _random(key, np.arange(ROUNDS)[:, None])  # [ROUNDS, rows]
    left, right = np.divmod(index.astype(np.uint64), b)
    for i in range(0, ROUNDS, 2):
        left = (left + _round(keys[i], right)) % a
        right = (right + _round(keys[i + 1], left)) % b
    result = (left * b + right).astype(np.int64)
    outside = result >= size
    if outside.any():
        result[outside] = permute(result[outside], size[outside], key[outside])
    return result


def _round(key: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return a pseudorandom function of half an index, in 48 bits: the other half can be added without overflow."""
    x = (key + half) * FACTOR_1
    x = (x ^ (x >> SHIFT_31)) * FACTOR_2
    return x >> SHIFT_16


def _random(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Return number `counter` of the SplitMix64 sequence (Steele et al., 2014) with the seed `key`, uint64."""
    x = key + (counter.astype(np.uint64) + ONE) * GOLDEN
    x = (x ^ (x >> SHIFT_30)) * FACTOR_1
    x = (x ^ (x >> SHIFT_27)) * FACTOR_2
    return x ^ (x >> SHIFT_31)
