"""Folding and position weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from tst_ext import bag_embedding, document_offsets, fold_inputs, fold_labels, multi_hot_cross_entropy, position_weights

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
        bags, targets = [], []  # of each sequence
        for row in ids.tolist():
            documents = [[]]
            for token in row:
                documents[-1].append(token)
                if token == EOS:
                    documents.append([])
            bags.append([]), targets.append([])
            for document in documents:
                cut = [document[i : i + bag_size] for i in range(0, len(document), bag_size)]
                bags[-1] += cut
                targets[-1] += [*cut[1:], []] if cut else []
        most = max(len(row) for row in bags)

        def table(rows):
            filled = [row + [[]] * (most - len(row)) for row in rows]
            return torch.tensor([[bag + [PADDING] * (bag_size - len(bag)) for bag in row] for row in filled])

        inputs = fold_inputs(ids, bag_size, cu_seqlens=cu_seqlens)
        labels = fold_labels(ids, bag_size, shifted=False, cu_seqlens=cu_seqlens)
        assert torch.equal(inputs, table(bags)) and torch.equal(labels, table(targets))
        following = F.pad(ids.flatten()[1:], (0, 1), value=99).view_as(ids)
        assert torch.equal(fold_labels(following, bag_size, shifted=True, cu_seqlens=cu_seqlens), labels)

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

    def test_without_data(self):
        # On another device than the CPU no value is read, given the number of bags: nothing waits for the device.
        ids, cu_seqlens = (
            torch.empty(2, 12, dtype=torch.long, device="meta"),
            torch.empty(5, dtype=torch.long, device="meta"),
        )
        assert fold_inputs(ids, 4, cu_seqlens=cu_seqlens, num_bags=5).shape == (2, 5, 4)
        assert fold_labels(ids, 4, shifted=True, cu_seqlens=cu_seqlens, num_bags=5).shape == (2, 5, 4)

    def test_offsets_in_bags(self):
        # The recipe of docs/ops.md for attention within documents.
        ids = stream([3, 4, 5, 1, 7], 20)[0]
        cu_seqlens, s = document_offsets(ids, EOS), 3
        cu_bags = F.pad(((cu_seqlens.diff() + s - 1) // s).cumsum(0), (1, 0))
        bags = fold_inputs(ids, s, cu_seqlens=cu_seqlens)
        assert cu_bags[-1] == len(bags)
        assert torch.equal(bags[cu_bags[:-1], 0], ids[cu_seqlens[:-1]])

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
