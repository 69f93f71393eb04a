"""An epoch reads every window once, in a random order, across the stages of a run."""

import numpy as np
import pytest

from tst_ext.train.order import EpochOrder, permute, tokens_needed

LENGTH, LOOKAHEAD, N = 3, 2, 48
TOKENS = N * LENGTH + LOOKAHEAD + 2  # leaves over 2 tokens
CHAINS = {  # widths of the stages: windows that each stage's permutation must move as one
    (4, 1): (4, 1),
    (8, 4, 2, 1): (8, 4, 2, 1),
    (6, 1): (6, 1),
    (2, 8, 1): (8, 8, 1),
    (6, 4, 1): (12, 4, 1),
    (2, 1, 4): (4, 4, 4),
}


def permutations(size, keys):
    """One permutation of each of that many successive keys: [keys, size]."""
    key = np.repeat(np.random.default_rng(0).integers(2**63) + np.arange(keys), size).astype(np.uint64)
    index = np.tile(np.arange(size), keys)
    return permute(index, np.full(index.shape, size), key).reshape(keys, size)


def epochs(order, stages, groups):
    """Yield of each epoch the (width, start) read in it and the windows skipped, by counting what is read."""
    reads, used, skipped, step = [], 0, 0, 0
    for (steps, _, width), group in zip(stages, groups, strict=True):
        for _ in range(steps):
            for start in order.starts(step):
                if used == N:
                    yield reads, skipped
                    reads, used, skipped = [], 0, 0
                reads.append((width, int(start)))
                used += width
            step += 1
        skipped += -used % group
        used += -used % group
    yield reads, skipped


class TestPermutation:
    @pytest.mark.parametrize("sizes", [range(1, 301), [2**k + d for k in (9, 10, 16, 17) for d in (-1, 0, 1)]])
    def test_is_one(self, sizes):
        for n in sizes:
            for values in permutations(n, 3):
                assert np.array_equal(np.sort(values), np.arange(n)), n

    @pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 9, 16, 25, 33, 48, 100])
    def test_looks_random(self, n):
        keys, bias = 20_000, 0.04 if n < 48 else 0  # eight rounds mix the smallest sizes less well
        values = permutations(n, keys)
        # A statistic lies 5 standard deviations from its mean once in 10**6 times.
        counts = np.stack([np.bincount(column, minlength=n) for column in values.T])  # of each value at each position
        freedom = (n - 1) ** 2
        chi_square = ((counts - keys / n) ** 2).sum() / (keys / n)
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5 + keys * n * bias**2
        for places in (values == np.arange(n), values[1:] == values[:-1]):  # fixed points, and equal for two keys
            assert abs(places.sum(1).mean() - 1) < 5 / keys**0.5
        chance = keys * (n - 1) / n
        for difference in (1, -1):
            neighbours = np.count_nonzero(np.diff(values, axis=1) == difference)
            assert n < 8 or abs(neighbours - chance) < 5 * chance**0.5 + bias * chance


class TestEpochs:
    @pytest.mark.parametrize("width", [1, 4, 6])
    def test_one_stage_reads_every_window_once_per_epoch(self, width):
        stages = [(4 * N // width, 5, width)]  # batches of 5 span epochs
        order = EpochOrder(TOKENS, LENGTH, LOOKAHEAD, 0, stages)
        assert order.windows == N and order.epochs == 20
        orders = set()
        for reads, _ in epochs(order, stages, [width]):
            starts = np.array([start for _, start in reads])
            offset = starts.min()
            assert np.array_equal(np.sort(starts) - offset, np.arange(N // width) * width * LENGTH)
            assert 0 <= offset <= 2
            orders.add(tuple(starts - offset))
        assert len(orders) == 20

    @pytest.mark.parametrize("widths", CHAINS, ids=str)
    @pytest.mark.parametrize("end", ["start", "middle", "near the end", "end", "third epoch"])
    def test_stages_share_an_epoch(self, widths, end):
        first = dict(start=1, middle=N // 12 * 6 // widths[0] + 1, end=N // widths[0])
        first |= {"near the end": first["end"] - 1, "third epoch": 2 * first["end"] + first["middle"]}
        stages = [(first[end], 1, widths[0]), *((1, 3, u) for u in widths[1:-1]), (2 * N // 5, 5, widths[-1])]
        order = EpochOrder(TOKENS, LENGTH, LOOKAHEAD, 1, stages)
        *whole, _ = epochs(order, stages, CHAINS[widths])
        assert len(whole) >= 2 and {u for reads, _ in whole for u, _ in reads} == set(widths)
        for reads, skipped in whole:
            starts = [start for _, start in reads]
            count = np.zeros(TOKENS, int)  # how often each token is read
            for width, start in reads:
                assert 0 <= start <= TOKENS - LOOKAHEAD - width * LENGTH
                count[start : start + width * LENGTH] += 1
            assert count.max() == 1 and count.sum() == (N - skipped) * LENGTH
            assert np.ptp(np.flatnonzero(count)) < N * LENGTH and len({start % LENGTH for start in starts}) == 1
            if all(a % b == 0 for a, b in zip(widths, widths[1:], strict=False)):
                assert skipped == 0

    def test_recovery_is_shuffled(self):
        stages = [(256, 8, 8), (1024, 16, 1)]  # half of 2**15 windows each
        order = EpochOrder(2**15 * LENGTH, LENGTH, 0, 0, stages)
        for steps, width in ((range(256), 8), (range(256, 1280), 1)):
            starts = np.stack([order.starts(step) for step in steps]) // (width * LENGTH)  # [steps, rows]
            # Of at most 2**14 pairs of neighbours one in 1000 falls into one batch by chance, 16.
            assert np.count_nonzero(np.diff(np.sort(starts)) == 1) < 16 + 5 * 4
            assert abs(np.corrcoef(starts.ravel(), np.arange(starts.size))[0, 1]) < 5 / starts.size**0.5

    def test_every_offset_occurs(self):
        stages = [(100, 1, 4)]
        order = EpochOrder(4 * LENGTH + 5, LENGTH, 0, 0, stages)
        assert {int(order.starts(step)[0]) for step in range(100)} == {0, 1, 2, 3, 4, 5}


class TestSteps:
    STAGES = [(0, 7, 5), (9, 12, 4), (20, 24, 1)]

    def order(self, tokens=TOKENS, length=LENGTH, seed=0, stages=STAGES):
        return EpochOrder(tokens, length, LOOKAHEAD, seed, stages)

    def test_a_step_depends_on_nothing_read_before(self):
        forward = [self.order().starts(step).tolist() for step in range(29)]
        order = self.order()
        assert [order.starts(step).tolist() for step in reversed(range(29))] == forward[::-1]
        assert [order.starts(step).tolist() for step in range(29)] == forward

    @pytest.mark.parametrize("world", [1, 2, 3, 4])
    def test_shares_of_the_processes_are_the_batch(self, world):
        for step in range(29):
            whole = self.order().starts(step)
            share = len(whole) // world
            parts = [self.order().starts(step, slice(i * share, (i + 1) * share)) for i in range(world)]
            assert np.array_equal(np.concatenate(parts), whole) and len(whole) == (12 if step < 9 else 24)

    def test_seeds_differ(self):
        batches = {tuple(self.order(seed=seed).starts(step)) for seed in (0, 1, 2, 2**63 - 1) for step in (0, 28)}
        assert len(batches) == 8

    def test_empty_stages_are_left_out(self):
        assert self.order().windows == N
        assert self.order().starts(12).tolist() == self.order(stages=self.STAGES[1:]).starts(12).tolist()

    def test_shortest_shard(self):
        tokens = tokens_needed(LENGTH, LOOKAHEAD, self.STAGES)
        assert tokens == 4 * LENGTH + LOOKAHEAD
        order = self.order(tokens)
        assert order.windows == 4 and order.epochs == 9 * 12 + 20 * 24 / 4
        assert order.starts(3).tolist() == [0] * 12
        batch = order.starts(20).reshape(6, 4)  # six epochs
        assert np.array_equal(np.sort(batch), np.tile(np.arange(4) * LENGTH, (6, 1)))

    @pytest.mark.parametrize("length", [1, 1000])
    def test_huge_shard(self, length):
        tokens = 10**13
        steps = tokens // length // 4096
        stages = [(steps, 512, 4), (3 * steps, 2048, 1)]  # half of the first epoch, then to the end of the second
        order = self.order(tokens, length, stages=stages)
        for step in (0, steps - 1, steps, 2 * steps - 1, 4 * steps - 1):
            starts = order.starts(step)
            assert starts.dtype == np.int64 and len(np.unique(starts)) == len(starts)
            assert starts.min() >= 0 and starts.max() <= tokens - LOOKAHEAD - length
            assert abs(starts.mean() / tokens - 0.5) < 5 / (12 * len(starts)) ** 0.5


@pytest.mark.parametrize(
    ("stages", "others", "first"),
    [
        ([(5, 2, 4), (9, 2, 1)], [(5, 2, 4), (30, 2, 1)], np.inf),
        ([(5, 2, 4)], [(5, 2, 4), (30, 2, 1)], 5),
        ([(5, 2, 4), (9, 2, 1)], [(7, 2, 4), (7, 2, 1)], 5),
        ([(5, 2, 4), (3, 2, 2), (9, 2, 1)], [(5, 2, 4), (6, 2, 2), (9, 2, 1)], 8),
        ([(5, 2, 4), (9, 2, 1)], [(5, 2, 4), (4, 2, 8), (5, 2, 1)], 0),
    ],
)
def test_two_orders_agree_until_their_first_difference(stages, others, first):
    a, b = (EpochOrder(TOKENS, LENGTH, LOOKAHEAD, 3, each) for each in (stages, others))
    assert a.first_difference(b) == b.first_difference(a) == first
    same = [np.array_equal(a.starts(step), b.starts(step)) for step in range(14)]
    assert same == [step < first for step in range(14)]
