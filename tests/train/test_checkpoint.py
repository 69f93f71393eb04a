"""Checkpoints: what an ended run resumes from, and what it must not."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch

from helpers.runs import assert_same_run, lines, run, start, tensors, wait_for
from helpers.training import VOCABULARY, write_split
from tst_ext.__main__ import main
from tst_ext.train import checkpoint, loop
from tst_ext.train.config import DataConfig, SuperpositionConfig, load_config, save_config
from tst_ext.train.data import Shard, load_tokenizer
from tst_ext.train.files import UserError
from tst_ext.train.loop import train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.run_folder import load_run


class Killed(BaseException):
    """Ends a run where it is raised, as the end of its process would."""


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


@pytest.fixture(scope="module")
def often(tiny):
    """30 steps, a checkpoint after every fourth; the switch is at 12."""
    return with_run(tiny, checkpoint_every=4, keep=2)


@pytest.fixture(scope="module")
def uninterrupted(often, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(often, folder, progress=False)
    return folder


@pytest.fixture
def straight(uninterrupted, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(uninterrupted, tmp_path / "straight")


def die_at(step):
    def on_step(at):
        if at == step:
            raise Killed

    return on_step


class TestResume:
    # In the superposition phase, at its last step, at the first of recovery, in recovery, before any checkpoint.
    @pytest.mark.parametrize("step", [6, 11, 12, 22, 2])
    def test_goes_on_bit_for_bit(self, often, straight, tmp_path, step, capsys):
        with pytest.raises(Killed):
            train(often, tmp_path / "run", progress=False, on_step=die_at(step))
        assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")][-1:] == (
            [f"step-{step // 4 * 4:08}"] if step >= 4 else []
        )
        result = train(often, tmp_path / "run", progress=False)
        assert ("resumes from" if step >= 4 else "starts at step 0") in capsys.readouterr().err
        assert_same_run(straight, tmp_path / "run")
        assert result["data_tokens"] == json.loads((straight / "result.json").read_text())["data_tokens"]

    def test_kill_9_between_two_checkpoints(self, often, straight, tmp_path):
        killed = run(often, tmp_path / "b", action=("kill", 23))
        assert killed.returncode == -signal.SIGKILL
        assert read_metrics(tmp_path / "b")[-1]["step"] == 23  # 3 steps that the checkpoint does not have
        assert "step-00000020" in run(often, tmp_path / "b").stderr
        assert_same_run(straight, tmp_path / "b")

    def test_random_numbers_go_on(self, often, tmp_path):
        """The loop draws none; what a user adds to it might."""
        drawn = {}

        def draw(step):
            drawn.setdefault(step, []).append(torch.rand(1).item())
            if step == 9 and len(drawn[9]) == 1:
                raise Killed

        with pytest.raises(Killed):
            train(often, tmp_path / "run", progress=False, on_step=draw)
        train(often, tmp_path / "run", progress=False, on_step=draw)
        assert len(drawn[8]) == len(drawn[9]) == 2 and len(drawn[7]) == 1
        assert drawn[8][0] == drawn[8][1] and drawn[9][0] == drawn[9][1]

    def test_a_finished_run_is_left_as_it_is(self, often, straight, capsys):
        before = {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
        result = train(often, straight, progress=False)
        assert result == json.loads((straight / "result.json").read_text())
        assert {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")} == before

    def test_without_options_by_its_own_configuration(self, often, straight, capsys):
        assert main(["train", "--out", str(straight), "--no-progress"]) == 0
        assert "after 30 steps" in capsys.readouterr().out

    def test_from_an_earlier_one(self, often, straight, tmp_path):
        final = tensors(straight / "checkpoints" / "step-00000030")
        train(often, straight, resume="step-00000028", progress=False)
        assert (straight / "checkpoints" / "aside-step-00000030-1").exists()
        again = tensors(straight / "checkpoints" / "step-00000030")
        assert all(torch.equal(final[name], again[name]) for name in final)

    def test_options_of_how_it_runs_may_change(self, often, straight):
        changed = with_run(often, micro_batch=2, log_every=5, checkpoint_every=100)
        train(changed, straight, resume="step-00000028", progress=False)
        assert lines(straight)[-1]["step"] == 30

    @pytest.mark.parametrize(
        ("change", "name"), [({"seed": 1}, "seed"), ({"steps": 40}, "steps"), ({"batch": 8}, "batch")]
    )
    def test_what_is_computed_may_not(self, often, straight, change, name):
        with pytest.raises(UserError, match=f"has {name} = .*, this run"):
            train(dataclasses.replace(often, **change), straight, progress=False)

    def test_a_run_from_before_a_field(self, often, straight):
        """Both files that have its configuration lack the order of windows, which was random, and another field."""

        def older(values):
            del values["order"], values["model"]["rope_theta"]
            return values

        path = straight / "checkpoints" / "step-00000028"
        manifest = checkpoint.verify(path)
        older(manifest["config"])
        manifest["sha256"] = checkpoint._digest(manifest)
        (path / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
        values = older(json.loads((straight / "config.json").read_text(encoding="utf-8")))
        (straight / "config.json").write_text(json.dumps(values), encoding="utf-8")

        assert load_run(straight, "step-00000028").config.order == "random"
        with pytest.raises(UserError, match="step-00000028 has order = 'random', this run 'epoch'"):
            train(dataclasses.replace(often, order="epoch"), straight, resume="step-00000028", progress=False)
        shutil.rmtree(straight / "checkpoints" / "step-00000030")
        assert main(["train", "--out", str(straight), "--no-progress"]) == 0  # by its own configuration
        assert checkpoint.verify(straight / "checkpoints" / "step-00000030")["config"]["order"] == "random"
        assert load_config(straight / "config.json") == dataclasses.replace(often, order="random")

        # Nor may it change where there is no checkpoint yet.
        shutil.rmtree(straight / "checkpoints")
        (straight / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(UserError, match="has order = 'random', this run 'epoch'"):
            train(dataclasses.replace(often, order="epoch"), straight, progress=False)

    def test_a_run_from_before_a_check_of_its_options(self, straight, capsys):
        """Its warm-up and decay overlap. It cannot be resumed, but its model can be used."""
        path = straight / "checkpoints" / "step-00000030"
        manifest = checkpoint.verify(path)
        manifest["config"]["optimizer"] |= {"warmup": 20.0, "decay": 0.8}
        manifest["sha256"] = checkpoint._digest(manifest)
        (path / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
        (straight / "config.json").write_text(json.dumps(manifest["config"]), encoding="utf-8")
        assert load_run(straight).step == 30
        assert main(["train", "--out", str(straight), "--no-progress"]) == 2
        message = "config.json: warmup, decay: expected at most steps = 30 together, got 20 and 24 (decay = 0.8)\n"
        assert capsys.readouterr().err.endswith(message)

    def test_nor_may_a_run_without_checkpoint_change(self, often, tmp_path):
        with pytest.raises(Killed):
            train(often, tmp_path / "run", progress=False, on_step=die_at(2))
        with pytest.raises(UserError, match="has seed = 0, this run 1"):
            train(dataclasses.replace(often, seed=1), tmp_path / "run", progress=False)

    def test_other_data_is_refused(self, often, straight, shards):
        content = bytearray((shards / "train.bin").read_bytes())
        content[0] ^= 1
        (shards / "train.bin").write_bytes(content)
        header = json.loads((shards / "train.json").read_text())
        header["sha256"] = hashlib.sha256(content).hexdigest()
        (shards / "train.json").write_text(json.dumps(header))
        with pytest.raises(UserError, match="other data"):
            train(often, straight, resume="step-00000028", progress=False)

    def test_another_end_of_text_is_other_data(self, often, straight, shards):
        header = json.loads((shards / "train.json").read_text())
        (shards / "train.json").write_text(json.dumps({**header, "end_of_text": 5}))
        with pytest.raises(UserError, match="end_of_text was None, is 5"):
            train(often, straight, resume="step-00000028", progress=False)

    def test_a_checkpoint_of_another_folder(self, often, straight, tmp_path):
        with pytest.raises(UserError, match="none of that name"):
            train(often, straight, resume=str(tmp_path / "other" / "step-00000028"), progress=False)
        train(often, straight, resume=str(straight / "checkpoints" / "step-00000028"), progress=False)

    def test_a_damaged_line_of_metrics(self, often, straight):
        before = lines(straight)
        with open(straight / "metrics.jsonl", "ab") as file:
            file.write(b"\0\0\0\n")
        train(often, straight, progress=False)
        assert lines(straight) == before

    def test_a_folder_that_another_run_took_meanwhile(self, often, tmp_path, monkeypatch):
        original = loop.gemm_flops_per_second

        def other(*args):
            monkeypatch.setattr(loop, "gemm_flops_per_second", original)
            train(dataclasses.replace(often, seed=1), tmp_path / "run", progress=False)
            return original(*args)

        monkeypatch.setattr(loop, "gemm_flops_per_second", other)
        with pytest.raises(UserError, match="not empty"):
            train(often, tmp_path / "run", progress=False)
        assert checkpoint.verify(checkpoint.checkpoints(tmp_path / "run")[-1])["config"]["seed"] == 1

    def test_never(self, often, straight):
        with pytest.raises(UserError, match="not empty"):
            train(often, straight, resume="never", progress=False)

    def test_unknown_checkpoint(self, often, straight):
        with pytest.raises(
            UserError, match="checkpoint step-00000001: .* has none of that name; it has .*step-00000028"
        ):
            train(often, straight, resume="step-00000001", progress=False)

    def test_a_folder_in_which_another_process_trains(self, often, tmp_path):
        config = dataclasses.replace(often, steps=10**6)
        other = start(config, tmp_path / "run")
        wait_for(lambda: checkpoint.checkpoints(tmp_path / "run"), other)
        with pytest.raises(UserError, match="another process trains in this folder"):
            train(config, tmp_path / "run", progress=False)


class TestMovedData:
    """Checksums decide whether data in another place is the same."""

    @pytest.fixture
    def here(self, shards, tmp_path):
        return shutil.copytree(shards, tmp_path / "here")

    @pytest.fixture
    def moved(self, often, here, tmp_path):
        """A run that ended at step 22, whose data is now in the folder `there`."""
        config = dataclasses.replace(often, data=dataclasses.replace(often.data, data=(here,)))
        with pytest.raises(Killed):
            train(config, tmp_path / "run", progress=False, on_step=die_at(22))
        return tmp_path / "run", here.rename(tmp_path / "there")

    @pytest.mark.parametrize("relative", [False, True])
    def test_a_prepared_folder_goes_on_bit_for_bit(self, straight, moved, monkeypatch, relative):
        folder, there = moved
        monkeypatch.chdir(there.parent)
        arguments = ["train", "--out", str(folder), "--data", "there" if relative else str(there), "--no-progress"]
        assert main(arguments) == 0
        assert_same_run(straight, folder)
        assert main(["train", "--out", str(folder), "--no-progress"]) == 0  # the new place is the run's own now

    def test_the_old_place_says_what_to_do(self, moved, here, capsys):
        folder, _ = moved
        assert main(["train", "--out", str(folder), "--no-progress"]) == 2
        message = f"data {here}: no such file or folder; if it has moved, give its new place by --data"
        assert capsys.readouterr().err == f"tst train: {message}\n"

    @pytest.mark.parametrize("checkpoints", [True, False], ids=["after a checkpoint", "before any"])
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_other_data_is_refused(self, moved, split, checkpoints, capsys):
        folder, there = moved
        if not checkpoints:
            shutil.rmtree(folder / "checkpoints")
        write_split(there, split, np.arange(5000) % VOCABULARY)
        assert main(["train", "--out", str(folder), "--data", str(there), "--no-progress"]) == 2
        begun = f"{folder / 'checkpoints' / 'step-00000020'} was trained" if checkpoints else f"{folder} began"
        name = {"train": "data", "val": "held_out"}[split]
        sha256 = json.loads((there / f"{split}.json").read_text(encoding="utf-8"))["sha256"]
        error = capsys.readouterr().err
        assert f"resume: {begun} on other data: {name} was '" in error and f"is '{sha256}'" in error

    def test_before_any_checkpoint_it_starts_at_step_0(self, straight, moved, capsys):
        folder, there = moved
        shutil.rmtree(folder / "checkpoints")
        assert main(["train", "--out", str(folder), "--data", str(there), "--no-progress"]) == 0
        assert "starts at step 0" in capsys.readouterr().err
        assert_same_run(straight, folder)

    def test_a_pattern_is_a_place(self, often, documents, tmp_path):
        for i, document in enumerate(documents):
            (tmp_path / f"{i}.txt").write_text(document, encoding="utf-8")
        data = DataConfig(data=(tmp_path / "*.txt",), vocabulary=300)
        train(dataclasses.replace(often, data=data, eval_tokens=64), tmp_path / "run", progress=False)
        assert main(["train", "--out", str(tmp_path / "run"), "--no-progress"]) == 0

    def test_text_and_its_tokenizer(self, often, documents, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        here = tmp_path / "here"
        here.mkdir()
        for i, document in enumerate(documents):
            (here / f"{i}.txt").write_text(document, encoding="utf-8")
        assert main(["prepare", "--data", "here", "--vocabulary", "300", "--out", "shards"]) == 0
        shutil.copyfile("shards/tokenizer.json", here / "tokenizer.json")
        data = DataConfig(data=(here,), vocabulary=300, tokenizer=here / "tokenizer.json")
        config = dataclasses.replace(often, data=data, eval_tokens=64)
        train(config, tmp_path / "straight", progress=False)
        for name in ("a", "b"):
            with pytest.raises(Killed):
                train(config, tmp_path / name, progress=False, on_step=die_at(9))

        here.rename("there")
        arguments = ["train", "--out", "a", "--data", "there", "--no-progress"]
        assert main(arguments) == 2
        message = f"tokenizer {here / 'tokenizer.json'}: no such file or folder; if it has moved, give its new place by"
        assert message in capsys.readouterr().err
        assert main([*arguments, "--tokenizer", "there/tokenizer.json"]) == 0
        # Prepared, the text is the same data too.
        assert main(["train", "--out", "b", "--data", "shards", "--no-progress"]) == 0
        for name in ("a", "b"):
            assert_same_run(tmp_path / "straight", tmp_path / name)


class TestWriting:
    def test_latest_are_kept(self, straight):
        names = sorted(p.name for p in (straight / "checkpoints").iterdir())
        assert names == ["step-00000028", "step-00000030"]

    def test_holds_everything(self, often, straight):
        path = straight / "checkpoints" / "step-00000030"
        manifest = checkpoint.verify(path)
        assert manifest["step"] == 30 and manifest["config"]["steps"] == 30 and manifest["data_tokens"] == 4224
        names = tensors(path).keys()
        assert {
            "model.head.weight",
            "optimizer.head.weight.exp_avg",
            "optimizer.norm.weight.step",
            "rng.cpu.0",
        } <= names

    # Every call that a save makes on the way to a checkpoint that counts, and the removal of old ones.
    @pytest.mark.parametrize(
        ("owner", "name", "call"),
        [
            (checkpoint.dcp, "save", 3),
            (checkpoint, "_checksums", 3),
            (checkpoint, "write_text", 3),
            (checkpoint, "sync", 8),
            (checkpoint, "sync", 10),
            (checkpoint, "_discard", 1),
            (checkpoint.shutil, "rmtree", 2),
        ],
    )
    def test_death_at_any_point_of_a_save(self, often, straight, tmp_path, monkeypatch, owner, name, call):
        original, calls = getattr(owner, name), 0

        def die(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as context, pytest.raises(Killed):
            context.setattr(owner, name, die)
            train(often, tmp_path / "run", progress=False)
        found = checkpoint.checkpoints(tmp_path / "run")
        assert found and checkpoint.verify(found[-1])["step"] in (8, 12)
        train(often, tmp_path / "run", progress=False)
        assert_same_run(straight, tmp_path / "run")
        assert not list((tmp_path / "run" / "checkpoints").glob(".*"))

    def test_an_old_one_that_cannot_be_removed(self, often, straight, tmp_path, monkeypatch):
        original = checkpoint.shutil.rmtree

        def refuse(path, ignore_errors=False, **options):
            if ignore_errors:
                return None
            return original(path, **options)

        with monkeypatch.context() as context:
            context.setattr(checkpoint.shutil, "rmtree", refuse)
            train(often, tmp_path / "run", progress=False)
        assert_same_run(straight, tmp_path / "run")

    def test_death_half_way_through_a_removal(self, often, straight, tmp_path, monkeypatch):
        def half(path, **_):
            next(path.glob("*.safetensors")).unlink()
            raise Killed

        with monkeypatch.context() as context, pytest.raises(Killed):
            context.setattr(checkpoint.shutil, "rmtree", lambda path, **o: half(path) if path.is_dir() else None)
            train(often, tmp_path / "run", progress=False)
        found = checkpoint.checkpoints(tmp_path / "run")
        assert [checkpoint.verify(path)["step"] for path in found] == [8, 12], "what is left of 4 is no checkpoint"
        train(often, tmp_path / "run", progress=False)
        assert_same_run(straight, tmp_path / "run")

    def test_no_checkpoint_of_a_run_that_diverged(self, often, tmp_path, monkeypatch):
        original = loop.learning_rate
        monkeypatch.setattr(
            loop, "learning_rate", lambda config, steps, step: math.nan if step == 5 else original(config, steps, step)
        )
        with pytest.raises(UserError, match="step 7: the loss is nan"):  # whose checkpoint would have been the next
            train(with_run(often, log_every=100), tmp_path / "run", progress=False)
        assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000004"]

    def test_full_disk(self, often, straight, tmp_path):
        result = run(often, tmp_path / "run", action=("fill", 9))
        assert result.returncode == 2
        assert "step-00000012: cannot be written" in result.stderr and "File too large" in result.stderr
        assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000008'}" in result.stderr
        assert "Traceback" not in result.stderr
        assert run(often, tmp_path / "run").returncode == 0
        assert_same_run(straight, tmp_path / "run")

    def test_full_disk_under_the_metrics(self, often, tmp_path, monkeypatch):
        def write(self, line):
            if line["step"] == 10:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(loop.Metrics, "write", write)
        with pytest.raises(UserError, match="No space left on device; the last checkpoint is .*step-00000008"):
            train(often, tmp_path / "run", progress=False)

    def test_data_that_vanishes(self, often, straight, tmp_path, shards):
        content = (shards / "train.bin").read_bytes()

        def truncate(step):
            if step == 9:
                os.truncate(shards / "train.bin", 100)

        with pytest.raises(UserError, match="train.bin: expected .* bytes .* it has become shorter"):
            train(often, tmp_path / "run", progress=False, on_step=truncate)
        (shards / "train.bin").write_bytes(content)
        train(often, tmp_path / "run", progress=False)
        assert_same_run(straight, tmp_path / "run")


class TestSignals:
    @pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_saves_and_exits(self, often, straight, tmp_path, signum, status, monkeypatch, capsys):
        with monkeypatch.context() as context:

            def send(step):
                if step == 9:
                    os.kill(os.getpid(), signum)

            context.setattr(loop, "train", functools.partial(train, on_step=send))
            save_config(often, tmp_path / "c.json")
            arguments = ["train", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "run"), "--no-progress"]
            before = signal.getsignal(signum)
            assert main(arguments) == status
            assert signal.getsignal(signum) == before
        error = capsys.readouterr().err
        assert signal.Signals(signum).name in error and "Traceback" not in error
        # The step before which it came: the processes of a run agree on it by their next exchange.
        assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "step-00000010"
        assert not (tmp_path / "run" / "result.json").exists()
        train(often, tmp_path / "run", progress=False)
        assert_same_run(straight, tmp_path / "run")


class TestDamage:
    def damaged(self, config, folder, match):
        with pytest.raises(UserError, match=match) as error:
            train(config, folder, progress=False)
        return str(error.value)

    @pytest.mark.parametrize("change", ["truncated", "altered", "missing", "more"])
    def test_is_named_and_the_one_before_offered(self, often, straight, change):
        path = straight / "checkpoints" / "step-00000030"
        file = next(path.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        if change == "truncated":
            file.write_bytes(content[:-1])
        elif change == "altered":
            content[-5] ^= 1
            file.write_bytes(content)
        elif change == "missing":
            file.unlink()
        else:
            (path / "more.safetensors").write_bytes(content)
        name = "more.safetensors" if change == "more" else file.name
        words = {
            "truncated": "expected .* bytes, got",
            "altered": "its checksum",
            "missing": "is missing",
            "more": "is not part of it",
        }
        message = self.damaged(often, straight, f"{path}: {name}:? {words[change]}")
        assert "step-00000028 before it is whole: --resume step-00000028" in message
        (straight / "result.json").unlink()
        train(often, straight, resume="step-00000028", progress=False)
        assert (straight / "result.json").exists()

    @pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[1]"])
    def test_manifest(self, often, straight, text):
        (straight / "checkpoints" / "step-00000030" / "checkpoint.json").write_text(text)
        self.damaged(often, straight, "step-00000030: checkpoint.json")

    def test_altered_manifest(self, often, straight):
        path = straight / "checkpoints" / "step-00000030" / "checkpoint.json"
        path.write_text(path.read_text().replace('"step": 30', '"step": 29'))
        self.damaged(often, straight, "checkpoint.json has been altered")

    def test_all_of_them(self, often, straight):
        for path in checkpoint.checkpoints(straight):
            (path / "checkpoint.json").unlink()
        self.damaged(often, straight, "there is no whole one before it")

    def test_of_another_model(self, often, straight):
        found = checkpoint.choose(straight, "auto")
        with pytest.raises(UserError, match=r"expected model\..* of shape"):
            checkpoint.load_weights(found.path, torch.nn.Linear(3, 3))


class TestHostileFiles:
    """Files that would run code if anything unpickled them."""

    @pytest.fixture
    def hostile(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        content = pickle.dumps(Payload())
        pickle.loads(content)  # it does what it says
        (tmp_path / "executed").rmdir()
        yield content
        assert not (tmp_path / "executed").exists()

    def seal(self, path):
        """Makes a checkpoint whole again after its files were changed, as an attacker could."""
        manifest = json.loads((path / "checkpoint.json").read_text())
        del manifest["sha256"]
        manifest["files"] = checkpoint._checksums(path, None)
        (path / "checkpoint.json").write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))

    def test_metadata_of_dcp(self, often, straight, hostile):
        path = straight / "checkpoints" / "step-00000030"
        (path / ".metadata").write_bytes(hostile)
        with pytest.raises(UserError, match=".metadata is not part of it"):
            train(often, straight, progress=False)
        self.seal(path)
        train(often, straight, progress=False)  # nothing reads it

    def test_tensors(self, often, straight, hostile):
        path = straight / "checkpoints" / "step-00000030"
        next(path.glob("*.safetensors")).write_bytes(hostile)
        self.seal(path)
        with pytest.raises(UserError, match="step-00000030: cannot be read"):
            train(often, straight, progress=False)

    def test_manifest(self, often, straight, hostile):
        (straight / "checkpoints" / "step-00000030" / "checkpoint.json").write_bytes(hostile)
        with pytest.raises(UserError, match="checkpoint.json cannot be read"):
            train(often, straight, progress=False)

    def test_shard_and_tokenizer(self, shards, hostile):
        (shards / "tokenizer.json").write_bytes(hostile)
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(shards / "tokenizer.json")
        (shards / "train.bin").write_bytes(hostile)
        with pytest.raises(UserError, match="expected 40000 bytes"):
            Shard(shards, "train")
        (shards / "train.json").write_bytes(hostile)
        with pytest.raises(UserError, match="shard"):
            Shard(shards, "train")


def test_reinitialised_run_goes_on_bit_for_bit(often, tmp_path):
    config = dataclasses.replace(often, superposition=SuperpositionConfig(bag_size=4, ratio=0.4, reinitialise=True))
    train(config, tmp_path / "a", progress=False)
    with pytest.raises(Killed):  # the checkpoint is of the last step before the switch
        train(config, tmp_path / "b", progress=False, on_step=die_at(13))
    train(config, tmp_path / "b", progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
