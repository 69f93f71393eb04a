"""fold_batch: what a collator of transformers makes, in bags; and the rows that samples read."""

from itertools import islice

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from helpers.hf_cases import LENGTH, build, tokens
from tst_ext import SuperpositionSchedule, fold_inputs, fold_labels
from tst_ext.integrations.hf import fold_batch, superpose
from tst_ext.integrations.hf.data import CollateGroups, Phases, Samples, SampleStream, join_rows

LENGTHS = [7, 3, 12, 1, 5]  # of documents: a whole number of bags or not, and one without any label


def documents():
    return [dict(input_ids=tokens(n, seed=n).tolist(), labels=tokens(n, seed=n).tolist()) for n in LENGTHS]


def loss_apart(model, bag_size):
    """The loss of documents that are folded and read one by one, by the labels of all."""
    total, count = 0, 0
    for document in documents():
        batch = fold_batch({name: torch.tensor([ids]) for name, ids in document.items()}, bag_size)
        valid = (batch["labels"] != -100).sum()
        total += valid * model(**batch, num_items_in_batch=valid.clamp_min(1)).loss
        count += valid
    return total / count


def loss_of(model, batch):
    return model(**batch, num_items_in_batch=(batch["shift_labels"] != -100).sum()).loss


def rows_of(*pairs):
    """Documents, as indices, packed into rows of one length by hand: ids, labels and restarting positions."""
    pad = lambda row: row + [0] * (12 - len(row))  # noqa: E731
    packed = [pad([t for i in pair for t in documents()[i]["input_ids"]]) for pair in pairs]
    positions = [pad([t for i in pair for t in range(LENGTHS[i])]) for pair in pairs]
    return dict(input_ids=torch.tensor(packed), labels=torch.tensor(packed), position_ids=torch.tensor(positions))


class TestFoldBatch:
    def test_no_target_is_visible_to_its_bag(self):
        ids = torch.arange(1, 25).view(2, 12)
        folded = fold_batch(dict(input_ids=ids, labels=ids), 4)
        assert torch.equal(folded["input_ids"], fold_inputs(ids, 4))
        assert torch.equal(folded["labels"], fold_labels(ids, 4, shifted=False))
        assert folded["labels"][0].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [-100] * 4]
        assert folded["shift_labels"] is folded["labels"]

    @pytest.mark.parametrize("family", ["llama", "gpt2"])  # rotary and learned positions
    @pytest.mark.parametrize("bag_size", [1, 2, 4])
    def test_packed_documents_are_documents_apart(self, family, bag_size):
        model = superpose(build(family).eval())
        expected = loss_apart(model, bag_size)
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        batch = fold_batch(collate(documents()), bag_size)
        lengths = [-(-n // bag_size) for n in LENGTHS]
        assert batch["position_ids"].tolist() == [[i for n in lengths for i in range(n)]]
        assert batch["seq_idx"].tolist() == [[k for k, n in enumerate(lengths) for _ in range(n)]]
        assert batch["cu_seq_lens_q"].tolist() == [sum(lengths[:k]) for k in range(len(lengths) + 1)]
        assert torch.equal(batch["cu_seq_lens_k"], batch["cu_seq_lens_q"])
        assert (batch["max_length_q"], batch["max_length_k"]) == (max(lengths), max(lengths))
        assert batch["cu_seq_lens_q"].dtype == batch["seq_idx"].dtype == torch.int32
        ids_and_positions = {k: batch[k] for k in ("input_ids", "labels", "shift_labels", "position_ids")}
        torch.testing.assert_close(loss_of(model, ids_and_positions), expected, rtol=1e-6, atol=0)
        without = dict(return_position_ids=False)
        for keywords in ({}, dict(return_flash_attn_kwargs=True, **without), dict(return_seq_idx=True, **without)):
            other = fold_batch(DataCollatorWithFlattening(**keywords)(documents()), bag_size)  # each suffices
            assert all(torch.equal(other[k], batch[k]) for k in ("input_ids", "labels", "position_ids"))

    def test_positions_begin_where_the_collator_begins(self):
        batch = fold_batch(DataCollatorWithFlattening(position_ids_start=2)(documents()), 4)
        assert batch["position_ids"].tolist() == [[2 + i for n in LENGTHS for i in range(-(-n // 4))]]

    @pytest.mark.parametrize("bag_size", [2, 4])
    def test_documents_packed_into_several_rows(self, bag_size):
        """Two rows of 12 tokens, of two documents and of one: both get the bags of the row that needs most."""
        model = superpose(build("llama").eval())
        rows = rows_of((0, 4), (2,))
        folded = fold_batch(rows, bag_size)
        assert folded["input_ids"].shape == (2, -(-7 // bag_size) + -(-5 // bag_size), bag_size)
        parts = [fold_batch({k: t[i : i + 1] for k, t in rows.items()}, bag_size) for i in range(2)]
        counts = [(part["labels"] != -100).sum() for part in parts]
        expected = sum(n * loss_of(model, part) for n, part in zip(counts, parts, strict=True)) / sum(counts)
        torch.testing.assert_close(loss_of(model, folded), expected, rtol=1e-6, atol=0)

    def test_documents_packed_into_padded_rows(self):
        """With a mask too, whatever the positions of padding are; Transformers would look at the mask alone."""
        model, rows = superpose(build("llama").eval()), rows_of((0, 4), (1, 3))
        expected = [fold_batch({k: t[i : i + 1, :n] for k, t in rows.items()}, 3) for i, n in ((0, 12), (1, 4))]
        counts = [(part["labels"] != -100).sum() for part in expected]
        expected = sum(n * loss_of(model, part) for n, part in zip(counts, expected, strict=True)) / sum(counts)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, 4:] = 0
        for roll in (0, 8):  # padding on the right, on the left
            shifted = {k: torch.stack((t[0], t[1].roll(roll))) for k, t in (rows | dict(attention_mask=mask)).items()}
            folded = fold_batch(shifted, 3)
            assert "attention_mask" not in folded
            torch.testing.assert_close(loss_of(model, folded), expected, rtol=1e-6, atol=0)

    def test_positions_that_jump_back(self):
        """Transformers would take bags at 0 and 1 for one document."""
        ids, positions = tokens(1, 8), torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4]])
        folded = fold_batch(dict(input_ids=ids, labels=ids, position_ids=positions), 4)
        assert folded["position_ids"].tolist() == [[0, 0]] and (folded["labels"] == -100).all()
        one = fold_batch(dict(input_ids=ids, labels=ids, position_ids=positions[:, :4].repeat(1, 2) + 9), 2)
        assert one["position_ids"].tolist() == [[9, 10, 9, 10]]

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("bag_size", [3, 4])
    def test_padding_on_either_side_is_no_padding(self, side, family, bag_size):
        model = superpose(build(family).eval())
        width, batch = LENGTH + 2, {"input_ids": [], "labels": [], "attention_mask": []}
        for document in documents():
            n = len(document["input_ids"])
            before = dict(left=width - n, right=0, both=(width - n) // 2)[side]
            for name, row, filler in (
                ("input_ids", document["input_ids"], 0),
                ("labels", document["labels"], -100),
                ("attention_mask", [1] * n, 0),
            ):
                batch[name].append([filler] * before + row + [filler] * (width - n - before))
        folded = fold_batch({name: torch.tensor(rows) for name, rows in batch.items()}, bag_size)
        assert folded["input_ids"].shape == (len(LENGTHS), -(-width // bag_size), bag_size)  # whatever the padding is
        bags = [-(-n // bag_size) for n in LENGTHS]
        assert folded["attention_mask"].sum(1).tolist() == bags
        torch.testing.assert_close(loss_of(model, folded), loss_apart(model, bag_size), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("extra", ["token_type_ids", "number"])
    def test_other_tensors_are_named(self, extra):
        ids = tokens(2, 4)
        with pytest.raises(ValueError, match=f"^batch: expected input_ids, labels.*{extra}"):
            fold_batch({"input_ids": ids, "labels": ids, extra: ids}, 2)
        assert fold_batch({"input_ids": ids, "labels": ids, extra: None}, 2)["labels"].shape == (2, 2, 2)
        with pytest.raises(ValueError, match=r"^batch: .*got \['input_ids'\]"):
            fold_batch(dict(input_ids=ids), 2)

    def test_other_shapes_and_dtypes_are_named(self):
        ids = tokens(2, 4)
        with pytest.raises(ValueError, match=r"^attention_mask: .*\(2, 4\), got \(2, 1, 4, 4\)"):
            fold_batch(dict(input_ids=ids, labels=ids, attention_mask=torch.ones(2, 1, 4, 4)), 2)
        with pytest.raises(ValueError, match=r"^position_ids: .*\(2, 4\), got \(1, 4\)"):
            fold_batch(dict(input_ids=ids, labels=ids, position_ids=torch.arange(4)[None]), 2)
        with pytest.raises(TypeError, match="^labels: expected int64.*torch.int32"):
            fold_batch(dict(input_ids=ids, labels=ids.int()), 2)
        empty = fold_batch(dict(input_ids=ids[:1], labels=ids[:1], cu_seq_lens_q=torch.tensor([0, 2, 2, 4, 4])), 2)
        assert empty["cu_seq_lens_q"].tolist() == [0, 1, 2]  # documents without tokens are none
        for offsets in ([0, 3], [1, 4], [0, 3, 1, 4]):
            with pytest.raises(ValueError, match=r"^cu_seq_lens_q: expected offsets that rise from 0 to L"):
                fold_batch(dict(input_ids=ids[:1], labels=ids[:1], cu_seq_lens_q=torch.tensor(offsets)), 2)
        with pytest.raises(ValueError, match=r"^cu_seq_lens_q: .*one row"):
            fold_batch(dict(input_ids=ids, labels=ids, cu_seq_lens_q=torch.tensor([0, 4])), 2)

    def test_nothing(self):
        for shape in ((0, 4), (2, 0)):
            ids = torch.empty(shape, dtype=torch.int64)
            assert fold_batch(dict(input_ids=ids, labels=ids), 2)["labels"].shape[0] == shape[0]


class TestJoinRows:
    def test_rows(self):
        ids = torch.arange(24).view(4, 6)
        joined = join_rows(dict(input_ids=ids, labels=ids), 2)
        assert torch.equal(joined["input_ids"], ids.view(2, 12)) and torch.equal(joined["labels"], ids.view(2, 12))
        packed = dict(input_ids=ids[:1], max_length_q=3)
        assert join_rows(packed, 2) is packed
        with pytest.raises(ValueError, match="^data_collator: expected bag_size = 3 rows for each sample.*got 4"):
            join_rows(dict(input_ids=ids), 3)


def read(samples):
    return [row for sample in DataLoader(samples, batch_size=1, collate_fn=lambda s: s[0]) for row in sample]


class TestSamples:
    @pytest.mark.parametrize("rows", [12, 13, 16, 31])
    @pytest.mark.parametrize("stages", [(), ((0.25, 2),)], ids=["one stage", "two"])
    @pytest.mark.parametrize("shuffle", [None, 3], ids=["sequential", "random"])
    def test_every_row_is_read_once_a_pass(self, rows, stages, shuffle):
        schedule = SuperpositionSchedule(40, 0.5, 5, stages)
        phases = Phases(schedule.stage_ends, 2)
        samples = Samples(range(100, 100 + rows), None, phases, 80, shuffle)
        groups = [samples[i] for i in range(80)]
        assert [len(g) for g in groups] == [schedule.bag_size_at(i // 2) for i in range(80)]
        stream = [row for g in groups for row in g]
        for first in range(0, len(stream) - rows + 1, rows):
            assert sorted(stream[first : first + rows]) == list(range(100, 100 + rows))
        if shuffle is None:
            assert stream == [100 + i % rows for i in range(len(stream))]
        else:
            assert stream[:rows] != stream[rows : 2 * rows]
            first = 0
            for g in groups:  # neighbours, but where one pass ends and the next begins
                splits = [k for k in range(1, len(g)) if (first + k) % rows == 0]
                jumps = [k for k in range(1, len(g)) if g[k] != g[k - 1] + 1]
                assert set(jumps) <= set(splits)
                first += len(g)
        assert [samples[i] for i in (7, 70, 3)] == [groups[i] for i in (7, 70, 3)]  # in any order

    def test_a_stream_has_the_same_phases(self):
        phases = Phases(SuperpositionSchedule(8, 0.5, 3, ((0.25, 2),)).stage_ends, 1)
        stream = iter(SampleStream(range(5), None, phases))
        assert [len(next(stream)) for _ in range(9)] == [3] * 4 + [2] * 2 + [1] * 3
        assert list(SampleStream([], None, phases)) == []

    def test_a_stream_that_shuffles(self):
        """As Trainer does, each pass has an epoch, by which datasets shuffles."""
        rows = datasets.Dataset.from_dict(dict(a=list(range(12)))).to_iterable_dataset().shuffle(seed=1)
        stream = SampleStream(rows, {"a"}, Phases(((2, 2),), 1))
        read = [row["a"] for sample in islice(stream, 2 + 20) for row in sample]
        assert sorted(read[:12]) == sorted(read[12:24]) == list(range(12)) and read[:12] != read[12:24]
        again = [row["a"] for sample in islice(stream, 2 + 20) for row in sample]
        assert again == read  # from the beginning

    def test_collators_get_rows(self):
        samples = Samples([dict(a=i, b="x") for i in range(9)], {"a"}, Phases(((1, 3),), 2), 4, None)
        seen = []
        CollateGroups(lambda rows: seen.append(rows) or {})([samples[0], samples[1]])
        assert seen == [[dict(a=i) for i in range(6)]]
        ids = torch.arange(4, dtype=torch.int32).view(1, 4)
        batch = CollateGroups(lambda rows: dict(input_ids=rows[0], labels=rows[0]))([ids])
        assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64
