"""The mixture of experts: against transformers' Qwen3, in every way of running it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from helpers.processes import in_processes, needs_gloo
from helpers.runs import assert_close_runs, assert_same_run, lines, run, tensors
from tst_ext import fold_inputs, fold_labels
from tst_ext.lab.export import export_hf
from tst_ext.train import checkpoint, experts
from tst_ext.train.config import ModelConfig, TrainConfig
from tst_ext.train.distributed import Processes
from tst_ext.train.experts import Balance, Router, Routing, grouped_linear
from tst_ext.train.files import UserError
from tst_ext.train.flops import matrix_parameters, parameters
from tst_ext.train.loop import train
from tst_ext.train.model import Transformer

V, L = 50, 16
CONFIG = ModelConfig(
    dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=24, qk_norm=True, experts=6, experts_per_token=2, balance_rate=0.01
)


def make(**changes):
    """A model whose routers decide clearly: with initial weights all experts are equally probable to 1 %."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, **changes), V, L)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif not name.startswith("embedding"):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def batch(bag_size=1, sequences=4):
    tokens = torch.randint(V, (sequences, L * bag_size + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    return (ids, labels) if bag_size == 1 else (fold_inputs(ids, bag_size), fold_labels(labels, bag_size, shifted=True))


def gradients(model, *batches, **options):
    """The losses of a model and the sum of their gradients, by name."""
    losses = []
    for ids, labels in batches:
        loss = model(ids, labels, **options)
        loss.backward()
        losses.append(loss.detach())
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return torch.stack(losses), found


def assert_close(actual, expected, rtol):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= rtol * expected[name].norm(), name


class TestAgainstTransformers:
    # In float64, but for what transformers computes in float32 whatever the dtype: norms, the router's softmax, and the
    # rotary angles. Measured: 4e-9 of the loss, 1.2e-6 of the norm of a gradient, at most.
    RTOL = 3e-6

    @pytest.fixture
    def pair(self, tmp_path):
        def load(**changes):
            model = make(**changes)
            config = TrainConfig(model=dataclasses.replace(CONFIG, **changes), latent_tokens=L)
            export_hf(model, config, None, None, tmp_path / "hf")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "hf",
                dtype=torch.float64,
                experts_implementation="eager",  # grouped_mm has no float64
            )
            assert type(theirs) is transformers.Qwen3MoeForCausalLM
            return model.double(), theirs

        return load

    def theirs(self, model, ids, labels, balance=0.0):
        """Their loss, without rounding logits to float32 as their own does."""
        output = model(ids, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        (loss + balance * output.aux_loss).backward()
        return loss.item(), output.aux_loss.item()

    def names(self, theirs):
        """Their gradients by our names."""
        found = {}
        grads = {name: p.grad for name, p in theirs.named_parameters()}
        for i in range(theirs.config.num_hidden_layers):
            layer, block = f"model.layers.{i}", f"blocks.{i}"
            attention = [grads[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
            found[f"{block}.attention.qkv.weight"] = torch.cat(attention)
            found[f"{block}.attention.out.weight"] = grads[f"{layer}.self_attn.o_proj.weight"]
            for norm in ("q_norm", "k_norm"):
                found[f"{block}.attention.{norm}.weight"] = grads[f"{layer}.self_attn.{norm}.weight"]
            found[f"{block}.attention_norm.weight"] = grads[f"{layer}.input_layernorm.weight"]
            found[f"{block}.ffn_norm.weight"] = grads[f"{layer}.post_attention_layernorm.weight"]
            found[f"{block}.experts.router.weight"] = grads[f"{layer}.mlp.gate.weight"]
            found[f"{block}.experts.ffn_in"] = grads[f"{layer}.mlp.experts.gate_up_proj"]
            found[f"{block}.experts.ffn_out"] = grads[f"{layer}.mlp.experts.down_proj"]
        found["embedding.weight"] = grads["model.embed_tokens.weight"]
        found["norm.weight"], found["head.weight"] = grads["model.norm.weight"], grads["lm_head.weight"]
        return found

    def test_loss_and_gradients(self, pair):
        ours, theirs = pair(balance_rate=0.0)
        loss, found = gradients(ours, batch())
        expected, _ = self.theirs(theirs, *batch())
        assert math.isclose(loss.item(), expected, rel_tol=self.RTOL)
        assert_close(found, self.names(theirs), self.RTOL)

    def test_with_the_load_balancing_loss(self, pair):
        """Of one layer; of several, theirs lets layers make up for each other."""
        ours, theirs = pair(layers=1, balance_rate=1.0)
        loss, found = gradients(ours, batch())
        expected, balance = self.theirs(theirs, *batch(), balance=1.0)
        assert balance > 1.02 * CONFIG.experts_per_token, "unequal loads, or the test shows nothing"
        assert math.isclose(loss.item(), expected, rel_tol=self.RTOL)
        assert_close(found, self.names(theirs), self.RTOL)


@pytest.mark.parametrize("bag_size", [1, 4])
class TestBothPhases:
    def test_fresh_model_has_loss_log_v(self, bag_size):
        torch.manual_seed(0)
        loss = Transformer(CONFIG, V, L)(*batch(bag_size)).item()
        # As in test_model.py: logits of deviation 0.02 sqrt(dim), of which the mean over 64 rows is left.
        assert abs(loss - math.log(V)) < 4 * 0.02

    def test_every_parameter_gets_a_gradient(self, bag_size):
        _, found = gradients(make(shared_experts=1), batch(bag_size, sequences=8))
        for name, gradient in found.items():
            per_matrix = gradient.flatten(1) if gradient.dim() == 3 else gradient.reshape(1, -1)
            assert (per_matrix.abs().sum(1) > 0).all(), name

    def test_value_is_the_loss_of_the_logits_alone(self, bag_size):
        model, (ids, labels) = make(balance_rate=100.0), batch(bag_size)
        logits = model(ids).flatten(0, 1).double()
        expected = torch.stack([F.cross_entropy(logits, y) for y in labels.reshape(len(logits), -1).T]).mean()
        assert math.isclose(model(ids, labels).item(), expected.item(), rel_tol=1e-6)
        with torch.no_grad():
            assert model(ids, labels) == model(ids, labels).detach()

    def test_a_token_changes_nothing_before_its_bag(self, bag_size):
        model, (ids, _) = make().double(), batch(bag_size)  # in float64, as the sizes of the groups change the rounding
        before = model(ids)
        for position in (1, L // 2, L - 1):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % V
            after = model(changed)
            assert (before - after)[:, :position].abs().max() < 1e-12
            assert (before - after)[:, position].abs().min(0).values.max() > 1e-6

    def test_no_position_is_dropped(self, bag_size):
        model = make()
        model(*batch(bag_size))
        assert model.balance.load.sum(1).tolist() == [4 * L * CONFIG.experts_per_token] * CONFIG.layers
        load = model.end_step()
        assert load.shape == (CONFIG.layers, CONFIG.experts) and load.std() > 0.1
        torch.testing.assert_close(load.mean(1), torch.ones(CONFIG.layers, dtype=torch.float64), rtol=1e-12, atol=0)


def test_experts_that_are_equal_are_one_dense_layer():
    model = make(balance_rate=0.0)
    dense = Transformer(dataclasses.replace(CONFIG, experts=0), V, L)
    state = {name: t for name, t in model.state_dict().items() if ".experts." not in name}
    for i, block in enumerate(model.blocks):
        for name in ("ffn_in", "ffn_out"):
            stack = getattr(block.experts, name).data
            stack.copy_(stack[:1].expand_as(stack))
            state[f"blocks.{i}.{name}.weight"] = stack[0]
    dense.load_state_dict(state)
    ids, labels = batch()
    (loss, ours), (expected, theirs) = gradients(model, (ids, labels)), gradients(dense, (ids, labels))
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    summed = {f"blocks.{i}.{name}.weight": ours[f"blocks.{i}.experts.{name}"].sum(0)
              for i in range(CONFIG.layers) for name in ("ffn_in", "ffn_out")}  # fmt: skip
    kept = {name: gradient for name, gradient in ours.items() if ".experts." not in name}
    # float32 sums in another order
    assert_close(kept | summed, theirs, 1e-5)


def test_shared_experts_are_a_dense_layer_in_addition():
    model = make(shared_experts=2)
    for block in model.blocks:
        block.experts.ffn_out.data.zero_()
    wide = Transformer(dataclasses.replace(CONFIG, experts=0, ffn_dim=2 * CONFIG.ffn_dim), V, L)
    wide.load_state_dict({name: t for name, t in model.state_dict().items() if ".experts." not in name})
    ids, labels = batch()
    assert torch.equal(model(ids, labels), wide(ids, labels))


class TestBalance:
    def test_formula_over_the_parts_of_a_step(self):
        """With what the step has seen so far: [6, 2] of the first part's 8 choices, then [8, 8] of 16."""
        balance = Balance(dataclasses.replace(CONFIG, layers=1, experts=2, experts_per_token=1, balance_rate=0.1))
        for counts, probabilities, shares in (([6, 2], [0.7, 0.3], [0.75, 0.25]), ([2, 6], [0.4, 0.6], [0.5, 0.5])):
            routing = Routing(torch.tensor(counts), torch.tensor(probabilities))
            expected = 0.1 / 2 * 2 * sum(f * p for f, p in zip(shares, probabilities, strict=True))
            assert balance([routing], parts=2).item() == pytest.approx(expected, rel=1e-6)

    def test_layers_do_not_make_up_for_each_other(self):
        balance = Balance(dataclasses.replace(CONFIG, layers=2, experts=2, experts_per_token=1, balance_rate=0.1))
        counts, probabilities = [[6, 2], [2, 6]], [[0.7, 0.3], [0.3, 0.7]]
        routings = [Routing(torch.tensor(c), torch.tensor(p)) for c, p in zip(counts, probabilities, strict=True)]
        assert balance(routings, parts=1).item() == pytest.approx(0.1 * 2 * (0.75 * 0.7 + 0.25 * 0.3), rel=1e-6)

    def test_counts_begin_anew_with_each_step(self):
        model, loads = make(), []
        for sequences in (1, 4):
            ids, labels = batch(sequences=sequences)
            model(ids, labels)
            loads.append(model.end_step())
        alone = make()
        alone(ids, labels)
        assert torch.equal(loads[1], alone.end_step()) and not torch.equal(loads[0], loads[1])

    def test_validation_is_not_counted(self):
        model, (ids, labels) = make(), batch()
        with torch.no_grad():
            model(ids, labels)
        model(ids)  # generation
        assert model.balance.load.sum() == 0

    def test_it_evens_the_loads_out(self):
        """Of one layer whose router prefers two experts, by its gradient alone."""
        loads = []
        for rate in (0.0, 1.0):
            model = make(layers=1, balance_rate=rate)
            (router,) = model.routers()
            router.weight.data[:2] += 0.3
            optimizer = torch.optim.SGD([router.weight], lr=0.05)
            for _ in range(50):
                model(*batch()).backward()
                optimizer.step()
                optimizer.zero_grad()
                load = model.end_step()
            loads.append(load.max().item())
        assert loads[1] < 0.9 * loads[0]


def test_initial_weights():
    torch.manual_seed(0)
    for options in ({}, {"layers": 8}, {"shared_experts": 2}):
        config = dataclasses.replace(CONFIG, **options)
        writers = config.layers * (3 if config.shared_experts else 2)
        layer = Transformer(config, V, L).blocks[0].experts
        # 4608 weights or more: the deviation is right to 1 / sqrt(2 * 4608) = 1 %, the router's 192 to 5 %.
        assert layer.ffn_in.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.ffn_out.std().item() == pytest.approx(0.02 / writers**0.5, rel=0.05)
        assert layer.router.weight.std().item() == pytest.approx(0.02, rel=0.25)


class TestBias:
    def test_chooses_and_does_not_weigh(self):
        torch.manual_seed(0)
        router = Router(dataclasses.replace(CONFIG, balance="bias"))
        torch.nn.init.normal_(router.weight)
        x = torch.randn(20, CONFIG.dim)
        router.bias.copy_(torch.tensor([0.0, 200.0, 0.0, 0.0, 200.0, 0.0]))  # above any logit
        weights, chosen, routing = router(x)
        assert chosen.sort(1).values.tolist() == [[1, 4]] * 20
        assert routing.counts.tolist() == [0, 20, 0, 0, 20, 0]
        two = (x @ router.weight.T).softmax(-1)[:, [1, 4]]
        expected = (two / two.sum(1, keepdim=True)).gather(1, (chosen == 4).long())
        torch.testing.assert_close(weights, expected)

    def test_weights_are_finite_where_it_chooses_the_improbable(self):
        router = Router(dataclasses.replace(CONFIG, experts=3, balance="bias"))
        with torch.no_grad():
            router.weight.copy_(torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, CONFIG.dim))
        router.bias.copy_(torch.tensor([0.0, 1000.0, 1000.0]))
        weights, chosen, _ = router(torch.full((1, CONFIG.dim), 10.0))  # the first logit is 320 above the others
        assert chosen.sort().values.tolist() == [[1, 2]] and weights.tolist() == [[0.5, 0.5]]

    def test_moves_towards_even_loads(self):
        model = make(balance="bias", balance_rate=0.01)
        loss, found = gradients(model, batch())
        load = model.end_step()
        for router, busy in zip(model.routers(), load, strict=True):
            signs = torch.sign(1 - busy)
            torch.testing.assert_close(router.bias, (0.01 * (signs - signs.mean())).float())
        _, without = gradients(make(balance_rate=0.0), batch())
        assert all(torch.equal(found[name], without[name]) for name in without), "no loss of its own"
        for _ in range(100):
            model(*batch())
            last = model.end_step()
        assert (last - 1).norm() < 0.5 * (load - 1).norm()


def routers_stay_float32(rank):
    config = TrainConfig(model=CONFIG, latent_tokens=L, dtype="bfloat16")
    processes = Processes("cpu")
    processes.rank, processes.world = rank, 2
    model = Transformer(config.model, V, L)
    processes.parallelise(model, config)
    seen = []
    for module in (model.blocks[0].experts, model.blocks[0].experts.router):  # in the order of their calls
        module.register_forward_pre_hook(lambda m, _: seen.append({p.dtype for p in m.parameters(recurse=False)}))
    model(*batch()).backward()
    assert seen == [{torch.bfloat16}, {torch.float32}]


class TestRouterPrecision:
    def test_is_float32_under_autocast(self):
        """A token equidistant to two experts but for 1e-4, which bfloat16 does not see."""
        router = Router(dataclasses.replace(CONFIG, experts_per_token=1))
        with torch.no_grad():
            router.weight.zero_()
            router.weight[2, 0], router.weight[4, 0] = 1.0, 1.0001
        x = torch.zeros(1, CONFIG.dim)
        x[0, 0] = 1.0
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16):
                weights, chosen, routing = router(x.to(dtype))
            assert chosen.item() == 4 and weights.dtype == routing.probabilities.dtype == torch.float32

    @pytest.mark.extended
    @needs_gloo
    def test_is_float32_in_shards_of_bfloat16(self, tmp_path):
        in_processes(2, routers_stay_float32, tmp_path)


class TestGroupedLinear:
    """One result by torch's grouped GEMM and by a loop, whose groups may be empty."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("counts", [[3, 0, 5, 4], [0, 0, 12, 0], [12, 0, 0, 0], [0, 0, 0, 12]])
    def test_grouped_mm_is_the_loop(self, dtype, counts):
        torch.manual_seed(0)
        x, weight = torch.randn(12, 16, dtype=dtype), torch.randn(4, 8, 16, dtype=dtype)
        upstream = torch.randn(12, 8, dtype=dtype)

        def results(function):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            y = function(*leaves, torch.tensor(counts))
            y.backward(upstream)
            return y.detach(), *(leaf.grad for leaf in leaves)

        grouped, loop = results(grouped_linear), results(experts._in_a_loop)
        exact = torch.cat([rows.double() @ w.double().T for rows, w in zip(x.split(counts), weight, strict=True)])
        for a, b in zip(grouped, loop, strict=True):
            assert a.dtype == b.dtype == dtype
            # sums of at most 16 products, in another order, rounded once
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
        # the products that make it up are below 16 in size
        torch.testing.assert_close(loop[0].double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)

    def test_autocast(self):
        x, weight = torch.randn(12, 16), torch.randn(4, 8, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = grouped_linear(x, weight, torch.tensor([3, 0, 5, 4]))
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, grouped_linear(x.bfloat16(), weight.bfloat16(), torch.tensor([3, 0, 5, 4])))


class TestCounts:
    @pytest.mark.parametrize("changes", [{}, {"shared_experts": 2}, {"qk_norm": False}, {"balance": "bias"}])
    def test_parameters(self, changes):
        config = dataclasses.replace(CONFIG, **changes)
        model = Transformer(config, V, L)
        assert parameters(config, V) == sum(p.numel() for p in model.parameters())
        idle = (config.experts - config.experts_per_token) * 3 * config.dim * config.ffn_dim * config.layers
        gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        assert matrix_parameters(config, V) == parameters(config, V) - idle - gains - V * config.dim


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"experts": -1}, "experts: expected an integer >= 0, got -1"),
            ({"experts": 4, "experts_per_token": 5}, "experts_per_token: expected at most experts = 4, got 5"),
            ({"experts": 4, "experts_per_token": 0}, "experts_per_token: expected an integer >= 1, got 0"),
            ({"shared_experts": 1}, "shared_experts: expected 0 without experts, got 1"),
            ({"experts": 4, "balance": "luck"}, "balance: expected one of loss, bias, got 'luck'"),
            ({"experts": 4, "balance_rate": -1.0}, "balance_rate: expected a number >= 0, got -1.0"),
        ],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(UserError, match=message):
            ModelConfig(**options)


@pytest.fixture(scope="module")
def tiny_experts(tiny):
    size = dict(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=32, qk_norm=True)
    return dataclasses.replace(tiny, model=ModelConfig(**size, experts=4, balance_rate=0.1))


@pytest.fixture(scope="module")
def straight(tiny_experts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "run"
    train(tiny_experts, folder, progress=False)
    return folder


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


class TestRuns:
    # Sums in another order: as in test_processes.py. That a position chooses another expert for it has not been seen.
    RTOL = 1e-4

    def test_metrics_have_the_loads(self, straight):
        logged = [line for line in lines(straight) if "loss" in line]
        assert len(logged) == 30
        assert all(0 <= line["load_min"] < 1 < line["load_max"] <= 2 for line in logged)  # 2 of 4 experts: at most 2
        tables = [line["load"] for line in lines(straight) if "val_loss" in line]
        assert len(tables) == 3
        for table in tables:
            assert [len(layer) for layer in table] == [4, 4]
            assert all(sum(layer) == pytest.approx(4, abs=4e-4) for layer in table)

    @pytest.mark.extended
    def test_it_learns(self, tiny_experts, tmp_path):
        result = train(dataclasses.replace(tiny_experts, steps=300), tmp_path / "run", progress=False)
        assert 0.9 < result["val_loss"] < 2.0  # the source has 0.95 nats of entropy a token, ignorance log 64 = 4.16

    @pytest.mark.parametrize(
        "changes",
        [pytest.param({}, marks=pytest.mark.extended), dict(balance="bias", shared_experts=1)],
        ids=["loss", "bias"],
    )
    def test_kill_9_bit_for_bit(self, tiny_experts, straight, tmp_path, changes):
        config = dataclasses.replace(tiny_experts, model=dataclasses.replace(tiny_experts.model, **changes))
        config = with_run(config, checkpoint_every=7)
        if changes:
            train(config, tmp_path / "straight", progress=False)
            saved = tensors(checkpoint.checkpoints(tmp_path / "straight")[-1])
            assert all(saved[f"model.blocks.{i}.experts.router.bias"].abs().min() > 0 for i in range(2))
        for at in (9, 16):  # in superposition, and in recovery
            assert run(config, tmp_path / f"{at}", action=("kill", at)).returncode != 0
            train(config, tmp_path / f"{at}", progress=False)
            assert_same_run(tmp_path / "straight" if changes else straight, tmp_path / f"{at}")

    def test_activation_checkpointing_is_bit_for_bit(self, tiny_experts, straight, tmp_path):
        train(with_run(tiny_experts, activation_checkpointing=True), tmp_path / "run", progress=False)
        assert losses(straight) == losses(tmp_path / "run")

    def test_micro_batches_with_biases(self, tiny_experts, tmp_path):
        """The bias is of the whole step. The loss is of what it has seen so far, so it does not stay the same."""
        model = dataclasses.replace(tiny_experts.model, balance="bias", balance_rate=0.01)
        config = dataclasses.replace(tiny_experts, model=model)
        train(config, tmp_path / "one", progress=False)
        train(with_run(config, micro_batch=1), tmp_path / "parts", progress=False)
        assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)

    def test_each_part_has_its_share_of_the_load_balancing_loss(self, tiny_experts, tmp_path, monkeypatch):
        seen, forward = [], Balance.forward

        def spy(self, routings, parts):
            seen.append(parts)
            return forward(self, routings, parts)

        monkeypatch.setattr(Balance, "forward", spy)
        train(with_run(dataclasses.replace(tiny_experts, steps=2), micro_batch=1), tmp_path / "run", progress=False)
        assert seen == [4] * 8

    @pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.extended)])
    def test_two_processes_are_one(self, tiny_experts, straight, tmp_path, parallel):
        assert run(with_run(tiny_experts, parallel=parallel), tmp_path / "two", processes=2).returncode == 0
        assert_close_runs(straight, tmp_path / "two", self.RTOL)

    @pytest.mark.extended
    def test_resharding(self, tiny_experts, tmp_path):
        """Three experts over two processes: shares of two and one."""
        config = with_run(tiny_experts, checkpoint_every=10)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, experts=3, balance="bias"))
        train(config, tmp_path / "straight", progress=False)
        assert run(config, tmp_path / "a", processes=2, action=("kill", 11)).returncode != 0
        train(config, tmp_path / "a", progress=False)
        assert_close_runs(tmp_path / "straight", tmp_path / "a", self.RTOL)
        assert run(config, tmp_path / "b", action=("kill", 21)).returncode != 0
        assert run(config, tmp_path / "b", processes=2).returncode == 0
        assert_close_runs(tmp_path / "straight", tmp_path / "b", self.RTOL)

    @pytest.mark.extended
    def test_muon(self, tiny_experts, tmp_path):
        """Stacks of experts, sharded by experts: three over two processes."""
        config = dataclasses.replace(
            tiny_experts,
            model=dataclasses.replace(tiny_experts.model, experts=3),
            optimizer=dataclasses.replace(tiny_experts.optimizer, optimizer="muon"),
        )
        train(config, tmp_path / "one", progress=False)
        assert run(config, tmp_path / "two", processes=2).returncode == 0
        # As in test_optimizer.py: Newton-Schulz enlarges rounding where singular values are small.
        assert_close_runs(tmp_path / "one", tmp_path / "two", 4e-4)

    @pytest.mark.extended
    def test_bfloat16_with_sharding_and_checkpointing(self, tiny_experts, straight, tmp_path):
        config = dataclasses.replace(tiny_experts, dtype="bfloat16")
        train(config, tmp_path / "one", progress=False)
        assert run(config, tmp_path / "two", processes=2).returncode == 0
        again = with_run(config, activation_checkpointing=True)
        assert run(again, tmp_path / "again", processes=2).returncode == 0
        assert losses(tmp_path / "two") == losses(tmp_path / "again")
        for name in ("one", "two"):
            # eps of bfloat16 is 0.8 %; a loss is a mean of hundreds of rows, some of which choose another expert.
            assert losses(tmp_path / name) == pytest.approx(losses(straight), rel=0.016)
            assert losses(tmp_path / name) != losses(straight)

    @pytest.mark.extended
    def test_compiled(self, tiny_experts, straight, tmp_path):
        torch._dynamo.reset()
        train(with_run(tiny_experts, compile=True), tmp_path / "run", progress=False)
        assert losses(straight) == pytest.approx(
            losses(tmp_path / "run"), rel=1e-4
        )  # fused arithmetic rounds elsewhere

    @pytest.mark.extended
    def test_compiled_in_bfloat16_without_graph_break(self):
        torch._dynamo.reset()
        model, (ids, _) = make(), batch(sequences=8)
        layer, x = model.blocks[0].experts, model.embedding(ids).detach().requires_grad_()

        def results(function):
            with torch.autocast("cpu", torch.bfloat16):
                y, _ = function(x)
            return y.detach(), *torch.autograd.grad(y, [x, layer.ffn_in], torch.ones_like(y))

        expected = results(layer)
        actual = results(torch.compile(layer, backend="aot_eager", fullgraph=True))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.016, atol=0.016 * b.abs().max().item())


class TestExport:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"qk_norm": False}, "qk_norm: expected True for experts"),
            ({"shared_experts": 1}, "shared_experts: expected 0 for experts"),
            ({"balance": "bias"}, "balance: expected loss for experts"),
        ],
    )
    def test_what_transformers_has_not_is_refused(self, tmp_path, changes, message):
        config = TrainConfig(model=dataclasses.replace(CONFIG, **changes), latent_tokens=L)
        with pytest.raises(UserError, match=message):
            export_hf(make(**changes), config, None, None, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
