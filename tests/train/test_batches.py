"""What a step reads in each phase, under each superposition option, and the thread that reads ahead."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch

from tst_ext.train.batches import PADDING, ahead, check_batches, read_batch
from tst_ext.train.config import DataConfig, SuperpositionConfig
from tst_ext.train.data import Shard
from tst_ext.train.files import UserError
from tst_ext.train.tokens import data_tokens

S = 4


@pytest.fixture
def shard(shards):
    return Shard(shards, "train")


@pytest.fixture
def documents(shards):
    """The shard with a name for its end of text: token 0, about every 40th."""
    header = json.loads((shards / "train.json").read_text())
    (shards / "train.json").write_text(json.dumps({**header, "end_of_text": 0}))
    return Shard(shards, "train")


def with_options(config, **options):
    return dataclasses.replace(config, superposition=SuperpositionConfig(bag_size=S, ratio=0.4, **options))


def start_of(shard, tokens):
    """Where in the shard a row of tokens is: it must be one place."""
    text = shard.read(0, len(shard))
    windows = np.lib.stride_tricks.sliding_window_view(text, len(tokens))
    (found,) = np.flatnonzero((windows == np.asarray(tokens)).all(1))
    return found


class TestSides:
    def test_both(self, tiny, shard):
        batch = read_batch(shard, with_options(tiny), S, 3)
        assert batch.ids.shape == batch.labels.shape == (4, 16, S)
        assert batch.tokens == 4 * 16 * S
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            start = start_of(shard, ids.flatten())
            assert labels[:-1].equal(ids[1:])
            # The last bag knows one token after it.
            assert labels[-1].tolist() == [*shard.read(start + 16 * S, 1), *[PADDING] * (S - 1)]
        assert batch.counts == [64, 60, 60, 60]

    def test_input(self, tiny, shard):
        both = read_batch(shard, with_options(tiny), S, 3)
        batch = read_batch(shard, with_options(tiny, sides="input"), S, 3)
        assert batch.ids.equal(both.ids) and batch.tokens == both.tokens
        assert batch.labels.equal(both.labels[..., 0])  # the next token after the bag
        assert batch.counts == [64]

    def test_output(self, tiny, shard):
        batch = read_batch(shard, with_options(tiny, sides="output"), S, 3)
        assert batch.ids.shape == (4, 16) and batch.labels.shape == (4, 16, S)
        assert batch.tokens == 4 * 16
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            text = shard.read(start_of(shard, ids), 16 + S)
            assert all(labels[t].tolist() == text[t + 1 : t + 1 + S].tolist() for t in range(16))
        assert batch.counts == [64] * S

    @pytest.mark.parametrize("sides", ["both", "input", "output"])
    def test_recovery_is_ordinary(self, tiny, shard, sides):
        batch = read_batch(shard, with_options(tiny, sides=sides), 1, 3)
        assert batch.ids.shape == batch.labels.shape == (4, 16)
        assert batch.labels[:, :-1].equal(batch.ids[:, 1:])
        assert batch.counts == [64] and batch.tokens == 64


class TestOrder:
    @pytest.mark.parametrize("options", [{}, dict(scale="batch"), dict(sides="input"), dict(sides="output")])
    @pytest.mark.parametrize("steps", [100, 300])
    def test_an_epoch_reads_every_window_once(self, tiny, tmp_path, options, steps):
        tokens = np.arange(20_000, dtype="<u2")  # each tells its place
        tokens.tofile(tmp_path / "train.bin")
        shard = Shard(tmp_path, "train", DataConfig(vocabulary=20_000))
        config = dataclasses.replace(with_options(tiny, **options), steps=steps)  # 0.4 of them with s = 4
        read = np.zeros(20_000, int)
        for step in range(steps):
            for ids in read_batch(shard, config, S if step < 0.4 * steps else 1, step).ids.flatten(1):
                assert ids.tolist() == list(range(ids[0], ids[-1] + 1)), "the tokens of a sequence adjoin"
                read[ids] += 1
        assert read.sum() == data_tokens(config)
        epochs = read.sum() // 20_000
        # At its ends an epoch leaves out less than a sequence of bags.
        assert set(read[64:-64]) == {epochs, epochs + 1}

    def test_random_is_with_replacement(self, tiny, shard):
        config = dataclasses.replace(with_options(tiny), order="random", seed=3)
        for step, s in ((2, S), (20, 1)):
            generator = np.random.Generator(np.random.Philox(key=3, counter=[0, 0, 0, step]))
            for ids, start in zip(
                read_batch(shard, config, s, step).ids, generator.integers(0, 20_000 - 16 * s, 4), strict=True
            ):
                assert ids.flatten().tolist() == shard.read(start, 16 * s).tolist()


class TestScale:
    def test_batch(self, tiny, shard):
        batch = read_batch(shard, with_options(tiny, scale="batch"), S, 3)
        assert batch.ids.shape == batch.labels.shape == (4 * S, 16 // S, S)
        sequence = read_batch(shard, with_options(tiny), S, 3)
        assert batch.ids.numel() == sequence.ids.numel() and batch.tokens == sequence.tokens
        assert len({start_of(shard, ids.flatten()) for ids in batch.ids}) > 4 * S - 3
        assert batch.counts == [64, 48, 48, 48]


class TestDocuments:
    def test_bags_hold_one_document(self, tiny, documents):
        tiny = dataclasses.replace(tiny, batch=16)
        batch = read_batch(documents, with_options(tiny, straddle=False), S, 3)
        straddling = read_batch(documents, with_options(tiny), S, 3)
        assert batch.ids.shape == straddling.ids.shape == batch.labels.shape
        assert batch.tokens == int((batch.ids != PADDING).sum()) < straddling.tokens
        ended = 0
        for bag in batch.ids.flatten(0, 1).tolist():
            tokens = [t for t in bag if t != PADDING]
            assert 0 not in tokens[:-1], "a token after the end of its document"
            assert bag[: len(tokens)] == tokens
            ended += 0 in tokens
        assert ended > 3
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            for bag, target, following in zip(ids[:-1], labels[:-1], ids[1:], strict=True):
                assert target.equal(following) or (0 in bag and (target == PADDING).all())

    def test_labels_of_output_end_with_the_document(self, tiny, documents):
        tiny = dataclasses.replace(tiny, batch=32)
        batch = read_batch(documents, with_options(tiny, sides="output", straddle=False), S, 3)
        whole = read_batch(documents, with_options(tiny, sides="output"), S, 3)
        assert batch.ids.equal(whole.ids) and batch.tokens == whole.tokens
        cut = 0
        for ids, labels, text in zip(batch.ids, batch.labels, whole.labels, strict=True):
            for token, label, following in zip(ids.tolist(), labels.tolist(), text.tolist(), strict=True):
                # Up to and with the first end of text, nothing at all after one was read.
                end = 0 if token == 0 else following.index(0) + 1 if 0 in following else S
                assert label == following[:end] + [PADDING] * (S - end)
                cut += end < S
        assert cut > 3

    def test_needs_the_token(self, tiny, shard):
        with pytest.raises(UserError, match="straddle: .* end-of-text"):
            check_batches(with_options(tiny, straddle=False), shard, 1)


class TestShares:
    @pytest.mark.parametrize("options", [{}, dict(scale="batch"), dict(sides="output"), dict(sides="input")])
    def test_shares_of_the_processes_are_the_batch(self, tiny, shard, options):
        config = with_options(tiny, **options)
        for s in (S, 1):
            whole = read_batch(shard, config, s, 5)
            parts = [read_batch(shard, config, s, 5, rank, 2) for rank in range(2)]
            assert torch.cat([p.ids for p in parts]).equal(whole.ids)
            assert torch.cat([p.labels for p in parts]).equal(whole.labels)
            assert np.sum([p.counts for p in parts], axis=0).tolist() == whole.counts
            assert sum(p.tokens for p in parts) == whole.tokens

    @pytest.mark.parametrize(("options", "tokens"), [({}, 64), (dict(sides="output"), 19), (dict(scale="batch"), 16)])
    def test_too_short_for_a_sequence_of_any_stage(self, tiny, shard, options, tokens):
        config = with_options(tiny, **options)
        shard.length = tokens + 1
        check_batches(config, shard, 1)
        shard.length = tokens
        with pytest.raises(UserError, match=f"at least {tokens + 1} tokens"):
            check_batches(config, shard, 1)


class TestAhead:
    def test_order(self):
        with ahead(lambda i: i * i, 3, 20) as items:
            assert list(items) == [i * i for i in range(3, 20)]

    def test_reads_while_the_loop_works(self):
        taken, leads, all_that_may_wait = 1, [], threading.Event()

        def read(i):
            leads.append(i - taken)
            if i == 8:
                all_that_may_wait.set()
            return i

        with ahead(read, 0, 100) as items:
            assert next(items) == 0
            for taken in range(2, 101):  # counted before it is taken, so that 8 may wait at any time
                if taken == 6:  # half of the first 8 are gone: the thread reads on by itself
                    assert all_that_may_wait.wait(60)
                assert next(items) == taken - 1
        assert len(leads) == 100 and max(leads) <= 8

    def test_an_error_comes_where_its_item_would(self):
        def read(i):
            if i == 2:
                raise UserError("gone")
            return i

        with ahead(read, 0, 5) as items:
            assert [next(items), next(items)] == [0, 1]
            with pytest.raises(UserError, match="gone"):
                next(items)

    def test_the_thread_ends_with_the_context(self):
        before = threading.active_count()
        with ahead(lambda i: i, 0, 10**9) as items:
            next(items)
            assert threading.active_count() == before + 1
        assert threading.active_count() == before
