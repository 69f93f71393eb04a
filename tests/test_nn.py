"""The modules."""

import pytest
import torch
import torch.nn.functional as F

from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, reference
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

    def test_padding_and_weights(self):
        options = dict(padding_idx=-100, position_weights="power_law")
        module, ids = BagEmbedding(11, 5, **options), torch.randint(11, (2, 3, 4))
        ids[0, 1, 2:] = ids[1, 2] = -100
        assert torch.equal(module(ids), bag_embedding(ids, module.weight, **options))
        assert not module(ids)[1, 2].any()
        # Tokens: as bags of one, where position weights have nothing to say.
        tokens = ids[:, :, 2]
        out = module(tokens)
        assert torch.equal(out[tokens != -100], module.weight[tokens[tokens != -100]])
        assert (tokens == -100).any() and not out[tokens == -100].any()

    @pytest.mark.parametrize("padding_idx", [-100, -3, 0, 3])
    def test_every_row_is_initialised(self, padding_idx):
        # nn.Embedding's own padding row would be zeros, and what libraries write there too.
        module = BagEmbedding(11, 5, padding_idx=padding_idx, device="meta").to_empty(device="cpu")
        module.reset_parameters()
        assert module.weight.any(1).all() and module.padding_idx is None and module.bag_padding_idx == padding_idx

    def test_a_tensor_of_weights_moves_with_the_module(self):
        module = BagEmbedding(11, 5, position_weights=torch.tensor([1.0, 0.5]))
        assert list(module.state_dict()) == ["weight"] and module.to("meta").position_weights.is_meta

    def test_repr_shows_the_options(self):
        module = BagEmbedding(11, 5, padding_idx=-100, position_weights="power_law")
        assert repr(module) == "BagEmbedding(11, 5, mode='mean', padding_idx=-100, position_weights='power_law')"

    @pytest.mark.parametrize("padding_idx", [None, -100])
    def test_sparse_gradients_of_tokens_and_bags(self, padding_idx):
        table = torch.nn.Parameter(torch.randn(11, 5))
        module = BagEmbedding.from_pretrained(table, freeze=False, padding_idx=padding_idx, sparse=True)
        assert isinstance(module.sparse, bool) and repr(module).count("sparse=True") == 1
        for ids in (torch.tensor([[7, 2, 7]]), torch.tensor([[[7, 2], [2, 2]]])):
            (gradient,) = torch.autograd.grad(module(ids).sum(), table)
            assert gradient.is_coalesced() and gradient.indices().tolist() == [[2, 7]]
            assert torch.equal(gradient.to_dense()[7], torch.full((5,), 2.0 if ids.dim() == 2 else 0.5))
            assert not torch.autograd.grad(BagEmbedding.from_pretrained(table, freeze=False)(ids).sum(), table)[
                0
            ].is_sparse

    def test_from_pretrained_shares_a_trained_parameter(self):
        # Two Parameters over one table would have a gradient each, and a tied head would be tied no longer.
        table = torch.nn.Parameter(torch.randn(11, 5))
        assert BagEmbedding.from_pretrained(table, freeze=False).weight is table
        frozen = BagEmbedding.from_pretrained(table).weight
        assert table.requires_grad and not frozen.requires_grad and frozen.data_ptr() == table.data_ptr()
        constant = torch.nn.Parameter(torch.randn(11, 5), requires_grad=False)
        assert BagEmbedding.from_pretrained(constant, freeze=False).weight.requires_grad

    @pytest.mark.parametrize("freeze", [False, True])
    def test_from_pretrained_refuses_a_table_that_no_gradient_would_reach(self, freeze):
        table = torch.randn(11, 5, requires_grad=True)
        for computed in (table, table * 2):
            with pytest.raises(ValueError, match="embeddings: expected a Parameter or a constant.*requires_grad=True"):
                BagEmbedding.from_pretrained(computed, freeze=freeze)

    def test_errors(self):
        with pytest.raises(ValueError, match="mode"):
            BagEmbedding(11, 5, mode="max")
        with pytest.raises(ValueError, match=r"input_ids.*\(3,\)"):
            BagEmbedding(11, 5)(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    "module",
    [BagEmbedding, BagEmbedding.from_pretrained, LinearMultiHotCrossEntropy],
    ids=["BagEmbedding", "from_pretrained", "LinearMultiHotCrossEntropy"],
)
class TestWeightsAreConstant:
    """No op computes a gradient of position weights: a module that took trained ones would leave them untrained."""

    def build(self, module, weights):
        sizes = (torch.zeros(11, 5),) if module == BagEmbedding.from_pretrained else (11, 5)
        return module(*sizes, position_weights=weights)

    @pytest.mark.parametrize("trained", [torch.nn.Parameter, lambda w: w.requires_grad_() * 2])
    def test_trained_weights(self, module, trained):
        with pytest.raises(ValueError, match=r"position_weights: expected a constant.*\(4,\), requires_grad=True"):
            self.build(module, trained(torch.ones(4)))

    def test_another_rank_or_type(self, module):
        with pytest.raises(ValueError, match=r"position_weights: .* shape \(s,\), got shape \(1, 4\)"):
            self.build(module, torch.ones(1, 4))
        with pytest.raises(TypeError, match="position_weights: expected a tensor, got list"):
            self.build(module, [1.0, 0.5])

    def test_constant_weights(self, module):
        self.build(module, torch.nn.Parameter(torch.ones(4), requires_grad=False))
        self.build(module, torch.ones(4, dtype=torch.int64))


class TestLinearMultiHotCrossEntropy:
    @pytest.mark.parametrize("bias", [False, True])
    def test_parameters_are_those_of_a_linear_layer(self, bias):
        torch.manual_seed(0)
        module = LinearMultiHotCrossEntropy(5, 11, bias=bias)
        torch.manual_seed(0)
        linear = torch.nn.Linear(5, 11, bias=bias)
        assert list(module.state_dict()) == list(linear.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), linear.parameters(), strict=True))
        assert len(list(module.named_parameters())) == 1 + bias and (module.bias is None) != bias

    def test_tools_that_exchange_linear_layers_pass_it_by(self):
        """torchao's float8, and LoRA: the body changes, the head keeps its loss or is refused by name."""
        from peft import LoraConfig, inject_adapter_in_model
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        def build():
            torch.manual_seed(0)
            model = torch.nn.Module()
            model.body, model.head = torch.nn.Linear(16, 16), LinearMultiHotCrossEntropy(16, 32)
            return model

        hidden, labels = torch.randn(16, 16), torch.randint(32, (16, 4))
        model, low = build(), convert_to_float8_training(build(), config=Float8LinearConfig(emulate=True))
        assert type(low.body).__name__ == "Float8Linear"
        assert torch.equal(low.head(hidden, labels), model.head(hidden, labels))
        model = inject_adapter_in_model(LoraConfig(target_modules="all-linear", init_lora_weights=False), build())
        assert "lora" in type(model.body).__module__
        assert torch.equal(model.head(hidden, labels), low.head(hidden, labels))
        with pytest.raises(ValueError, match="LinearMultiHotCrossEntropy.*is not supported"):
            inject_adapter_in_model(LoraConfig(target_modules=["head"]), build())

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

    def test_options_of_the_call_come_before_those_of_the_module(self):
        module, hidden = LinearMultiHotCrossEntropy(5, 11, z_loss=0.1), torch.randn(2, 3, 5)
        labels = torch.randint(11, (2, 3, 4))
        loss, lse = module(hidden, labels, normalizer=7, z_loss=0.2, return_lse=True)
        assert loss == linear_multi_hot_cross_entropy(hidden, module.weight, labels, normalizer=7, z_loss=0.2)
        assert lse.shape == (2, 3)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("cap", [None, 0.5])
    def test_logits_and_loss_are_of_one_model(self, bias, cap):
        module, hidden = (
            LinearMultiHotCrossEntropy(5, 11, bias=bias, logit_softcap=cap).double(),
            torch.randn(7, 5).double(),
        )
        labels = torch.randint(11, (7, 4))
        loss = reference.multi_hot_cross_entropy(module(hidden), labels)
        torch.testing.assert_close(module(hidden, labels), loss, rtol=1e-14, atol=0)
        assert cap is None or module(hidden).abs().max() < cap

    def test_state_dict_is_that_of_a_linear(self):
        for bias in (False, True):
            module = LinearMultiHotCrossEntropy(5, 11, bias=bias)
            torch.nn.Linear(5, 11, bias=bias).load_state_dict(module.state_dict())

    def test_repr_shows_the_options(self):
        module = LinearMultiHotCrossEntropy(5, 11, bias=True, logit_softcap=30.0, objective="mce_alt")
        assert repr(module).endswith("out_features=11, bias=True, logit_softcap=30.0, objective='mce_alt')")

    @pytest.mark.parametrize("name", ["label_smooth", "weight", "labels"])
    def test_unknown_option(self, name):
        with pytest.raises(TypeError, match=f"unknown option {name}"):
            LinearMultiHotCrossEntropy(5, 11, **{name: 0.1})
