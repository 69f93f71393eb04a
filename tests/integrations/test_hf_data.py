"""fold_batch: what a collator of transformers makes, in bags. The tests of the Trainer read samples."""

import pytest
import torch

from helpers.hf_cases import tokens
from tst_ext import fold_inputs, fold_labels
from tst_ext.integrations.hf import fold_batch


class TestFoldBatch:
    def test_no_target_is_visible_to_its_bag(self):
        ids = torch.arange(1, 25).view(2, 12)
        folded = fold_batch(dict(input_ids=ids, labels=ids), 4)
        assert torch.equal(folded["input_ids"], fold_inputs(ids, 4))
        assert torch.equal(folded["labels"], fold_labels(ids, 4, shifted=False))
        assert folded["labels"][0].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [-100] * 4]
        assert folded["shift_labels"] is folded["labels"]

    @pytest.mark.parametrize("extra", [dict(position_ids=None), dict(token_type_ids=None)])
    def test_other_tensors_are_named(self, extra):
        ids = tokens(2, 4)
        with pytest.raises(ValueError, match=f"^batch: expected input_ids, labels.*{next(iter(extra))}"):
            fold_batch(dict(input_ids=ids, labels=ids, **extra), 2)
        with pytest.raises(ValueError, match=r"^batch: .*got \['input_ids'\]"):
            fold_batch(dict(input_ids=ids), 2)
