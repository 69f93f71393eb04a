"""A run that is made longer or shorter: what it has computed stays as it is, or it is refused with advice."""

import dataclasses
import json
import re
import shutil
import time

import pytest

from helpers.runs import assert_same_run
from tst_ext.__main__ import main
from tst_ext.lab.sweep import make_sweep, run_sweep
from tst_ext.train import past
from tst_ext.train.checkpoint import checkpoints
from tst_ext.train.config import OptimizerConfig, SuperpositionConfig, TrainConfig, load_config
from tst_ext.train.files import UserError
from tst_ext.train.loop import train
from tst_ext.train.metrics import read_metrics


class Killed(BaseException):
    """Ends a run where it is raised, as the end of its process would."""


def changed(config, **options):
    """Replace options, whatever section they stand in."""
    for section in ("superposition", "optimizer", "run"):
        part = getattr(config, section)
        mine = {name: options.pop(name) for name in list(options) if hasattr(part, name)}
        config = dataclasses.replace(config, **{section: dataclasses.replace(part, **mine)})
    return dataclasses.replace(config, **options)


def result(folder):
    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name != "seconds"}


@pytest.fixture(scope="module")
def flat(tiny):
    """30 steps without decay, of which 12 have bags, and the warm-up 3."""
    return changed(tiny, warmup=3.0, decay=0.0, checkpoint_every=4, eval_every=10)


@pytest.fixture(scope="module")
def default(tiny, tmp_path_factory):
    """A finished run whose warm-up, decay and phases are shares: 3, 3 and 12 of its 30 steps."""
    folder = tmp_path_factory.mktemp("default") / "run"
    train(changed(tiny, checkpoint_every=4), folder, progress=False)
    return folder


@pytest.fixture
def finished(default, tmp_path):
    return shutil.copytree(default, tmp_path / "finished")


def refusal(capsys, *arguments):
    """Return the message of `tst train`, and the options it advises."""
    assert main(["train", *map(str, arguments), "--no-progress"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    return message, message.rpartition("was computed: ")[2].split()


class TestLonger:
    # Ended in the superposition phase, at the switch, in recovery.
    @pytest.mark.parametrize("end", [8, 12, 20])
    @pytest.mark.parametrize("order", ["epoch", "random"])
    def test_equals_a_run_that_was_as_long_from_the_start(self, flat, tmp_path, end, order):
        flat = changed(flat, order=order)
        long = changed(flat, steps=40, ratio=0.3, decay=0.2)
        train(long, tmp_path / "straight", progress=False)
        short = changed(flat, steps=end, ratio=min(1.0, 12 / end))
        train(short, tmp_path / "run", progress=False)
        assert result(tmp_path / "run")["steps"] == end
        train(long, tmp_path / "run", progress=False)
        # A validation at the shorter run's end is not one of the longer run.
        for folder in ("run", "straight"):
            path = tmp_path / folder / "metrics.jsonl"
            lines = [m for m in read_metrics(tmp_path / folder) if "loss" in m or m["step"] % 10 == 0]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert_same_run(tmp_path / "straight", tmp_path / "run")
        assert result(tmp_path / "run") == result(tmp_path / "straight")
        assert load_config(tmp_path / "run" / "config.json") == long
        train(long, tmp_path / "run", progress=False)  # finished, and left as it is
        assert_same_run(tmp_path / "straight", tmp_path / "run")

    def test_reinitialised_where_the_shorter_run_ended(self, flat, tmp_path):
        long = changed(flat, reinitialise=True)
        train(long, tmp_path / "straight", progress=False)
        train(changed(long, steps=12, ratio=1.0, eval_every=4), tmp_path / "run", progress=False)
        train(long, tmp_path / "run", progress=False)
        assert result(tmp_path / "run") == result(tmp_path / "straight")

    def test_a_run_without_checkpoint_has_no_past(self, flat, tmp_path):
        with pytest.raises(Killed):
            train(flat, tmp_path / "run", progress=False, on_step=die_at(2))
        train(changed(flat, steps=5, ratio=0.2, warmup=1.0), tmp_path / "run", progress=False)
        assert result(tmp_path / "run")["steps"] == 5

    def test_shorter(self, flat, tmp_path):
        with pytest.raises(Killed):
            train(flat, tmp_path / "run", progress=False, on_step=die_at(17))
        short = changed(flat, steps=20, ratio=0.6, decay=0.2)
        train(short, tmp_path / "run", progress=False)
        train(short, tmp_path / "straight", progress=False)
        assert_same_run(tmp_path / "straight", tmp_path / "run")


def die_at(step):
    def on_step(at):
        if at == step:
            raise Killed

    return on_step


class TestResult:
    def test_a_longer_run_has_none_until_it_ends(self, flat, tmp_path):
        short = changed(flat, steps=20, ratio=0.6)
        long = changed(flat, steps=40, ratio=0.3)
        folder = tmp_path / "run"
        train(short, folder, progress=False)
        with pytest.raises(Killed):
            train(long, folder, progress=False, on_step=die_at(20))
        assert not (folder / "result.json").exists() and not (folder / "loss.png").exists()
        assert load_config(folder / "config.json") == long
        assert main(["train", "--out", str(folder), "--no-progress"]) == 0
        assert result(folder)["steps"] == 40

    def test_it_goes_before_the_configuration_changes(self, flat, tmp_path, monkeypatch):
        train(changed(flat, steps=20, ratio=0.6), tmp_path / "run", progress=False)

        def die(*_):
            raise Killed

        monkeypatch.setattr("tst_ext.train.run_folder.save_config", die)
        with pytest.raises(Killed):
            train(changed(flat, steps=40, ratio=0.3), tmp_path / "run", progress=False)
        assert load_config(tmp_path / "run" / "config.json").steps == 20
        assert not (tmp_path / "run" / "result.json").exists()

    def test_a_sweep_still_refuses_other_options(self, flat, tmp_path):
        runs = [make_sweep(c, {"grid": ((), [c])}) for c in (flat, changed(flat, steps=60, ratio=0.2))]
        for name, config in runs[0].runs.items():
            train(config, tmp_path / "out" / "runs" / name, progress=False)
        with pytest.raises(UserError, match="made with other options"):
            run_sweep(runs[1], tmp_path / "out", progress=False)


class TestRefusal:
    def test_shares_of_the_steps(self, finished, tmp_path, capsys):
        message, advice = refusal(capsys, "--out", finished, "--steps", 60)
        path = finished / "checkpoints" / "step-00000030"
        assert message == (
            f"tst train: resume: {path} has steps = 30, this run 60; its learning rate differs from step 0 on. "
            "These options keep what was computed: --resume step-00000028 --steps 60 --warmup 3 --ratio 0.2"
        )
        assert result(finished)["steps"] == 30 and load_config(finished / "config.json").steps == 30
        # The advice works, and gives the run that had these options from the start.
        assert main(["train", "--out", str(finished), *advice, "--no-progress"]) == 0
        assert result(finished)["steps"] == 60
        train(load_config(finished / "config.json"), tmp_path / "straight", progress=False)
        assert_same_run(tmp_path / "straight", finished)

    @pytest.mark.parametrize(
        ("options", "reason", "advice"),
        [
            ("--steps 60 --warmup 3", "bag size differs from step 12 on", "--steps 60 --warmup 3 --ratio 0.2"),
            ("--steps 60 --warmup 3 --ratio 0.2", "learning rate differs from step 28 on",
             "--steps 60 --warmup 3 --ratio 0.2"),
            ("--steps 29 --decay 0", "learning rate differs from step 28 on",
             "--steps 29 --warmup 3 --decay 0 --ratio 0.4"),
            ("--ratio 0.5", "bag size differs from step 12 on", ""),
            ("--steps 70 --warmup 0.05 --stages 0.1 2", "learning rate differs from step 0 on",
             "--steps 70 --warmup 3 --ratio 0.17 --stages"),
        ],
    )  # fmt: skip
    def test_what_differs_and_what_keeps_it(self, finished, capsys, options, reason, advice):
        message, advised = refusal(capsys, "--out", finished, *options.split())
        assert reason in message
        assert advised == ["--resume", "step-00000028", *advice.split()]
        # The options are repeated, as a user would who gave a file.
        assert main(["train", "--out", str(finished), *advised, "--no-progress"]) == 0
