"""Folding, documents, position weights and entropy."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import generator
from tst_ext import (
    bag_embedding,
    bag_entropy,
    bag_positions,
    cu_bags,
    document_offsets,
    fold_inputs,
    fold_labels,
    join_documents,
    multi_hot_cross_entropy,
    position_weights,
    slide_labels,
)

TOKENS = torch.arange(100, 112)  # tokens 100..111; labels in the shifted convention are 101..112
SHIFTED = TOKENS + 1


class TestFold:
    def test_inputs_are_contiguous_bags_and_a_view(self):
        bags = fold_inputs(TOKENS, 4)
        assert bags.tolist() == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109, 110, 111]]
        assert bags.data_ptr() == TOKENS.data_ptr()

    def test_shifted_labels_keep_one_label_in_the_last_bag(self):
        bags = fold_labels(SHIFTED, 4, shifted=True)
        assert bags.tolist() == [[104, 105, 106, 107], [108, 109, 110, 111], [112, -100, -100, -100]]

    def test_unshifted_labels_leave_the_last_bag_empty(self):
        bags = fold_labels(TOKENS, 4, shifted=False, ignore_index=-1)
        assert bags.tolist() == [[104, 105, 106, 107], [108, 109, 110, 111], [-1, -1, -1, -1]]

    def test_bag_size_one_is_next_token(self):
        assert fold_labels(SHIFTED, 1, shifted=True).flatten().tolist() == SHIFTED.tolist()
        assert fold_labels(TOKENS, 1, shifted=False).flatten().tolist() == [*TOKENS[1:].tolist(), -100]

    @pytest.mark.parametrize("bag_size", [1, 2, 3, 4, 6, 12])
    @pytest.mark.parametrize("shifted", [True, False])
    def test_no_target_is_visible_to_its_bag(self, bag_size, shifted):
        inputs = fold_inputs(TOKENS, bag_size)
        labels = fold_labels(SHIFTED if shifted else TOKENS, bag_size, shifted=shifted)
        for bag, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
            # Tokens count up, so a target is in the future exactly where it is larger than all the bag has read.
            targets = [t for t in targets if t != -100]
            assert targets == [max(bag) + 1 + i for i in range(len(targets))]

    @pytest.mark.parametrize("shifted", [True, False])
    def test_every_later_token_is_a_target_once(self, shifted):
        labels = fold_labels(SHIFTED if shifted else TOKENS, 3, shifted=shifted)
        assert labels[labels != -100].tolist() == list(range(103, 113 if shifted else 112))

    @pytest.mark.parametrize("shifted", [True, False])
    def test_offset_gives_the_labels_of_a_later_bag(self, shifted):
        labels = torch.stack((SHIFTED, SHIFTED + 50))
        first = fold_labels(labels, 3, shifted=shifted)
        for offset in range(6):  # there are four bags
            expected = F.pad(first[:, offset:], (0, 0, 0, min(offset, 4)), value=-100)
            assert torch.equal(fold_labels(labels, 3, shifted=shifted, offset=offset), expected)

    def test_batches_and_strides(self):
        batch = torch.stack((TOKENS, TOKENS + 50))
        strided = batch.T.contiguous().T
        assert not strided.is_contiguous()
        assert torch.equal(fold_inputs(strided, 4), torch.stack([fold_inputs(row, 4) for row in batch]))
        assert torch.equal(
            fold_labels(strided, 4, shifted=True), torch.stack([fold_labels(row, 4, shifted=True) for row in batch])
        )

    def test_empty(self):
        assert fold_inputs(torch.empty(2, 0, dtype=torch.long), 4).shape == (2, 0, 4)
        assert fold_labels(torch.empty(2, 0, dtype=torch.long), 4, shifted=True).shape == (2, 0, 4)
        assert fold_labels(torch.empty(0, 8, dtype=torch.long), 4, shifted=True).shape == (0, 2, 4)

    def test_shifted_has_no_default(self):
        with pytest.raises(TypeError, match="shifted"):
            fold_labels(TOKENS, 4)

    @pytest.mark.parametrize("bag_size", [5, 0, -1])
    def test_bad_bag_size(self, bag_size):
        with pytest.raises(ValueError, match="bag_size"):
            fold_inputs(TOKENS, bag_size)
        with pytest.raises(ValueError, match="bag_size"):
            fold_labels(TOKENS, bag_size, shifted=True)

    def test_scalar_is_an_error(self):
        with pytest.raises(ValueError, match="input_ids"):
            fold_inputs(torch.tensor(3), 1)

    @pytest.mark.parametrize("offset", [-1, 0.5, None])
    def test_bad_offset(self, offset):
        with pytest.raises(ValueError, match="offset: expected an integer >= 0, got"):
            fold_labels(TOKENS, 4, shifted=True, offset=offset)


EOS = 0
PADDING = IGNORE = -100


def stream(lengths, length, sequences=1):
    """Documents of these lengths, each closed by EOS, cut into sequences; every other token occurs once."""
    ids = torch.arange(1, sum(lengths) + 1)
    ids[torch.tensor(lengths).cumsum(0) - 1] = EOS
    return ids[: sequences * length].view(sequences, length)


class TestDocumentOffsets:
    def test_a_document_ends_after_its_end_of_text(self):
        ids = torch.tensor([5, 6, EOS, 7, EOS, EOS, 8])
        assert document_offsets(ids, EOS).tolist() == [0, 3, 5, 6, 7]

    def test_the_end_of_a_sequence_ends_a_document(self):
        ids = torch.tensor([[5, EOS, 6], [7, 8, EOS]])
        assert document_offsets(ids, EOS).tolist() == [0, 2, 3, 6]

    def test_empty(self):
        assert document_offsets(torch.empty(0, dtype=torch.long), EOS).tolist() == [0]
        assert document_offsets(torch.empty(2, 0, dtype=torch.long), EOS).tolist() == [0]

    def test_scalar_is_an_error(self):
        with pytest.raises(ValueError, match="input_ids"):
            document_offsets(torch.tensor(3), EOS)


class TestDocumentFold:
    def test_written_out(self):
        ids = torch.tensor([1, 2, 3, 4, EOS, 6, EOS, 8, 9])
        cu_seqlens = document_offsets(ids, EOS)
        inputs = fold_inputs(ids, 2, cu_seqlens=cu_seqlens)
        p = PADDING
        assert inputs.tolist() == [[1, 2], [3, 4], [EOS, p], [6, EOS], [8, 9]]
        labels = fold_labels(ids, 2, shifted=False, cu_seqlens=cu_seqlens)
        assert labels.tolist() == [[3, 4], [EOS, p], [p, p], [p, p], [p, p]]
        shifted = torch.tensor([2, 3, 4, EOS, 6, EOS, 8, 9, 10])
        assert torch.equal(fold_labels(shifted, 2, shifted=True, cu_seqlens=cu_seqlens), labels)

    @pytest.mark.parametrize("bag_size", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("sequences", [1, 3])
    @pytest.mark.parametrize("seed", range(6))
    def test_against_a_loop(self, bag_size, sequences, seed):
        lengths = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        ids = stream(lengths, 23, sequences)
        cu_seqlens = document_offsets(ids, EOS)
        bags, targets, further, numbers = [], [], [], []  # of each sequence
        for row in ids.tolist():
            documents = [[]]
            for token in row:
                documents[-1].append(token)
                if token == EOS:
                    documents.append([])
            for rows in (bags, targets, further, numbers):
                rows.append([])
            for document in documents:
                cut = [document[i : i + bag_size] for i in range(0, len(document), bag_size)]
                bags[-1] += cut
                targets[-1] += [*cut[1:], []] if cut else []
                further[-1] += [*cut[3:], [], [], []][: len(cut)]
                numbers[-1] += range(len(cut))
        most = max(len(row) for row in bags)

        def table(rows):
            filled = [row + [[]] * (most - len(row)) for row in rows]
            return torch.tensor([[bag + [PADDING] * (bag_size - len(bag)) for bag in row] for row in filled])

        inputs = fold_inputs(ids, bag_size, cu_seqlens=cu_seqlens)
        labels = fold_labels(ids, bag_size, shifted=False, cu_seqlens=cu_seqlens)
        assert torch.equal(inputs, table(bags)) and torch.equal(labels, table(targets))
        following = F.pad(ids.flatten()[1:], (0, 1), value=99).view_as(ids)
        assert torch.equal(fold_labels(following, bag_size, shifted=True, cu_seqlens=cu_seqlens), labels)
        later = fold_labels(following, bag_size, shifted=True, offset=2, cu_seqlens=cu_seqlens)
        assert torch.equal(later, table(further))

        positions = bag_positions(ids, bag_size, cu_seqlens=cu_seqlens)
        assert positions.tolist() == [row + [0] * (most - len(row)) for row in numbers]
        places = [i for i, n in enumerate(positions.flatten().tolist()) if n == 0]
        assert cu_bags(positions).tolist() == [*places, positions.numel()]

        slid = slide_labels(ids, bag_size, shifted=False, cu_seqlens=cu_seqlens)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                end = min([i for i in range(t, len(row)) if row[i] == EOS], default=len(row) - 1)
                after = row[t + 1 : end + 1][:bag_size]
                assert slid[b, t].tolist() == after + [IGNORE] * (bag_size - len(after))
        assert torch.equal(slide_labels(following, bag_size, shifted=True, cu_seqlens=cu_seqlens), slid)

    def test_one_document_a_sequence_is_the_ordinary_fold(self):
        ids = torch.arange(24).view(2, 12)
        cu_seqlens = torch.tensor([0, 12, 24])
        assert torch.equal(fold_inputs(ids, 4, cu_seqlens=cu_seqlens), fold_inputs(ids, 4))
        assert torch.equal(
            fold_labels(ids, 4, shifted=False, cu_seqlens=cu_seqlens), fold_labels(ids, 4, shifted=False)
        )

    def test_offsets_of_either_integer_and_repeated(self):
        ids = stream([3, 4, 5], 12)
        expected = fold_inputs(ids, 2, cu_seqlens=torch.tensor([0, 3, 7, 12]))
        assert torch.equal(fold_inputs(ids, 2, cu_seqlens=torch.tensor([0, 3, 7, 12], dtype=torch.int32)), expected)
        assert torch.equal(fold_inputs(ids, 2, cu_seqlens=torch.tensor([0, 0, 3, 7, 7, 12, 12])), expected)

    def test_offsets_without_the_ends_of_sequences(self):
        ids = torch.arange(12).view(2, 6)
        expected = fold_inputs(ids, 4, cu_seqlens=torch.tensor([0, 6, 12]))
        assert torch.equal(fold_inputs(ids, 4, cu_seqlens=torch.tensor([0, 12])), expected)

    def test_num_bags(self):
        ids = stream([3, 4, 5], 12)
        cu_seqlens = document_offsets(ids, EOS)
        inputs = fold_inputs(ids, 2, cu_seqlens=cu_seqlens)
        labels = fold_labels(ids, 2, shifted=False, cu_seqlens=cu_seqlens)
        assert inputs.shape == (1, 7, 2)
        more = fold_inputs(ids, 2, cu_seqlens=cu_seqlens, num_bags=9)
        assert torch.equal(more[:, :7], inputs) and (more[:, 7:] == PADDING).all() and more.shape == (1, 9, 2)
        fewer = fold_inputs(ids, 2, cu_seqlens=cu_seqlens, num_bags=5)
        assert torch.equal(fewer, inputs[:, :5])
        assert torch.equal(fold_labels(ids, 2, shifted=False, cu_seqlens=cu_seqlens, num_bags=5), labels[:, :5])
        assert bag_positions(ids, 2, cu_seqlens=cu_seqlens, num_bags=5).tolist() == [[0, 1, 0, 1, 0]]
        # The bag that is dropped as an input remains as a label further on.
        later = fold_labels(ids, 2, shifted=False, offset=1, cu_seqlens=cu_seqlens, num_bags=5)
        assert torch.equal(later[:, 4], inputs[:, 6])

    def test_without_data(self):
        # On another device than the CPU no value is read, given the number of bags: nothing waits for the device.
        ids, cu_seqlens = (
            torch.empty(2, 12, dtype=torch.long, device="meta"),
            torch.empty(5, dtype=torch.long, device="meta"),
        )
        assert fold_inputs(ids, 4, cu_seqlens=cu_seqlens, num_bags=5).shape == (2, 5, 4)
        assert fold_labels(ids, 4, shifted=True, cu_seqlens=cu_seqlens, num_bags=5).shape == (2, 5, 4)
        assert bag_positions(ids, 4, cu_seqlens=cu_seqlens, num_bags=5).shape == (2, 5)
        assert slide_labels(ids, 4, shifted=True, cu_seqlens=cu_seqlens).shape == (2, 12, 4)
        assert position_weights("annealed", 4, progress=torch.empty((), device="meta")).device.type == "meta"

    def test_offsets_in_bags(self):
        ids = stream([3, 4, 5, 1, 7], 20)[0]
        cu_seqlens, s = document_offsets(ids, EOS), 3
        bags = fold_inputs(ids, s, cu_seqlens=cu_seqlens)
        offsets = cu_bags(bag_positions(ids, s, cu_seqlens=cu_seqlens))
        assert offsets.dtype == torch.int32 and offsets[-1] == len(bags)
        assert torch.equal(bags[offsets[:-1].long(), 0], ids[cu_seqlens[:-1]])
        assert cu_bags(torch.tensor([[3, 4, 0], [1, 2, 3]])).tolist() == [0, 2, 3, 6]  # a sequence begins a document
        assert cu_bags(torch.empty(2, 0, dtype=torch.long)).tolist() == [0]
        with pytest.raises(ValueError, match="^positions: "):
            cu_bags(torch.tensor(3))

    def test_other_fillers(self):
        ids = stream([3, 4, 5], 12)
        cu_seqlens = document_offsets(ids, EOS)
        assert fold_inputs(ids, 2, cu_seqlens=cu_seqlens, padding_idx=-7)[0, 1].tolist() == [EOS, -7]
        assert fold_labels(ids, 2, shifted=False, cu_seqlens=cu_seqlens, ignore_index=-7)[0, 1].tolist() == [-7, -7]

    def test_empty(self):
        none = torch.empty(2, 0, dtype=torch.long)
        for fold in (fold_inputs, lambda *a, **k: fold_labels(*a, shifted=True, **k)):
            assert fold(none, 4, cu_seqlens=torch.tensor([0])).shape == (2, 0, 4)
            assert fold(none, 4, cu_seqlens=torch.tensor([0]), num_bags=3).shape == (2, 3, 4)

    def test_no_information_crosses_a_document(self):
        # Gradients of one document's loss reach its own tokens' embeddings alone, and another document's tokens change
        # nothing in it. A model without attention across documents: here each bag predicts from itself.
        ids = stream([7, 6, 11], 24)
        cu_seqlens = document_offsets(ids, EOS)
        weight = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
        labels = fold_labels(ids, 3, shifted=False, cu_seqlens=cu_seqlens)
        bags = fold_inputs(ids, 3, cu_seqlens=cu_seqlens)
        hidden = bag_embedding(bags, weight, padding_idx=PADDING)
        losses = multi_hot_cross_entropy(hidden @ torch.randn(5, 30, dtype=torch.float64), labels, reduction="none")
        first = losses[0, :3].sum()  # bags of the document of 7 tokens
        (gradient,) = torch.autograd.grad(first, weight)
        assert gradient[1:7].any(1).all() and not gradient[7:].any()
        assert set(labels[0, :3].flatten().tolist()) == {4, 5, 6, EOS, IGNORE}

    @pytest.mark.parametrize(
        ("cu_seqlens", "message"),
        [
            (torch.tensor([0, 5]), r"from 0 to .*numel\(\) = 12, got \[0, 5\]"),
            (torch.tensor([1, 12]), r"got \[1, 12\]"),
            (torch.tensor([0, 8, 4, 12]), r"got \[0, 8, 4, 12\]"),
            (torch.tensor([0, 30, 12]), r"got \[0, 30, 12\]"),
            (torch.tensor([], dtype=torch.long), r"got \[\]"),
            (torch.tensor([[0, 12]]), r"shape \(1, 2\)"),
            (torch.tensor(12), r"shape \(\)"),
        ],
    )
    def test_bad_offsets(self, cu_seqlens, message):
        ids = torch.arange(12)
        with pytest.raises(ValueError, match="^cu_seqlens: .*" + message):
            fold_inputs(ids, 2, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match="^cu_seqlens: .*" + message):
            fold_labels(ids, 2, shifted=True, cu_seqlens=cu_seqlens)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
    def test_types_in_which_the_filler_would_be_a_token(self, dtype):
        ids, cu_seqlens = torch.arange(12).to(dtype), torch.tensor([0, 12])
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(TypeError, match=f"input_ids.*int64, int32, got {name}"):
            fold_inputs(ids, 5, cu_seqlens=cu_seqlens)
        with pytest.raises(TypeError, match=f"labels.*int64, int32, got {name}"):
            fold_labels(ids, 2, shifted=True)
        with pytest.raises(TypeError, match=f"input_ids.*int64, int32, got {name}"):
            document_offsets(ids, EOS)
        with pytest.raises(TypeError, match=f"cu_seqlens.*int64, int32, got {name}"):
            fold_inputs(torch.arange(12), 5, cu_seqlens=cu_seqlens.to(dtype))

    @pytest.mark.parametrize("bad", [None, [1, 2], 2.5])
    def test_no_integer(self, bad):
        ids, cu_seqlens = torch.arange(12), torch.tensor([0, 12])
        with pytest.raises(ValueError, match="eos_token_id"):
            document_offsets(ids, bad)
        with pytest.raises(ValueError, match="bag_size"):
            fold_inputs(ids, bad)
        if bad is not None:
            with pytest.raises(ValueError, match="num_bags"):
                fold_inputs(ids, 2, cu_seqlens=cu_seqlens, num_bags=bad)

    def test_bad_num_bags(self):
        ids, cu_seqlens = torch.arange(12), torch.tensor([0, 12])
        with pytest.raises(ValueError, match="num_bags.*0"):
            fold_inputs(ids, 2, cu_seqlens=cu_seqlens, num_bags=0)
        with pytest.raises(ValueError, match="num_bags.*only with cu_seqlens"):
            fold_inputs(ids, 2, num_bags=6)
        with pytest.raises(ValueError, match="num_bags.*only with cu_seqlens"):
            fold_labels(ids, 2, shifted=True, num_bags=6)


class TestSlide:
    def test_written_out(self):
        i = IGNORE
        assert slide_labels(SHIFTED[:4], 3, shifted=True).tolist() == [
            [101, 102, 103], [102, 103, 104], [103, 104, i], [104, i, i]
        ]  # fmt: skip
        assert slide_labels(TOKENS[:4], 3, shifted=False, ignore_index=-1).tolist() == [
            [101, 102, 103], [102, 103, -1], [103, -1, -1], [-1, -1, -1]
        ]  # fmt: skip

    @pytest.mark.parametrize("shifted", [True, False])
    def test_the_last_token_of_a_bag_has_the_bags_labels(self, shifted):
        labels = torch.stack((SHIFTED, SHIFTED + 50))
        for s in (1, 2, 3, 12):
            slid = slide_labels(labels, s, shifted=shifted)
            assert torch.equal(slid[:, s - 1 :: s], fold_labels(labels, s, shifted=shifted))

    def test_the_loss_takes_the_view(self):
        labels = torch.arange(14).view(2, 7).T  # also of a sequence that is not contiguous
        slid = slide_labels(labels.T, 3, shifted=True)
        logits = torch.randn(2, 7, 14, dtype=torch.float64, generator=generator())
        assert torch.equal(multi_hot_cross_entropy(logits, slid), multi_hot_cross_entropy(logits, slid.clone()))

    def test_empty_and_shorter_than_a_bag(self):
        assert slide_labels(torch.empty(2, 0, dtype=torch.long), 4, shifted=False).shape == (2, 0, 4)
        none = torch.tensor([0])
        assert slide_labels(torch.empty(0, dtype=torch.long), 4, shifted=True, cu_seqlens=none).shape == (0, 4)
        assert slide_labels(TOKENS[:1].int(), 2, shifted=True).tolist() == [[100, IGNORE]]

    def test_bad_arguments(self):
        with pytest.raises(TypeError, match="shifted"):
            slide_labels(TOKENS, 4)
        with pytest.raises(ValueError, match="^bag_size: "):
            slide_labels(TOKENS, 0, shifted=True)
        with pytest.raises(ValueError, match=r"^cu_seqlens: .*labels.numel\(\) = 12, got \[0, 5\]"):
            slide_labels(TOKENS, 4, shifted=True, cu_seqlens=torch.tensor([0, 5]))


class TestJoinDocuments:
    def test_written_out(self):
        join = lambda *offsets, **options: join_documents(torch.tensor(offsets), 10, **options).tolist()  # noqa: E731
        assert join(0, 3, 12, 15, 30, 40) == [0, 12, 30, 40]
        assert join(0, 12, 24, 33) == [0, 12, 33]  # nine tokens would be left
        assert join(0, 3, 9) == [0, 9]  # which are all there are
        assert join(0) == [0]
        assert join(0, 12, 12, 24, 24) == [0, 12, 24]
        # Sequences keep their ends, whatever is left before them, where documents end there.
        assert join(0, 12, 25, 31, 36, 50, length=25) == [0, 12, 25, 36, 50]
        assert join(0, 5, 8, 13, 16, length=8) == [0, 8, 16]
        assert join(0, 15, 30, 50, length=25) == [0, 15, 50]

    def test_padded_slots_at_a_mean_of_30_tokens(self):
        """A quarter of the label slots is empty, less than a twentieth after joining."""
        s, shape = 6, (64, 1536)
        ids = torch.ones(shape, dtype=torch.long)
        ids[torch.rand(shape, generator=generator()) < 1 / 30] = EOS
        documents = document_offsets(ids, EOS)
        joined = join_documents(documents, 30 * s, length=1536)
        assert joined.diff().min() >= 30 * s and set(joined.tolist()) <= set(documents.tolist())
        padded = [
            (fold_labels(ids, s, shifted=False, cu_seqlens=offsets, num_bags=1536 // s) == IGNORE).float().mean()
            for offsets in (documents, joined)
        ]
        assert padded[0] > 0.24 and padded[1] < 0.04

    def test_dtype_is_kept(self):
        assert join_documents(torch.tensor([0, 4, 9], dtype=torch.int32), 3).dtype == torch.int32

    @pytest.mark.parametrize(
        ("offsets", "options", "message"),
        [
            ([0, 5, 3], {}, r"^cu_seqlens: expected offsets \[D \+ 1\] that rise from 0, got \[0, 5, 3\]"),
            ([1, 5], {}, r"^cu_seqlens: .*got \[1, 5\]"),
            ([], {}, r"^cu_seqlens: .*got \[\]"),
            ([[0, 5]], {}, r"^cu_seqlens: .*got \[\[0, 5\]\]"),
            ([0, 5, 9], dict(least=0), "^least: expected an integer >= 1, got 0"),
            ([0, 5, 9], dict(length=0), "^length: expected an integer >= 1, got 0"),
            ([0, 5, 9], dict(length=4), "^length: expected a divisor of the 9 tokens"),
        ],
    )
    def test_bad_arguments(self, offsets, options, message):
        with pytest.raises(ValueError, match=message):
            join_documents(torch.tensor(offsets, dtype=torch.long), **{"least": 3, **options})


class TestPositionWeights:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("uniform", [1, 1, 1]),
            ("power_law", [1, 1 / 2, 1 / 3]),
            ("exponential", [math.exp(-1), math.exp(-2), math.exp(-3)]),
            ("first", [1, 0, 0]),
            ("fitted", [3.63 + 1.35, 3.63 + 1.35 * 2**-1.25, 3.63 + 1.35 * 3**-1.25]),
        ],
    )
    def test_values(self, name, expected):
        weights = position_weights(name, 3)
        assert weights.dtype == torch.float32
        assert weights.tolist() == pytest.approx(expected, rel=3 * torch.finfo(torch.float32).eps)

    def test_constants_of_ones_own(self):
        weights = position_weights("fitted", 3, fitted=(0.5, 2.0, -1.0))
        assert weights.tolist() == pytest.approx([2.5, 1.5, 0.5 + 2 / 3], rel=1e-6)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="'power'"):
            position_weights("power", 3)
        with pytest.raises(ValueError, match="bag_size"):
            position_weights("uniform", 0)

    @pytest.mark.parametrize("start", ["uniform", "power_law", "exponential", "first", "fitted"])
    def test_annealed_leads_from_its_start_to_first(self, start):
        begin = position_weights(start, 4)
        for progress in (0, 0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.bfloat16), 1.0):
            weights = position_weights("annealed", 4, progress=progress, start=start)
            assert weights[0] == 1 and weights.dtype == torch.float32
            expected = (1 - float(progress)) * begin[1:] / begin[0]
            assert weights[1:].tolist() == pytest.approx(expected.tolist(), rel=3 * torch.finfo(torch.float32).eps)
        assert weights.tolist() == [1, 0, 0, 0]

    @pytest.mark.parametrize("progress", [None, -0.1, 1.1, math.nan, "half", torch.tensor(1.5), torch.tensor([0.5])])
    def test_bad_progress(self, progress):
        with pytest.raises(ValueError, match="^progress: "):
            position_weights("annealed", 3, progress=progress)

    def test_progress_belongs_to_annealed(self):
        with pytest.raises(ValueError, match="^progress: only with 'annealed', got 0.5 with 'uniform'"):
            position_weights("uniform", 3, progress=0.5)
        with pytest.raises(ValueError, match="^start: expected 'uniform', .* or 'fitted', got 'annealed'"):
            position_weights("annealed", 3, progress=0.5, start="annealed")
        with pytest.raises(TypeError, match="^progress: "):
            position_weights("annealed", 3, progress=torch.tensor(True))

    def test_a_compiled_step_stays_while_documents_and_weights_change(self):
        torch._dynamo.reset()

        def step(ids, labels, cu_seqlens, progress):
            documents = dict(cu_seqlens=cu_seqlens, num_bags=6)
            positions = bag_positions(ids, 3, **documents)
            folded = fold_labels(labels, 3, shifted=True, offset=1, **documents)
            slid = slide_labels(labels, 3, shifted=True, cu_seqlens=cu_seqlens)
            return positions, folded, slid, position_weights("annealed", 3, progress=progress), bag_entropy(slid)

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        ids = torch.arange(24).view(2, 12)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for middle, progress in ((4, 0.0), (7, 0.4), (15, 1.0)):
                arguments = ids, ids + 1, torch.tensor([0, middle, 24]), torch.tensor(progress)
                for actual, expected in zip(compiled(*arguments), step(*arguments), strict=True):
                    assert torch.equal(actual, expected)


class TestBagEntropy:
    @staticmethod
    def labels(s, vocabulary=7):
        """Bags with repeated and ignored labels, one of them without any."""
        labels = torch.randint(vocabulary, (4, 5, s), generator=generator())
        labels[torch.rand(labels.shape, generator=generator(1)) < 0.2] = IGNORE
        labels[1, 2] = IGNORE
        return labels

    @pytest.mark.parametrize("s", [1, 2, 6, 40])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_against_counting(self, s, weighted):
        labels = self.labels(s)
        of_position = torch.rand(s, generator=generator(2)) if weighted else None
        of_label = torch.rand(labels.shape, generator=generator(3)) if weighted else None
        if weighted:
            of_label[0, 0] = 0
        result = bag_entropy(labels, position_weights=of_position, label_weights=of_label)
        assert result.dtype == torch.float32 and result.shape == (4, 5)
        for b, bag in enumerate(labels.flatten(0, 1).tolist()):
            counts = Counter()
            for i, label in enumerate(bag):
                weight = float(of_position[i] * of_label.flatten(0, 1)[b, i]) if weighted else 1
                counts[label] += weight if label != IGNORE else 0
            total = sum(counts.values())
            expected = -sum(n / total * math.log(n / total) for n in counts.values() if n)
            assert result.flatten()[b] == pytest.approx(expected, rel=1e-5, abs=1e-6)  # s + 2 roundings of float32

    def test_it_is_the_least_loss(self):
        labels, name = self.labels(6), "power_law"
        weights = position_weights(name, 6, dtype=torch.float64)
        valid = labels != IGNORE
        shares = F.one_hot(labels.clamp(0), 7) * torch.where(valid, weights, 0)[..., None]
        shares = shares.sum(2) / shares.sum((2, 3), keepdim=True).squeeze(3).clamp_min(1e-9)
        scale = torch.where(valid, weights, 0).sum(-1) / weights.sum()  # a short bag weighs less
        floor = scale * bag_entropy(labels, position_weights=name)

        def loss(logits):
            return multi_hot_cross_entropy(logits, labels, position_weights=name, reduction="none")

        best = (shares + 1e-30).log()
        assert torch.allclose(loss(best), floor, rtol=1e-5, atol=1e-6)  # the floor is float32
        for seed in range(20):
            for size in (0.01, 1.0):
                near = best + size * torch.randn(best.shape, dtype=torch.float64, generator=generator(seed))
                assert (loss(near) >= floor - 1e-6).all()

    def test_other_labels_and_strides(self):
        labels = self.labels(6)
        expected = bag_entropy(labels)
        assert torch.equal(bag_entropy(labels.int()), expected)
        assert torch.equal(bag_entropy(labels.transpose(0, 2).contiguous().transpose(0, 2)), expected)
        assert torch.equal(bag_entropy(torch.where(labels == IGNORE, 3, labels + 4), ignore_index=3), expected)
        assert bag_entropy(torch.empty(3, 0, 2, dtype=torch.long)).shape == (3, 0)

    @pytest.mark.parametrize(
        ("labels", "options", "message"),
        [
            (torch.tensor(3), {}, "^labels: "),
            (torch.zeros(3, 0, dtype=torch.long), {}, r"^labels: .* s >= 1, got shape \(3, 0\)"),
            (TOKENS, dict(position_weights=torch.ones(3)), r"^position_weights: .*\(12,\)"),
            (TOKENS, dict(label_weights=torch.ones(3)), r"^label_weights: .*\(12,\), got shape \(3,\)"),
            (TOKENS, dict(label_weights=-torch.ones(12)), "^label_weights: expected finite .*-1.0"),
            (TOKENS, dict(label_weights=torch.full((12,), math.nan)), "^label_weights: expected finite .*a NaN"),
            (TOKENS, dict(label_weights=torch.full((12,), math.inf)), "^label_weights: expected finite .*inf"),
        ],
    )
    def test_bad_arguments(self, labels, options, message):
        with pytest.raises(ValueError, match=message):
            bag_entropy(labels, **options)
