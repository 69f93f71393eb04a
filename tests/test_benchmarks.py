"""Results of the benchmarks: what is kept of them, and that report.py reads it."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPEC = importlib.util.spec_from_file_location("results_file", BENCHMARKS / "results_file.py")
results_file = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_file)

MACHINE = {name: name for name in results_file.MACHINE}
CASE = {"op": "loss", "shape": "8x8", "s": 2, "dtype": "float32", "GB/s": 1.0}


def report():
    """What pytest-benchmark hands over for one case: more than is kept."""
    contenders = {
        "tst_ext": {"floor": False, "extra_mib": 1.5} | results_file.summary([0.004, 0.002, 0.003, 0.009], 0.0035),
        "floor": {"floor": True} | results_file.summary([0.007], 0.0035),
        "peer": {"unavailable": "ImportError: {no such module}"},
    }
    case = {"name": "test_loss[a]", "stats": {"data": [0.1] * 99}, "extra_info": CASE | {"contenders": contenders}}
    machine = MACHINE | {"cpu": {"count": 2, "flags": ["avx2"] * 99}}
    return {"machine_info": machine, "commit_info": {"id": "0"}, "datetime": "2026-01-01", "benchmarks": [case]}


def test_summary():
    row = results_file.summary([0.004, 0.002, 0.003, 0.009], ours=0.007)
    assert row["ms"] == 3.5 and row["ours_over_this"] == 2
    assert (row["min_ms"], row["max_ms"], row["iqr_ms"], row["rounds"]) == (2, 9, 2.5, 4)
    assert results_file.summary([0.007], 0.007) == {
        "ms": 7, "min_ms": 7, "max_ms": 7, "iqr_ms": 0, "rounds": 1, "ours_over_this": 1
    }  # fmt: skip


def test_results_keep_the_contenders_one_per_line_and_no_samples():
    text = results_file.shortened(report())
    kept = json.loads(text)
    assert kept["benchmarks"][0]["extra_info"] == report()["benchmarks"][0]["extra_info"]
    assert "flags" not in text and "data" not in text and len(text.splitlines()) < 40
    assert results_file.shortened(kept) == text


@pytest.mark.parametrize("option", [[], ["--markdown"]])
def test_report_reads_them(tmp_path, monkeypatch, capsys, option):
    path = tmp_path / "results.json"
    path.write_text(results_file.shortened(report()))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), *option])
    runpy.run_path(str(BENCHMARKS / "report.py"), run_name="__main__")
    assert "3.5" in capsys.readouterr().out and path.with_suffix(".png").exists()


@pytest.mark.skipif(not (BENCHMARKS / "results").exists(), reason="needs the repository")
def test_results_of_the_repository_are_short():
    for path in (BENCHMARKS / "results").glob("*_cores.json"):
        assert results_file.shortened(json.loads(path.read_text())) == path.read_text()


# Each of which has asserted that it makes as many tokens as ours, or after two updates has our loss.
CONTENDERS = {
    "test_data.py": [
        {"tst_ext", "encode_batch_fast", "datasets.map"},
        {"tst_ext", "tst_ext, order random", "nanoGPT's get_batch"},
    ],
    "test_step.py": [
        {"tst_ext", "baseline step"},
        {"tst_ext", "next-token step"},
        {"tst_ext", "nanoGPT's way, rewritten", "transformers, LlamaForCausalLM"},
    ],
}


@pytest.mark.extended
@pytest.mark.parametrize("file", CONTENDERS)
def test_benchmarks_run_with_all_contenders(tmp_path, file):
    pytest.importorskip("pytest_benchmark")
    path, temporary = tmp_path / "results.json", tmp_path / "temporary"
    options = ["--quick", "--benchmark-json", str(path), "--basetemp", str(temporary), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS / file), *options]
    # In a worker of pytest-xdist pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = {"cwd": BENCHMARKS.parent, "env": environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    contenders = [case["extra_info"]["contenders"] for case in json.loads(path.read_text())["benchmarks"]]
    assert [{name for name, row in case.items() if "ms" in row} for case in contenders] == CONTENDERS[file]
