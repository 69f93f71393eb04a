"""The commands as a user runs them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tst_ext.__main__ import main
from tst_ext.train import compare
from tst_ext.train.config import UserError, load_config, save_config


def tst(*arguments, **options):
    command = [sys.executable, "-m", "tst_ext", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def config_file(tiny, tmp_path):
    save_config(tiny, tmp_path / "tiny.json")
    return tmp_path / "tiny.json"


class TestTrain:
    def test_options_override_the_file(self, config_file, tiny, tmp_path, capsys):
        out = tmp_path / "run"
        assert main(["train", "--config", str(config_file), "--steps", "3", "--out", str(out), "--no-progress"]) == 0
        saved = load_config(out / "config.json")
        assert saved.steps == 3 and saved.model == tiny.model
        assert "held-out loss" in capsys.readouterr().out

    def test_saved_configuration_repeats_the_run(self, config_file, tmp_path):
        runs = []
        for config, out in ((config_file, tmp_path / "a"), (tmp_path / "a" / "config.json", tmp_path / "b")):
            assert main(["train", "--config", str(config), "--out", str(out), "--no-progress"]) == 0
            runs.append(json.loads((out / "result.json").read_text())["val_loss"])
        assert runs[0] == runs[1]


class TestCompare:
    def test_end_to_end(self, config_file, tmp_path):
        out = tmp_path / "out"
        result = tst("compare", "--config", config_file, "--seeds", 0, 1, "--out", out)
        assert result.returncode == 0, result.stderr
        summary = json.loads((out / "compare.json").read_text())
        assert [row["seed"] for row in summary["seeds"]] == [0, 1]
        for row in summary["seeds"]:
            assert row["difference"] == row["tst"]["val_loss"] - row["baseline"]["val_loss"]
            assert row["baseline"]["data_tokens"] == 30 * 4 * 16 < row["tst"]["data_tokens"]
            assert row["baseline"]["switch_step"] == 0 and row["tst"]["switch_step"] == 12
            assert row["tst"]["val_loss"] != row["baseline"]["val_loss"]
        table = (out / "compare.md").read_text()
        assert table in result.stdout + "\n" and f"{summary['mean_difference']:+.3f}" in table
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_a_failing_run_stops_the_other_and_is_named(self, config_file, tmp_path):
        started = time.monotonic()
        result = tst(
            "compare", "--config", config_file, "--steps", 10**6, "--learning-rate", 1e30, "--clip", 1e30,
            "--out", tmp_path / "out",
        )  # fmt: skip
        assert result.returncode == 2
        assert "run failed" in result.stderr and "loss is" in result.stderr and ".log" in result.stderr
        assert time.monotonic() - started < 100, "the other run would take hours"

    @pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_no_process_behind(self, config_file, tmp_path, sent, status):
        command = [sys.executable, "-m", "tst_ext", "compare", "--config", config_file, "--steps", "1000000"]
        # A shell's background job ignores SIGINT and hands that on; the command is to see what a terminal would send.
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "out"],
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        metrics = tmp_path / "out" / "tst-seed0" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(timeout=60) == status
        size = metrics.stat().st_size
        time.sleep(1)
        assert metrics.stat().st_size == size > 0

    def test_a_killed_run_is_the_one_named(self, tiny, tmp_path, monkeypatch):
        def follow(processes, arms, folders):
            processes["tst"].kill()
            processes["tst"].wait()

        # The baseline comes first, and compare itself stops it then: it must not be the one blamed.
        monkeypatch.setattr(compare, "_follow", follow)
        with pytest.raises(UserError, match="tst run was killed by signal 9"):
            compare.compare(dataclasses.replace(tiny, steps=10**6), tmp_path / "out", (0,))

    def test_baseline_against_itself_is_refused(self, config_file, tmp_path, capsys):
        assert main(["compare", "--config", str(config_file), "--ratio", "0", "--out", str(tmp_path / "out")]) == 2
        assert "ratio" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestPrepare:
    def test_prepared_folder_trains(self, documents, config_file, tmp_path, capsys):
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
        arguments = ["--data", str(tmp_path / "text.jsonl"), "--text-key", "body", "--vocabulary", "300"]
        assert main(["prepare", *arguments, "--out", str(tmp_path / "p")]) == 0
        arguments = ["--config", str(config_file), "--data", str(tmp_path / "p"), "--steps", "2", "--no-progress"]
        assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["vocabulary"] == 300
        assert main(["prepare", "--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "p")]) == 2
        assert "not empty" in capsys.readouterr().err


class TestUserErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "--heads", "5"], "tst train: heads: expected"),
            (["train", "--config", "absent.toml"], "absent.toml"),
            (["train", "--config"], "--config: expected a file"),
            (["train", "--config=absent.toml"], "absent.toml"),
            (["train", "--data", "absent.txt"], "absent.txt: no such"),
            (["train", "--device", "abacus"], "device: expected auto, cpu or cuda, got 'abacus'"),
            (["train", "--out", "/dev/null"], "out /dev/null: /dev/null is not a folder"),
            (["compare", "--out", "/dev/null/x"], "out /dev/null/x: /dev/null is not a folder"),
            (["prepare", "--out", "/dev/null"], "out /dev/null"),
            (["fly"], "expected a command, got 'fly'"),
            ([], "expected a command, got 'none'"),
        ],
    )
    def test_one_line_and_status_2(self, arguments, message, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and "Traceback" not in stderr
        assert not (tmp_path / "runs").exists()

    def test_missing_packages_are_named(self, tmp_path):
        (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = tst("train", env=environment)
        assert result.returncode == 2 and "tyro is missing: pip install 'tst-ext[train]'" in result.stderr
        assert tst("info", env=environment).returncode == 0

    def test_help(self, capsys):
        assert main(["--help"]) == 0
        assert "compare" in capsys.readouterr().out
        with pytest.raises(SystemExit) as status:
            main(["train", "--help"])
        assert status.value.code == 0 and "--bag-size" in capsys.readouterr().out
