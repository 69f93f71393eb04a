"""tst compare: a sweep over seeds, with the curves of the first."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from helpers.runs import lines, tst, wait_for
from tst_ext.__main__ import main
from tst_ext.lab import compare as module
from tst_ext.lab.compare import compare
from tst_ext.lab.subprocesses import is_running
from tst_ext.lab.sweep import table
from tst_ext.train.config import save_config
from tst_ext.train.files import UserError

ARMS = ("seed=0", "ratio=0.0,seed=0")


@pytest.fixture
def config_file(tiny, tmp_path):
    save_config(tiny, tmp_path / "tiny.json")
    return tmp_path / "tiny.json"


def run(*arguments):
    command = [sys.executable, "-m", "tst_ext", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_end_to_end_and_again(config_file, tmp_path, forked_runs, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--config", str(config_file), "--seeds", "0", "1", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in results["runs"]}
    assert set(rows) == {*ARMS, "seed=1", "ratio=0.0,seed=1"}
    for seed in (0, 1):
        tst, baseline = rows[f"seed={seed}"], rows[f"ratio=0.0,seed={seed}"]
        assert (tst["seed"], tst["baseline"], tst["status"]) == (seed, baseline["name"], "done")
        assert tst["difference"] == tst["val_loss"] - baseline["val_loss"] != 0
        assert baseline["data_tokens"] == 30 * 4 * 16 < tst["data_tokens"]
        assert baseline["switch_step"] == 0 and tst["switch_step"] == 12
    assert table(results) in printed.out and "| 0.4 | 2 | " in printed.out
    assert all(f"/4 {name}: {row['val_loss']:.4f} after " in printed.err for name, row in rows.items())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "results.csv").read_text().splitlines()) == 5

    # Given again it finds them done.
    stamps = {name: (out / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in rows}
    assert main(arguments) == 0
    assert {name: (out / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in rows} == stamps
    assert main([*arguments, "--steps", "31"]) == 2
    assert "this run was made with other options" in capsys.readouterr().err


@pytest.mark.extended
def test_as_a_shell_starts_it(config_file, tmp_path):
    result = run("--config", config_file, "--steps", 3, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr.count("Traceback")) == (0, 0), result.stderr
    assert table(json.loads((tmp_path / "out" / "results.json").read_text())) in result.stdout


def test_a_failing_run_is_named(config_file, tmp_path, forked_runs, capsys):
    arguments = ["--config", str(config_file), "--learning-rate", "1e30", "--clip", "1e30", "--steps", "3"]
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    for name in ARMS:
        assert f"tst compare: {name} failed with status 2 (log " in error
    assert "loss is" in error and not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_behind(config_file, tmp_path, sent, status):
    arguments = ["--config", config_file, "--steps", "1000000", "--out", tmp_path / "out"]
    process = tst("compare", *arguments, output=tmp_path / "compare")
    runs = [tmp_path / "out" / "runs" / name for name in ARMS]
    wait_for(lambda: all(lines(run) for run in runs), process)
    process.send_signal(sent)
    assert process.wait(timeout=60) == status
    assert not any(is_running(run) for run in runs)


@pytest.mark.parametrize(
    ("cores", "device", "threads", "seeds", "expected"),
    [(8, "cpu", 0, 1, 4), (8, "cpu", 0, 3, 1), (1, "cpu", 0, 1, 1), (8, "cpu", 3, 1, 3), (8, "cuda", 0, 1, 0)],
)
def test_runs_at_the_same_time_share_the_cores(tiny, tmp_path, monkeypatch, cores, device, threads, seeds, expected):
    swept = []

    def run_sweep(sweep, folder):
        swept.append(sweep)
        rows = [{"name": n, "seed": c.seed, "baseline": sweep.baselines[n], "status": "to do"}
                for n, c in sweep.runs.items()]  # fmt: skip
        return {"runs": rows}

    monkeypatch.setattr(module, "run_sweep", run_sweep)
    monkeypatch.setattr(module, "available_cpus", lambda: cores)
    config = dataclasses.replace(tiny, run=dataclasses.replace(tiny.run, threads=threads, device=device))
    compare(config, tmp_path / "out", tuple(range(seeds)))
    (sweep,) = swept
    assert [config.run.threads for config in sweep.runs.values()] == [expected] * 2 * seeds


def test_what_is_no_comparison_is_refused(config_file, tiny, tmp_path, capsys):
    for options in (["--ratio", "0"], ["--bag-size", "1"]):
        assert main(["compare", "--config", str(config_file), *options, "--out", str(tmp_path / "out")]) == 2
        assert "ratio, bag_size: expected ratio > 0 and bag_size > 1" in capsys.readouterr().err
    for seeds in ((), (0, 0)):
        with pytest.raises(UserError, match="seeds: expected at least one, each once, got"):
            compare(tiny, tmp_path / "out", seeds)
    assert not (tmp_path / "out").exists()
