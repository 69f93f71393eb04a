"""The loop: schedule, switch, golden curve, repeatability."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from helpers.runs import assert_same_run
from tst_ext.train import loop
from tst_ext.train.config import OptimizerConfig
from tst_ext.train.data import Shard
from tst_ext.train.distributed import Processes
from tst_ext.train.files import UserError
from tst_ext.train.loop import train, validate
from tst_ext.train.metrics import read_metrics
from tst_ext.train.model import Transformer
from tst_ext.train.optimizer import learning_rate, parameter_groups

GOLDEN = Path(__file__).with_name("golden.json")


def losses(folder):
    return [m["loss"] for m in read_metrics(folder) if "loss" in m]


class TestLearningRate:
    CONFIG = OptimizerConfig(learning_rate=2.0, warmup=0.1, decay=0.2)

    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 0.2), (4, 1.0), (9, 2.0), (10, 2.0), (79, 2.0), (80, 2.0), (90, 1.0), (99, 0.1)]
    )
    def test_warmup_stable_decay(self, step, expected):
        assert learning_rate(self.CONFIG, 100, step) == pytest.approx(expected, rel=1e-12)

    def test_without_warmup_and_decay(self):
        config = OptimizerConfig(learning_rate=2.0, warmup=0.0, decay=0.0)
        assert {learning_rate(config, 10, step) for step in range(10)} == {2.0}


def test_weight_decay_reaches_matrices_only(tiny):
    model = Transformer(tiny.model, 64, 16)
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert len(free["params"]) == 5 and {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


class TestRun:
    def test_golden_curve(self, tiny, tmp_path):
        """With windows drawn with replacement the first 30 losses, across the switch at step 12, are those recorded.

        Float32 sums in another order (SSE2 for AVX2, three threads for one) changed no loss at all at float32's
        resolution, 1.2e-7; 1e-5 leaves room for other GEMM libraries.
        """
        golden = json.loads(GOLDEN.read_text())
        run = tmp_path / "run"
        train(dataclasses.replace(tiny, order="random"), run, progress=False)
        assert losses(run) == pytest.approx(golden["loss"], rel=1e-5)
        held_out = [m["val_loss"] for m in read_metrics(run) if "val_loss" in m]
        assert held_out == pytest.approx(golden["val_loss"], rel=1e-5)

    def test_repeats_bit_for_bit(self, tiny, tiny_run, tmp_path):
        train(tiny, tmp_path / "run", progress=False)
        assert_same_run(tiny_run, tmp_path / "run")

    def test_seed_changes_the_run(self, tiny, tiny_run, tmp_path):
        train(dataclasses.replace(tiny, steps=3, seed=1), tmp_path / "run", progress=False)
        assert losses(tmp_path / "run")[0] != losses(tiny_run)[0]

    def test_equal_flops(self, tiny, tiny_run):
        # 12 steps of 4 x 16 bags of 4 tokens, then 18 of 4 x 16 tokens
        result = json.loads((tiny_run / "result.json").read_text())
        assert result["data_tokens"] == 12 * 4 * 16 * 4 + 18 * 4 * 16
        metrics = [m for m in read_metrics(tiny_run) if "loss" in m]
        assert [m["phase"] for m in metrics] == ["superposition"] * 12 + ["recovery"] * 18
        assert [m["lr"] for m in metrics] == [learning_rate(tiny.optimizer, 30, step) for step in range(30)]

    def test_excess_loss_is_the_loss_less_its_floor(self, tiny_run):
        metrics = [m for m in read_metrics(tiny_run) if "loss" in m]
        floors = [m["loss"] - m["excess_loss"] for m in metrics]
        # Bags of 4 tokens that rise by 1, 2 or 3 hold four different ones: log 4. The last bag of each sequence has one
        # label, whose loss can be 0; the four of them weigh 1/64.
        assert floors[:12] == pytest.approx([math.log(4) * (1 - 1 / 64)] * 12, rel=1e-3)
        assert floors[12:] == [0] * 18

    def test_both_arms_start_from_the_same_weights(self, tiny, tmp_path, monkeypatch):
        starts = []
        original = Transformer.__init__

        def spy(self, *args):
            original(self, *args)
            starts.append({k: v.clone() for k, v in self.state_dict().items()})

        monkeypatch.setattr(Transformer, "__init__", spy)
        short = dataclasses.replace(tiny, steps=1)
        train(short, tmp_path / "a", progress=False)
        train(
            dataclasses.replace(short, superposition=dataclasses.replace(tiny.superposition, ratio=0.0)),
            tmp_path / "b",
            progress=False,
        )
        assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])

    def test_optimiser_state_survives_the_switch(self, tiny, tmp_path, monkeypatch):
        optimizers = []

        class Spy(torch.optim.AdamW):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                optimizers.append(self)

        monkeypatch.setattr(loop.torch.optim, "AdamW", Spy)
        train(tiny, tmp_path / "run", progress=False)
        (optimizer,) = optimizers
        assert {int(state["step"]) for state in optimizer.state.values()} == {30}

    def test_it_learns(self, tiny, tmp_path):
        result = train(dataclasses.replace(tiny, steps=300), tmp_path / "run", progress=False)
        # The source has 0.95 nats of entropy a token, a model that knows nothing log 64 = 4.16.
        assert 0.9 < result["val_loss"] < 2.0

    def test_on_step_is_called_before_each_step(self, tiny, tiny_run, tmp_path):
        config, called = dataclasses.replace(tiny, run=dataclasses.replace(tiny.run, checkpoint_every=20)), []

        def on_step(step):
            assert len(losses(tmp_path / "run")) == step  # a line of the metrics each
            called.append(step)

        train(config, tmp_path / "run", progress=False, on_step=on_step)
        assert called == list(range(30))
        train(config, tmp_path / "run", resume="step-00000020", progress=False, on_step=on_step)
        assert called[30:] == list(range(20, 30))
        assert_same_run(tiny_run, tmp_path / "run")

    def test_files_of_a_run(self, tiny_run):
        names = {p.name for p in tiny_run.iterdir()}
        assert names == {"checkpoints", "config.json", "environment.json", "loss.png", "metrics.jsonl", "result.json"}
        assert (tiny_run / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_little_held_out_text_is_said(self, tiny, tmp_path, capsys):
        short = dataclasses.replace(tiny, steps=2)
        train(short, tmp_path / "a", progress=False)
        assert "held-out" not in capsys.readouterr().err
        train(dataclasses.replace(short, eval_tokens=5000), tmp_path / "b", progress=False)
        assert "only 2,000 of the 5,000 tokens" in capsys.readouterr().err

    def test_does_not_touch_a_folder_in_use(self, tiny, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "precious").write_text("x")
        with pytest.raises(UserError, match="not empty"):
            train(tiny, tmp_path / "run", progress=False)
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]

    @pytest.mark.parametrize(
        ("change", "split"), [({"latent_tokens": 6000}, "train"), ({"latent_tokens": 2000}, "val")]
    )
    def test_data_too_short_is_found_before_anything_is_written(self, tiny, tmp_path, change, split):
        # 20,000 training tokens are fewer than 6000 bags of 4, 2000 held-out tokens fewer than 2000 and a label.
        config = dataclasses.replace(tiny, **change, eval_tokens=10_000)
        with pytest.raises(UserError, match=f"{split}.bin: expected at least"):
            train(config, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_infinite_held_out_loss_stops(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(loop, "validate", lambda *args: math.nan)
        with pytest.raises(UserError, match="step 9: the held-out loss is nan"):
            train(tiny, tmp_path / "run", progress=False)

    def test_infinite_loss_stops(self, tiny, tmp_path):
        wild = dataclasses.replace(tiny, optimizer=OptimizerConfig(learning_rate=1e30, clip=1e30))
        with pytest.raises(UserError, match="the loss is .* (nan|inf)"):
            train(wild, tmp_path / "run", progress=False)


def test_validation_is_next_token_loss(tiny, shards):
    torch.manual_seed(0)
    model = Transformer(tiny.model, 64, 16)
    shard = Shard(shards, "val")
    total, count = 0.0, 0
    for ids, labels in shard.windows(1024, 7, 16):
        logits = model(ids).double().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        count += labels.numel()
    assert count == 1024
    assert math.isclose(validate(model, shard, tiny, Processes("cpu")), total / count, rel_tol=1e-6)
