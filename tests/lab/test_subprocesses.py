"""What a user sees of runs that are going."""

import dataclasses
import io
import json
import sys

import pytest

from tst_ext.lab import subprocesses
from tst_ext.lab.subprocesses import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(subprocesses, "time", Clock())
    return subprocesses.time


def reached(folder, step, loss=None):
    folder.mkdir(exist_ok=True)
    lines = [{"step": step, "loss": loss or 3.0}, {"step": step, "val_loss": 4.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_line_every_30_seconds_with_steps_losses_and_the_time_left(tiny, tmp_path, clock, capsys):
    runs = {"a": dataclasses.replace(tiny, steps=100), "b": dataclasses.replace(tiny, steps=300)}
    reached(tmp_path / "a", 20)  # before this call: a fifth of its 100 steps of 400
    progress = Progress(runs, tmp_path, shown=True)
    progress.show(["a"])
    assert capsys.readouterr().err == ""
    clock.now = 60.0
    reached(tmp_path / "a", 40, 2.5)
    progress.show(["a", "b"])
    # 20 steps took a minute, 360 are left.
    assert capsys.readouterr().err == "10%, 0:18:00 left; a 40/100 loss 2.500; b 0/300\n"
    clock.now = 89.0
    progress.show(["a", "b"])
    assert capsys.readouterr().err == ""
    progress.ended({"name": "a", "val_loss": 1.5, "seconds": 75.0})
    progress.ended({"name": "b", "status": "was killed"})
    assert capsys.readouterr().err == "1/2 a: 1.5000 after 75 s\n2/2 b: was killed\n"


def test_a_terminal_shows_one_line(tiny, tmp_path, clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(subprocesses.shutil, "get_terminal_size", lambda: type("Size", (), {"columns": 12}))
    progress = Progress({"a": tiny}, tmp_path, shown=True)
    reached(tmp_path / "a", 15)
    clock.now = 60.0
    progress.show(["a"])
    progress.ended({"name": "a", "val_loss": 1.5, "seconds": 75.0})
    progress.close()
    cut, whole = "50%, 0:01:00 left", "1/1 a: 1.5000 after 75 s"
    assert sys.stderr.getvalue() == f"\r{cut[:11]}\x1b[K\r{whole}\x1b[K\n\r\x1b[K\r"


def test_without_progress_nothing_is_said(tiny, tmp_path, clock, capsys):
    progress = Progress({"a": tiny}, tmp_path, shown=False)
    clock.now = 60.0
    progress.show(["a"])
    progress.ended({"name": "a", "status": "was killed"})
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_run_is_one_process_whatever_a_cluster_has_set(tiny, tmp_path, forked_runs, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    process = subprocesses.start(dataclasses.replace(tiny, steps=1), tmp_path / "run")
    assert process.wait(timeout=60) == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["processes"] == 1
