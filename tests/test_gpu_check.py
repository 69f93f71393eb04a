import importlib.util
import json
import time
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"
SPEC = importlib.util.spec_from_file_location("gpu_check", PATH)
gpu_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_check)

RECORD = "import os, time; open(os.environ['GPU_CHECK_RESULTS'], 'a').write('{\"measured\": 1}\\n'); "


@pytest.fixture
def results(tmp_path):
    return gpu_check.Results(tmp_path, 1)


def step(name, code, limit=30.0):
    return gpu_check.Step(name, ["-S", "-c", code], limit)


def alive(pid):
    """Whether a process runs; a zombie, which its parent has not asked for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_limit_ends_a_step_and_its_children_and_keeps_what_it_had(results, tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " if stubborn else ""
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); open('{}', 'w').write(str(p.pid)); "
    code = ignore + RECORD + child.format(tmp_path / "pid") + "time.sleep(60)"
    assert gpu_check.run(step("slow", code, limit=1.0), results, {}) == "limit"
    measured, ended = results.lines()
    assert measured == {"measured": 1} and ended["step"] == "slow" and ended["seconds"] < 10
    time.sleep(0.1)
    assert not alive((tmp_path / "pid").read_text())


def test_a_failed_step_stops_no_other_but_the_build_does(results):
    good, bad, build = (step(n, RECORD + f"raise SystemExit({n != 'good'})") for n in ("good", "bad", "build"))
    assert gpu_check.run_all([[bad], [good]], results, {}) == ["failed", "ok"]
    assert gpu_check.run_all([[build, good], [good]], results, {}) == ["failed", "ok"]


def test_no_step_begins_when_no_time_is_left(results):
    group = [step("good", RECORD)]
    now = time.monotonic()
    assert gpu_check.run_all([group], results, {}, now + 12) == ["left out"]
    assert gpu_check.run_all([group], results, {}, now + 60) == ["ok"]


def test_half_a_line_and_earlier_runs_are_left_out(results):
    results.add({"step": "a"})
    with open(results.path, "a") as file:
        file.write('{"step": "b')
    assert results.lines() == [{"step": "a"}]
    later = gpu_check.Results(results.path.parent, 1)
    later.add({"step": "c"})
    assert later.lines() == [{"step": "c"}]


def test_summary_names_failed_tests_and_stays_short(results):
    lines = ["FAILED tests/test_a.py::test_b - AssertionError", "1 failed, 3 passed in 0.1s"]
    code = f"print({lines[0]!r}); print({lines[1]!r}); raise SystemExit(1)"
    gpu_check.run(gpu_check.Step("tests", ["-c", code, "pytest"], 30.0), results, {})
    text = gpu_check.table([*results.lines(), {"step": "long", "value": "x" * 1000}])
    assert "1 failed, 3 passed" in text and "test_a.py::test_b" in text and max(map(len, text.splitlines())) < 240


def test_every_step_is_a_script_that_exists_and_names_are_unique():
    for groups in gpu_check.stages(rehearse=False).values():
        steps = [s for group in groups for s in group]
        assert len({s.name for s in steps}) == len(steps)
        for s in steps:
            for part in s.command:
                assert not part.endswith(".py") or (PATH.parent.parent / part).exists(), part
        assert json.dumps([s.command for s in steps])
