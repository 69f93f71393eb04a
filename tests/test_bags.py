"""Folding and position weights."""

import math

import pytest
import torch

from tst_ext import fold_inputs, fold_labels, position_weights

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

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="'power'"):
            position_weights("power", 3)
        with pytest.raises(ValueError, match="bag_size"):
            position_weights("uniform", 0)
