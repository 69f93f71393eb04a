"""The model in both phases."""

import math

import pytest
import torch

from tst_ext import fold_inputs, fold_labels
from tst_ext.train.config import ModelConfig
from tst_ext.train.model import Transformer, rotate

VOCABULARY, POSITIONS = 50, 8
CONFIG = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG, VOCABULARY, POSITIONS)


def tokens(bag_size, batch=2):
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(VOCABULARY, (batch, POSITIONS * bag_size + 1), generator=generator)
    return stream[:, :-1], stream[:, 1:]


def bags(bag_size):
    ids, labels = tokens(bag_size)
    if bag_size == 1:
        return ids, labels
    return fold_inputs(ids, bag_size), fold_labels(labels, bag_size, shifted=True)


@pytest.mark.parametrize("bag_size", [1, 2, 4])
class TestBothPhases:
    def test_a_token_changes_nothing_before_its_bag(self, model, bag_size):
        ids, _ = tokens(bag_size)
        folded = (lambda t: fold_inputs(t, bag_size)) if bag_size > 1 else (lambda t: t)
        before = model(folded(ids))
        for position in range(1, POSITIONS):
            changed = ids.clone()
            changed[:, position * bag_size] = (changed[:, position * bag_size] + 1) % VOCABULARY
            after = model(folded(changed))
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position], after[:, position])

    def test_fresh_model_has_loss_log_v(self, model, bag_size):
        # Logits of the initial weights have a standard deviation of about 0.02 sqrt(dim) = 0.11, which moves the mean
        # of lse - z by its variance / 2 = 0.006 and by 0.11 / sqrt(16 rows) = 0.03 through the labels drawn.
        loss = model(*bags(bag_size)).item()
        assert abs(loss - math.log(VOCABULARY)) < 4 * 0.03

    def test_every_parameter_gets_a_gradient(self, model, bag_size):
        model(*bags(bag_size)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_loss_is_that_of_the_logits(self, model, bag_size):
        ids, labels = bags(bag_size)
        logits = model(ids).flatten(0, 1).double()
        positions = labels.reshape(len(logits), -1).T
        losses = [torch.nn.functional.cross_entropy(logits, y) for y in positions]
        # float32 logits summed in another order
        assert abs(model(ids, labels).item() - torch.stack(losses).mean().item()) < 1e-5

    def test_compiles_without_graph_break(self, model, bag_size):
        torch._dynamo.reset()
        ids, labels = bags(bag_size)
        eager = model(ids, labels)
        eager.backward()
        gradient = model.head.weight.grad.clone()
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels)
        compiled.backward()
        # aot_eager decomposes some ops, which reorders their sums
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
        assert (model.head.weight.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_rotation_keeps_norms_and_depends_on_distance_alone(model):
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 8, generator=generator).double()
    cos, sin = model.cos.double(), model.sin.double()
    at = [(rotate(q, cos[i], sin[i]), rotate(k, cos[i], sin[i])) for i in range(POSITIONS)]
    assert all(abs(a.norm() - q.norm()) < 1e-6 for a, _ in at)
    assert abs(at[5][0] @ at[2][1] - at[4][0] @ at[1][1]) < 1e-6
    assert abs(at[5][0] @ at[2][1] - at[5][0] @ at[1][1]) > 1e-3


def test_grouped_heads_are_shared():
    # With one key-value head per query head set to the same weights, grouped attention must give the same output.
    torch.manual_seed(0)
    grouped = Transformer(CONFIG, VOCABULARY, POSITIONS)
    full = Transformer(ModelConfig(dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=64), VOCABULARY, POSITIONS)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith("qkv.weight"):
            q, k, v = state[name].split([32, 16, 16])
            k, v = (t.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for t in (k, v))
            state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    ids, _ = tokens(1)
    assert (grouped(ids) - full(ids)).norm() < 1e-5 * full(ids).norm()
