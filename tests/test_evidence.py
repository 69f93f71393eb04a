"""docs/evidence.md shows what its results hold, and these are of the sweep that it names."""

import json
import subprocess
import sys
from pathlib import Path

from tst_ext.train.sweep import load_sweep

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"


def test_the_tables_are_those_of_the_results():
    check = subprocess.run([sys.executable, EVIDENCE / "report.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_results_are_of_the_study():
    sweep = load_sweep(EVIDENCE / "study.toml")
    rows = {row["name"]: row for row in json.loads((EVIDENCE / "study.json").read_text())["runs"]}
    assert rows.keys() == sweep.runs.keys()
    for name, options in sweep.options.items():
        assert rows[name]["status"] == "done" and rows[name]["options"] == options
        assert rows[name]["grids"] == [grid.name for grid in sweep.grids if name in grid.runs]


def test_the_other_files_are_sweeps():
    curves = load_sweep(EVIDENCE / "curves.toml")
    assert curves.runs.keys() <= load_sweep(EVIDENCE / "study.toml").runs.keys()
    assert len(load_sweep(EVIDENCE / "gpu.toml").runs) == 6
