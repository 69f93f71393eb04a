"""Two processes under torchrun: the same run as one, in every way of sharing it out."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.runs import assert_close_runs, assert_same_run, lines, run, tensors
from helpers.training import VOCABULARY, write_split
from tst_ext.train import checkpoint
from tst_ext.train.batches import check_batches
from tst_ext.train.config import SuperpositionConfig, save_config
from tst_ext.train.data import Shard
from tst_ext.train.files import UserError
from tst_ext.train.loop import train

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed and gloo"
)


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """The folder of the run `tiny` of two processes, for tests that only read it."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    result = run(tiny, folder, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out loss") == 1  # only the first process speaks
    return folder


@pytest.fixture
def documents_shards(tmp_path):
    """As `shards`, cut into documents of 1 to 20 tokens by the token 0: bags that are short or empty."""
    folder = tmp_path / "documents"
    folder.mkdir()
    random = np.random.Generator(np.random.Philox(key=2))
    tokens = random.integers(1, VOCABULARY, size=12_000)
    tokens[random.integers(1, 20, size=2_000).cumsum() % 12_000] = 0
    for split, part in (("train", tokens[:10_000]), ("val", tokens[10_000:])):
        write_split(folder, split, part)
        header = json.loads((folder / f"{split}.json").read_text())
        (folder / f"{split}.json").write_text(json.dumps({**header, "end_of_text": 0}))
    return folder


class TestEquality:
    # Sums in another order moved losses by 3e-7 and gradient norms by 4e-5 over 30 steps in both phases when this was
    # written; a share that counts twice, or a mean of unequal shares' means, moves them by more than 1e-3.
    RTOL = 1e-4

    def test_two_processes_are_one(self, tiny_run, pair):
        assert json.loads((pair / "environment.json").read_text())["processes"] == 2
        assert_close_runs(tiny_run, pair, self.RTOL)

    @pytest.mark.extended
    def test_as_torchrun_starts_them(self, tiny, pair, tmp_path):
        save_config(tiny, tmp_path / "c.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments = ["-m", "tst_ext", "train", "--config", tmp_path / "c.json", "--out", tmp_path / "two"]
        subprocess.run([*torchrun, *arguments, "--no-progress"], check=True, timeout=240)
        assert_same_run(pair, tmp_path / "two")

    @pytest.mark.extended
    @pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
    def test_micro_batches(self, tiny, tiny_run, tmp_path, parallel):
        config = with_run(tiny, parallel=parallel, micro_batch=1)
        assert run(config, tmp_path / "two", processes=2).returncode == 0
        assert_close_runs(tiny_run, tmp_path / "two", self.RTOL)

    @pytest.mark.extended
    @pytest.mark.parametrize(
        "options",
        [dict(straddle=False, position_weights="power_law"), dict(straddle=False, objective="mce_alt")],
        ids=["documents", "mce_alt"],
    )
    def test_shares_with_unequal_numbers_of_labels(self, tiny, tmp_path, documents_shards, options):
        config = dataclasses.replace(
            tiny,
            data=dataclasses.replace(tiny.data, data=(documents_shards,)),
            superposition=SuperpositionConfig(bag_size=4, ratio=0.4, **options),
        )
        train(config, tmp_path / "one", progress=False)
        train(with_run(config, micro_batch=1), tmp_path / "parts", progress=False)
        assert run(config, tmp_path / "two", processes=2).returncode == 0
        assert_close_runs(tmp_path / "one", tmp_path / "parts", self.RTOL)
        assert_close_runs(tmp_path / "one", tmp_path / "two", self.RTOL)

    @pytest.mark.extended
    def test_bfloat16(self, tiny, tiny_run, tmp_path):
        """FSDP2's mixed precision keeps activations in bfloat16 where autocast keeps them in float32: not equal."""
        config = dataclasses.replace(tiny, dtype="bfloat16")
        train(config, tmp_path / "one", progress=False)
        assert run(config, tmp_path / "two", processes=2).returncode == 0
        exact = [m["loss"] for m in lines(tiny_run) if "loss" in m]
        for name in ("one", "two"):
            loss = [m["loss"] for m in lines(tmp_path / name) if "loss" in m]
            assert loss != exact
            # eps of bfloat16 is 0.8 %; a loss is a mean of hundreds of rows.
            assert loss == pytest.approx(exact, rel=0.008)
            path = checkpoint.checkpoints(tmp_path / name)[-1]
            assert {t.dtype for key, t in tensors(path).items() if not key.startswith("rng")} == {torch.float32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.extended
class TestResume:
    # 48 steps, the switch at 24: in superposition and across, at the switch, in recovery.
    @pytest.mark.parametrize("at", [12, 24, 36])
    def test_kill_9_bit_for_bit(self, tiny, runs, at):
        config = dataclasses.replace(tiny, steps=48, superposition=SuperpositionConfig(bag_size=4, ratio=0.5))
        config = with_run(config, checkpoint_every=12, eval_every=12, log_every=6)
        if not (runs / "straight").exists():
            assert run(config, runs / "straight", processes=2).returncode == 0
        out = runs / f"killed{at}"
        assert run(config, out, processes=2, action=("kill", at + 8)).returncode != 0
        assert checkpoint.checkpoints(out)[-1].name == f"step-{at:08}"
        resumed = run(config, out, processes=2)
        assert f"resumes from {out / 'checkpoints' / f'step-{at:08}'}" in resumed.stderr
        assert_same_run(runs / "straight", out)

    def test_other_numbers_of_processes(self, tiny, tmp_path):
        config = with_run(tiny, checkpoint_every=10)
        train(config, tmp_path / "straight", progress=False)
        assert run(config, tmp_path / "a", processes=2, action=("kill", 11)).returncode != 0
        train(config, tmp_path / "a", progress=False)
        assert_close_runs(tmp_path / "straight", tmp_path / "a", TestEquality.RTOL)
        assert run(config, tmp_path / "b", action=("kill", 11)).returncode != 0
        assert run(config, tmp_path / "b", processes=2).returncode == 0
        assert_close_runs(tmp_path / "straight", tmp_path / "b", TestEquality.RTOL)

    def test_a_signal_stops_both(self, tiny, pair, tmp_path):
        stopped = run(tiny, tmp_path / "a", processes=2, action=("terminate", 9))
        assert stopped.returncode != 0 and signal.Signals.SIGTERM.name in stopped.stderr
        assert checkpoint.checkpoints(tmp_path / "a")[-1].name == "step-00000010"
        assert run(tiny, tmp_path / "a", processes=2).returncode == 0
        assert_same_run(pair, tmp_path / "a")

    def test_damage_is_named(self, tiny, pair, tmp_path):
        shutil.copytree(pair, tmp_path / "a")
        path = checkpoint.checkpoints(tmp_path / "a")[-1]
        file = sorted(path.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        result = run(tiny, tmp_path / "a", processes=2)
        assert result.returncode != 0 and f"{file.name}: its checksum" in result.stderr


class TestShares:
    @pytest.mark.parametrize(
        ("micro_batch", "world", "message"),
        [
            (0, 3, "batch: expected a multiple of the 3 processes, got 4"),
            (3, 1, "micro_batch: expected a divisor of the 4"),
        ],
    )
    def test_what_cannot_be_shared_out(self, tiny, shards, micro_batch, world, message):
        with pytest.raises(UserError, match=message):
            check_batches(with_run(tiny, micro_batch=micro_batch), Shard(shards, "train"), world)
