"""A run that is made longer or shorter: what it has computed stays as it is, or it is refused with advice."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

from helpers.runs import assert_same_run
from tst_ext import SuperpositionSchedule
from tst_ext.__main__ import main
from tst_ext.lab.sweep import make_sweep, run_sweep
from tst_ext.train import loop, past
from tst_ext.train.config import SuperpositionConfig, TrainConfig, load_config, save_config
from tst_ext.train.files import UserError
from tst_ext.train.loop import train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.past import check_past


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
    @pytest.mark.parametrize(("end", "order"), [(8, "epoch"), (12, "epoch"), (20, "epoch"), (20, "random")])
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
            (tmp_path / "out" / "runs" / name).mkdir(parents=True)
            save_config(config, tmp_path / "out" / "runs" / name / "config.json")
        with pytest.raises(UserError, match="made with other options"):
            run_sweep(runs[1], tmp_path / "out", progress=False)


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of the run `tiny` with checkpoints of some steps, as far as `check_past` reads it."""
    for step in (16, 28, 30):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    save_config(tiny, tmp_path / "run" / "config.json")
    return tmp_path / "run"


@pytest.fixture
def asked(folder, monkeypatch):
    """Return the configuration and the checkpoint that `tst train --out folder` with these options asks for."""

    def ask(options):
        calls = []
        monkeypatch.setattr(loop, "train", lambda config, out, resume, progress: calls.append((config, resume)) or DONE)
        assert main(["train", "--out", str(folder), *options]) == 0
        return calls[0]

    return ask


DONE = {"val_loss": 0.0, "steps": 0}


class TestRefusal:
    def test_shares_of_the_steps(self, finished, tmp_path, capsys):
        message, advice = refusal(capsys, "--out", finished, "--steps", 60)
        path = finished / "checkpoints" / "step-00000030"
        assert message == (
            f"tst train: resume: {path} has steps = 30, this run 60; its learning rate differs from step 0 on. "
            "These options, in place of --steps or --tokens, keep what was computed: "
            "--resume step-00000028 --steps 60 --warmup 3 --ratio 0.2"
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
            ("--steps 60 --warmup 3", "bag size differs from step 12 on", "28 --steps 60 --warmup 3 --ratio 0.2"),
            ("--steps 60 --warmup 3 --ratio 0.2", "learning rate differs from step 28 on",
             "28 --steps 60 --warmup 3 --ratio 0.2"),
            ("--steps 60 --warmup 0.05 --ratio 0.2 --decay 0.5", "learning rate differs from step 28 on",
             "28 --steps 60 --warmup 0.05 --decay 0.5 --ratio 0.2"),
            ("--steps 60 --warmup 3 --ratio 0.2 --decay 0.7", "learning rate differs from step 19 on",
             "16 --steps 60 --warmup 3 --decay 0.7 --ratio 0.2"),
            ("--steps 29 --decay 0", "have no steps left at step 30", "28 --steps 29 --decay 0"),
            ("--steps 28 --decay 0", "bag size differs from step 11 on", "16 --steps 28 --decay 0 --ratio 0.43"),
            ("--ratio 0.5", "bag size differs from step 12 on", "30 --ratio 0.4"),
            ("--steps 60 --warmup 3 --stages 0.1 2", "bag size differs from step 12 on",
             "28 --steps 60 --warmup 3 --ratio 0.2 --stages"),
        ],
    )  # fmt: skip
    def test_what_differs_and_what_keeps_it(self, tiny, folder, asked, options, reason, advice):
        now, _ = asked(options.split())
        with pytest.raises(UserError, match=rf"checkpoints/step-00000030 has .*; .*{reason}\. These") as error:
            check_past(folder / "checkpoints" / "step-00000030", 30, tiny, now, 20_000)
        advised = str(error.value).rpartition("was computed: ")[2].split()
        assert advised == f"--resume step-000000{advice}".split()
        kept, name = asked([*options.split(), *advised])  # given after the others, as a user would who has a script
        check_past(folder / "checkpoints" / name, int(name[5:]), tiny, kept, 20_000)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--steps 60 --warmup 3 --ratio 0.2 --decay 0.8",
             "No checkpoint up to step 13 is kept (--keep); begin in another folder"),
            ("--steps 2 --decay 0", "A run of 2 steps cannot continue one of 30"),
        ],
    )  # fmt: skip
    def test_nothing_keeps_it(self, tiny, folder, asked, options, message):
        now, _ = asked(options.split())
        with pytest.raises(UserError) as error:
            check_past(folder / "checkpoints" / "step-00000030", 30, tiny, now, 20_000)
        assert str(error.value).endswith(f". {message}")

    def test_the_documented_run(self, folder):
        """docs/trainer.md has this command."""
        for step in (7000, 8000):
            (folder / "checkpoints" / f"step-{step:08}").mkdir()
        saved = TrainConfig()
        with pytest.raises(UserError) as error:
            check_past(folder / "checkpoints" / "step-00008000", 8000, saved, changed(saved, steps=16000), 10**7)
        command = "--resume step-00007000 --steps 16000 --warmup 800 --ratio 0.1"
        assert str(error.value).endswith(f": {command}")
        page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text(encoding="utf-8")
        assert f"tst train --out runs/a {command}\n" in page
        almost = changed(saved, steps=16000, warmup=800.0, ratio=0.1)
        with pytest.raises(UserError, match="its learning rate differs from step 7201 on"):
            check_past(folder / "checkpoints" / "step-00008000", 8000, saved, almost, 10**7)

    def test_stages(self, tiny, folder):
        saved = changed(tiny, bag_size=8, ratio=0.2, stages=((0.1, 4), (0.1, 2)))
        now = changed(saved, steps=100)
        with pytest.raises(UserError) as error:
            check_past(folder / "checkpoints" / "step-00000030", 30, saved, now, 20_000)
        advised = "--resume step-00000028 --steps 100 --warmup 3 --ratio 0.06 --stages 0.03 4 0.03 2"
        assert str(error.value).endswith(f": {advised}")

    @pytest.mark.parametrize(("order", "kept"), [("epoch", False), ("random", True)])
    def test_the_order_of_the_data(self, tiny, folder, order, kept):
        """Two stages of the same bags shuffle the windows twice."""
        saved = changed(tiny, decay=0.0, order=order)
        now = changed(saved, ratio=0.2, stages=((0.2, 4),))
        arguments = (folder / "checkpoints" / "step-00000030", 30, saved, now, 20_000)
        if kept:
            check_past(*arguments)
        else:
            with pytest.raises(UserError, match="order of the data differs from step 6 on"):
                check_past(*arguments)

    def test_the_phase_is_not_the_bag_size_alone(self, tiny, folder):
        """The metrics name it, and `reinitialise` acts at its end."""
        saved = changed(tiny, bag_size=1, order="random")
        with pytest.raises(UserError, match="phase differs from step 12 on"):
            check_past(folder / "checkpoints" / "step-00000030", 30, saved, changed(saved, ratio=0.5), 20_000)


def test_the_longest_shares_have_the_same_steps():
    """Any switch of a run can be written as a share of another number of steps."""
    generator = random.Random(0)
    for _ in range(200):
        steps, longer = generator.randrange(2, 10**6), generator.randrange(10**6, 10**7)
        saved = TrainConfig(steps=steps, superposition=SuperpositionConfig(ratio=generator.random()))
        kept = past._with_past(saved, dataclasses.replace(saved, steps=longer))
        switches = [SuperpositionSchedule(c.steps, c.superposition.ratio, 4).switch_step for c in (saved, kept)]
        assert switches[0] == switches[1] and len(str(kept.superposition.ratio)) < 12
