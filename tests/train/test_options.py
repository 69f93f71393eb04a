"""What the options of superposition, of the run and of the report do to a run."""

import dataclasses
import json
import math
import sys
from contextlib import contextmanager
from datetime import datetime

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.training import write_split
from tst_ext import linear_multi_hot_cross_entropy, multi_hot_cross_entropy, position_weights
from tst_ext.train import flops, loop, metrics
from tst_ext.train.batches import PADDING
from tst_ext.train.config import ModelConfig, SuperpositionConfig
from tst_ext.train.files import UserError
from tst_ext.train.loop import loss_floor, loss_options, train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.model import Transformer
from tst_ext.train.optimizer import reinitialise
from tst_ext.train.presets import PRESETS


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def with_options(config, **options):
    options = {"bag_size": 4, "ratio": 0.4, **options}
    return dataclasses.replace(config, superposition=SuperpositionConfig(**options))


def training_losses(folder):
    return [m["loss"] for m in read_metrics(folder) if "loss" in m]


def held_out(folder):
    return [m["val_loss"] for m in read_metrics(folder) if "val_loss" in m]


class TestSuperposition:
    @pytest.mark.parametrize(
        "options",
        [
            dict(sides="input"),
            dict(sides="output"),
            dict(scale="batch"),
            dict(objective="mce_alt"),
            dict(position_weights="power_law"),
            dict(position_weights="fitted", fitted=(0.0, 1.0, -2.0)),
            dict(ratio=0.2, stages=((0.2, 2),)),
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_trains_and_differs_from_the_default(self, tiny, tiny_run, tmp_path, options):
        result = train(with_options(tiny, **options), tmp_path / "run", progress=False)
        assert result["switch_step"] == 12
        # log 64 = 4.16 is what a model knows that knows nothing; the default reaches 2.77 after these 30 steps.
        assert result["val_loss"] < 3.5
        assert held_out(tmp_path / "run") != held_out(tiny_run)

    def test_power_law_as_fitted_is_power_law(self, tiny, tmp_path):
        fitted = with_options(tiny, position_weights="fitted", fitted=(0.0, 1.0, -1.0))
        train(fitted, tmp_path / "a", progress=False)
        train(with_options(tiny, position_weights="power_law"), tmp_path / "b", progress=False)
        assert training_losses(tmp_path / "a") == pytest.approx(training_losses(tmp_path / "b"), rel=1e-6)

    def test_stages(self, tiny, tmp_path):
        config = with_options(tiny, bag_size=8, ratio=0.2, stages=((0.1, 4), (0.2, 2)))
        result = train(config, tmp_path / "run", progress=False)
        # 6 steps of bags of 8, 3 of 4, 6 of 2, 15 of tokens
        assert result["data_tokens"] == 4 * 16 * (6 * 8 + 3 * 4 + 6 * 2 + 15)
        assert result["switch_step"] == 15
        phases = [m["phase"] for m in read_metrics(tmp_path / "run") if "loss" in m]
        assert phases == ["superposition"] * 15 + ["recovery"] * 15

    def test_documents_shorter_than_a_bag(self, tiny, tmp_path, shards):
        for split in ("train", "val"):
            write_split(shards, split, [1, 2, 0] * 2000)
            header = json.loads((shards / f"{split}.json").read_text())
            (shards / f"{split}.json").write_text(json.dumps({**header, "end_of_text": 0}))
        with pytest.raises(UserError, match="step 0: no bag has a label: documents are shorter than bags"):
            train(with_options(tiny, straddle=False), tmp_path / "run", progress=False)

    def test_input_only_is_the_weight_first(self, tiny, tmp_path):
        train(with_options(tiny, sides="input"), tmp_path / "a", progress=False)
        train(with_options(tiny, position_weights="first"), tmp_path / "b", progress=False)
        assert training_losses(tmp_path / "a") == pytest.approx(training_losses(tmp_path / "b"), rel=1e-6)

    def test_reinitialised_at_the_switch(self, tiny, tiny_run, tmp_path):
        train(with_options(tiny, reinitialise=True), tmp_path / "run", progress=False)
        a, b = (training_losses(run) for run in (tiny_run, tmp_path / "run"))
        assert a[:12] == b[:12]
        assert b[12] > a[12] + 0.2 and abs(b[12] - math.log(64)) < 0.2  # a model that knows nothing

    def test_without_superposition_there_is_no_switch_to_reinitialise_at(self, tiny, tmp_path):
        for name, reinitialised in (("a", False), ("b", True)):
            options = with_options(tiny, ratio=0.0, reinitialise=reinitialised)
            train(dataclasses.replace(options, steps=2), tmp_path / name, progress=False)
        assert training_losses(tmp_path / "a") == training_losses(tmp_path / "b")

    def test_reinitialise_takes_fresh_weights_and_forgets(self, tiny):
        model = Transformer(tiny.model, 64, 16)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)).backward()
        optimizer.step()
        before = {name: p.clone() for name, p in model.named_parameters()}
        reinitialise(model, optimizer, seed=0)
        for name, p in model.named_parameters():
            fresh = name in ("embedding.weight", "head.weight")
            assert p.equal(before[name]) != fresh
            state = optimizer.state[p]
            assert (state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()) == fresh
            if fresh:
                assert (
                    abs(p.std() - 0.02) < 0.002
                    and not torch.corrcoef(torch.stack((p, before[name])).flatten(1))[0, 1] > 0.1
                )


class TestLossOptions:
    @pytest.mark.parametrize("options", [{}, dict(position_weights="power_law"), dict(objective="mce_alt")])
    def test_parts_add_up_to_the_mean_of_the_whole(self, tiny, options):
        """Losses of unequal parts, averaged over processes and added over micro-batches, are the op's own mean."""
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (24, 50))
        labels = torch.randint(50, (24, 4), generator=generator)
        labels[torch.rand(24, 4, generator=generator) < 0.3] = PADDING
        labels[5:9] = PADDING
        config = with_options(tiny, **options)
        counts = (labels != PADDING).sum(0)
        if "objective" in options:  # it asks for a label in the first slot of every bag that has one, as folds give
            labels = labels.sort(-1, descending=True).values
            counts = (labels != PADDING).sum(0)
        arguments = loss_options(config.superposition, tuple(counts.tolist()), world=3)
        parts = [
            linear_multi_hot_cross_entropy(hidden[rows], weight, labels[rows], **arguments).item()
            for rows in (slice(0, 5), slice(5, 9), slice(9, 24))
        ]
        names = {"position_weights": position_weights("power_law", 4)} if "position_weights" in options else {}
        whole = linear_multi_hot_cross_entropy(
            hidden, weight, labels, objective=options.get("objective", "mce"), **names
        ).item()
        assert sum(parts) / 3 == pytest.approx(whole, rel=1e-6)  # weights are float32

    @pytest.mark.parametrize("name", ["uniform", "power_law"])
    def test_the_floor_is_the_least_loss(self, name):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(9, (2, 12, 4), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = PADDING
        labels[1, 5] = PADDING
        counts = (labels != PADDING).sum((0, 1))
        arguments = loss_options(SuperpositionConfig(position_weights=name), tuple(counts.tolist()), world=2)

        def loss(logits):
            return multi_hot_cross_entropy(logits, labels, **arguments).item()

        weight = torch.where(labels == PADDING, 0, arguments["position_weights"]).double()
        shares = (torch.nn.functional.one_hot(labels.clamp(0), 9) * weight[..., None]).sum(2)
        best = (shares / shares.sum(-1, keepdim=True).clamp_min(1e-9) + 1e-30).log()
        floor = loss_floor(labels, arguments).item()
        assert 0.1 < floor == pytest.approx(loss(best), rel=1e-6)
        parts = [loss_floor(part, arguments).item() for part in labels.split([5, 7], dim=1)]
        assert sum(parts) == pytest.approx(floor, rel=1e-6)
        assert loss(best + 0.1 * torch.randn(best.shape, generator=generator)) > floor + 1e-4

    def test_no_floor_for_tokens_and_for_sets(self):
        assert loss_floor(torch.zeros(2, 3, dtype=torch.long), loss_options(SuperpositionConfig(), (6,), 1)) == 0
        sets = loss_options(SuperpositionConfig(objective="mce_alt"), (6, 6), 1)
        assert loss_floor(torch.arange(12).view(2, 3, 2), sets) == 0

    def test_a_position_without_labels_drops_out(self):
        arguments = loss_options(SuperpositionConfig(), (3, 0), world=1)
        assert arguments["position_weights"].tolist() == pytest.approx([1 / 3, 0]) and arguments["normalizer"] == 1


class TestRun:
    @pytest.mark.parametrize("changes", [dict(micro_batch=1), dict(micro_batch=2), dict(activation_checkpointing=True)])
    def test_how_it_runs_does_not_change_what_it_computes(self, tiny, tiny_run, tmp_path, changes):
        train(with_run(tiny, **changes), tmp_path / "run", progress=False)
        a, b = (training_losses(run) for run in (tiny_run, tmp_path / "run"))
        assert a == b if "activation_checkpointing" in changes else a == pytest.approx(b, rel=1e-5)

    def test_activation_checkpointing_recomputes(self, tiny, tmp_path, monkeypatch):
        calls = 0

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            return args[0](*args[1:])

        monkeypatch.setattr("tst_ext.train.model.checkpoint", counted)
        train(with_run(tiny, activation_checkpointing=True), tmp_path / "run", progress=False)
        assert calls == 30 * 2  # steps, blocks; validation keeps nothing anyway

    @pytest.mark.extended
    def test_compiled(self, tiny, tiny_run, tmp_path):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # 20 steps after the switch nothing has been compiled again: the blocks' shapes do not change.
        train(with_run(tiny, compile=True), tmp_path / "b", progress=False)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        # One graph for training and one for validation, which keeps nothing; not one a block or a phase.
        assert counters["stats"]["unique_graphs"] == 2
        # Fused float32 arithmetic rounds at other places.
        assert training_losses(tiny_run) == pytest.approx(training_losses(tmp_path / "b"), rel=1e-4)

    def test_bfloat16(self, tiny, tiny_run, tmp_path):
        train(dataclasses.replace(tiny, dtype="bfloat16"), tmp_path / "run", progress=False)
        a, b = (training_losses(run) for run in (tiny_run, tmp_path / "run"))
        assert a != b and a == pytest.approx(b, rel=0.008)  # eps of bfloat16

    @pytest.mark.parametrize(("dtype", "slower"), [("bfloat16", 25), ("bfloat16", 1), ("float32", 25)])
    def test_bfloat16_without_its_instructions_is_warned_about(
        self, tiny, tmp_path, monkeypatch, capsys, bfloat16_gemms, dtype, slower
    ):
        def speed(_, dtype):
            return 1e9 / (slower if dtype == torch.bfloat16 else 1)

        def stop(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "gemm_flops_per_second", speed)
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(tiny, dtype=dtype), tmp_path / "run", progress=False, on_step=stop)
        warned = "take 25.0 times as long as with --dtype float32" in capsys.readouterr().err
        assert warned == (dtype == "bfloat16" and slower == 25 and not bfloat16_gemms)


class TestReport:
    def test_times_by_a_clock_of_our_own(self, tiny, tmp_path, monkeypatch):
        """A second passes while the loop waits for each batch, a hundred in each validation and checkpoint."""
        now = 0.0

        def passing(seconds, function):
            def call(*args):
                nonlocal now
                now += seconds
                return function(*args)

            return call

        @contextmanager
        def ahead(read, start, stop):
            yield (passing(1.0, read)(step) for step in range(start, stop))

        monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
        monkeypatch.setattr(loop, "ahead", ahead)
        monkeypatch.setattr(loop, "validate", passing(100.0, loop.validate))
        monkeypatch.setattr(loop.checkpoint, "save", passing(100.0, loop.checkpoint.save))
        config = with_run(tiny, log_every=10, eval_every=5, checkpoint_every=6)
        result = train(config, tmp_path / "run", progress=False)
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["gemm_flops_per_s"] == 1e9
        lines = [m for m in read_metrics(tmp_path / "run") if "loss" in m]
        assert [line["waited_for_data_s"] for line in lines] == [10.0] * 3
        # The switch is at step 12: 4 tokens a position before it.
        assert [line["tokens_per_s"] for line in lines] == [64 * 4, round(64 * (2 * 4 + 8) / 10), 64]
        assert [line["mfu"] for line in lines] == [round(flops.step_flops(tiny.model, 64, 4, 16) / 1e9, 4)] * 3
        # All that came before: of the last line 30 steps, 5 validations, 4 checkpoints.
        assert [line["seconds"] for line in lines] == [10 + 2 * 100, 20 + (3 + 3) * 100, 30 + (5 + 4) * 100]
        assert result["seconds"] == 30 + (6 + 4) * 100  # when the last checkpoint began

    @pytest.mark.parametrize(
        ("start", "seconds", "steps", "left"),
        [
            (0, 2.0, 40, "40 s, at 14:03"),
            (0, 2.0, 380, "12 min, at 14:14"),
            (100, 0.5, 100 + 20 + 28_800, "4 hours, at 18:02"),
            (100, 0.5, 100 + 20 + 80_000, "11 hours, at 2026-11-29 01:09"),
            (0, 3.0, 100_020, "3 days, at 2026-12-02 01:22"),
        ],
    )
    def test_estimate_of_the_end(self, monkeypatch, start, seconds, steps, left):
        """The host is ahead of the device, which compiles for ten minutes in the first step."""
        host = device = 0.0

        def finish():
            nonlocal host
            host = max(host, device)

        monkeypatch.setattr(metrics.time, "perf_counter", lambda: host)
        monkeypatch.setattr(metrics.time, "time", lambda: datetime(2026, 11, 28, 14, 2, 30).timestamp())
        meter = metrics.Meter(0.0, start, 0, 1, 1.0)
        said = {}
        for step in range(start + 1, start + 51):
            host += 0.001
            device = max(host, device) + seconds + (600 if step == start + 1 else 0)
            if step in (start + 3, start + 10):  # a validation
                finish()
                with meter.pause():
                    device = host = host + 100
            if text := meter.estimate(step, steps, finish):
                said[step] = text
        assert said == {start + 20: f"ends in about {left} (without validations and checkpoints)"}

    def test_no_estimate_for_fewer_than_20_steps(self):
        for first, steps, estimates in ((0, 39, 0), (0, 40, 1), (21, 60, 0), (20, 60, 1)):
            meter = metrics.Meter(0.0, first, 0, 1, 1.0)
            texts = [meter.estimate(step, steps, lambda: None) for step in range(first + 1, steps + 1)]
            assert len([text for text in texts if text]) == estimates

    def test_the_loop_prints_the_estimate(self, tiny, tmp_path, capsys):
        train(dataclasses.replace(tiny, steps=40), tmp_path / "run", progress=False)
        assert capsys.readouterr().err.count("ends in about ") == 1

    def test_tensorboard(self, tiny, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(with_run(tiny, tensorboard=True), tmp_path / "run", progress=False)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        assert [e.step for e in events.Scalars("loss")] == list(range(1, 31))
        assert [e.value for e in events.Scalars("loss")] == pytest.approx(training_losses(tmp_path / "run"), rel=1e-6)
        assert [e.step for e in events.Scalars("val_loss")] == [10, 20, 30]

    def test_tensorboard_missing(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match="pip install tensorboard"):
            train(with_run(tiny, tensorboard=True), tmp_path / "run", progress=False)


class TestFlops:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_parameters_are_those_of_the_model(self, preset):
        config = PRESETS[preset]
        with torch.device("meta"):
            model = Transformer(config.model, config.data.vocabulary, config.latent_tokens)
        assert sum(p.numel() for p in model.parameters()) == flops.parameters(config.model, config.data.vocabulary)

    def test_step_against_torchs_counter(self):
        config = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128)
        model = Transformer(config, 500, 32)
        ids = torch.zeros(3, 32, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        attention = 6 * 3 * 32 * 2 * 32 * 64  # 6 l d a layer and position
        assert counts == {
            "aten.mm": flops.step_flops(config, 500, 3, 32) - attention,
            "aten.bmm": 2 * attention,  # the whole square of scores, of which the causal mask leaves half
        }

    def test_a_gemm_has_a_speed(self):
        state = torch.get_rng_state()
        assert flops.gemm_flops_per_second(torch.device("cpu"), torch.float32) > 1e8
        assert torch.equal(torch.get_rng_state(), state)
