"""docs/evidence.md shows what its results hold, and these are of the sweep that it names."""

import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest

from tst_ext.lab.plan import recommend
from tst_ext.lab.sweep import load_sweep
from tst_ext.train.config import TrainConfig

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"


def report(monkeypatch, *arguments):
    """Exit status of report.py, or what it says as it ends."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EVIDENCE / "report.py"), run_name="__main__")
    return ended.value.code


def test_the_tables_are_those_of_the_results(monkeypatch):
    assert not report(monkeypatch, "--check")


@pytest.mark.parametrize("study", ["study", "further"])
def test_the_results_are_of_the_study(study):
    sweep = load_sweep(EVIDENCE / f"{study}.toml")
    rows = {row["name"]: row for row in json.loads((EVIDENCE / f"{study}.json").read_text())["runs"]}
    assert rows.keys() == sweep.runs.keys()
    for name, options in sweep.options.items():
        assert rows[name]["options"] == options
        assert rows[name]["grids"] == [grid.name for grid in sweep.grids if name in grid.runs]
        # Of the further runs, only the experts have been done so far.
        assert rows[name]["status"] == "done" or (study == "further" and "experts" not in rows[name]["grids"])


def test_plan_quotes_the_results():
    rows = json.loads((EVIDENCE / "study.json").read_text())["runs"]

    def figure(**options):
        wanted = next(row["options"] for row in rows if row["name"] == "seed=0") | options
        differences = [row["difference"] for row in rows if row["options"] == wanted]
        assert len(differences) == 3
        return f"{abs(statistics.mean(differences)):.3f}"

    lost = f"by {figure(steps=2000, bag_size=2)} with s = 2 and by {figure(steps=2000)} with s = 4"
    assert lost in recommend(TrainConfig(steps=2000))["evidence"]
    gained = (
        f"gains {figure(steps=4000, bag_size=2)} with s = 2 and r = 0.2, at 3.7 it gains {figure(bag_size=2)}, and "
    )
    assert gained + f"{figure(bag_size=2, ratio=0.4)} with r = 0.4" in recommend(TrainConfig(steps=4000))["evidence"]


def test_other_results_are_told_apart(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    results = json.loads((EVIDENCE / "study.json").read_text())
    results["runs"][0]["val_loss"] += 0.001
    file.write_text(json.dumps(results))
    assert report(monkeypatch, "--check", "--results", file) == 1
    results["runs"][3]["status"] = "to do"
    file.write_text(json.dumps(results))
    assert "expected a complete study, got 1 runs that are not done" in report(monkeypatch, "--results", file)


def test_the_other_files_are_sweeps():
    curves = load_sweep(EVIDENCE / "curves.toml")
    assert curves.runs.keys() <= load_sweep(EVIDENCE / "study.toml").runs.keys()
    assert len(load_sweep(EVIDENCE / "gpu.toml").runs) == 6
