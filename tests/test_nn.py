"""The modules."""

import pytest
import torch
import torch.nn.functional as F

from tst_ext import linear_multi_hot_cross_entropy, reference
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy


class TestBagEmbedding:
    def test_two_dimensions_are_an_ordinary_embedding(self):
        module, ids = BagEmbedding(11, 5), torch.randint(11, (2, 6))
        assert torch.equal(module(ids), F.embedding(ids, module.weight))

    @pytest.mark.parametrize("mode", ["mean", "sum"])
    def test_three_dimensions_are_bags(self, mode):
        module, ids = BagEmbedding(11, 5, mode=mode), torch.randint(11, (2, 3, 4))
        # Sums of four float32 numbers: the order of the additions is free.
        torch.testing.assert_close(module(ids), reference.bag_embedding(ids, module.weight, mode=mode))

    def test_state_dict_is_that_of_an_embedding(self):
        torch.nn.Embedding(11, 5).load_state_dict(BagEmbedding(11, 5).state_dict())

    def test_from_pretrained(self):
        table, ids = torch.randn(11, 5), torch.randint(11, (2, 3, 4))
        module = BagEmbedding.from_pretrained(table, mode="sum")
        assert module.weight.data_ptr() == table.data_ptr() and not module.weight.requires_grad
        torch.testing.assert_close(module(ids), reference.bag_embedding(ids, table, mode="sum"))
        assert BagEmbedding.from_pretrained(table, freeze=False).weight.requires_grad

    def test_errors(self):
        with pytest.raises(ValueError, match="mode"):
            BagEmbedding(11, 5, mode="max")
        with pytest.raises(ValueError, match=r"input_ids.*\(3,\)"):
            BagEmbedding(11, 5)(torch.tensor([1, 2, 3]))


class TestLinearMultiHotCrossEntropy:
    def test_without_labels_it_is_the_head(self):
        module, hidden = LinearMultiHotCrossEntropy(5, 11), torch.randn(2, 3, 5)
        assert torch.equal(module(hidden), F.linear(hidden, module.weight))

    def test_options_reach_the_loss(self):
        options = dict(position_weights="power_law", ignore_index=3, reduction="sum", chunk_size=2)
        module, hidden = LinearMultiHotCrossEntropy(5, 11, **options), torch.randn(2, 3, 5)
        labels = torch.randint(11, (2, 3, 4))
        loss = module(hidden, labels)
        assert loss == linear_multi_hot_cross_entropy(hidden, module.weight, labels, **options)
        assert loss != linear_multi_hot_cross_entropy(hidden, module.weight, labels)

    def test_state_dict_is_that_of_a_linear(self):
        torch.nn.Linear(5, 11, bias=False).load_state_dict(LinearMultiHotCrossEntropy(5, 11).state_dict())
