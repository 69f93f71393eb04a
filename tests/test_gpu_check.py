import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from tst_ext import SuperpositionSchedule
from tst_ext.train.batches import check_batches
from tst_ext.train.data import Shard

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


@pytest.fixture
def gpu_script(monkeypatch):
    """Import a script of benchmarks/gpu as itself does the ones next to it."""
    monkeypatch.syspath_prepend(PATH.parent / "gpu")

    def load(name):
        spec = importlib.util.spec_from_file_location(f"gpu_{name}", PATH.parent / "gpu" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("common", None)


def test_stages_of_single_steps_have_the_bag_sizes_in_their_order(gpu_script):
    train = gpu_script("train")
    sizes = train.order(block=15, turns=30, bag_size=6)
    assert sizes[:30] == [6] * 15 + [1] * 15 and sorted(sizes[30:]) == [1] * 30 + [6] * 30
    assert sizes[30:] != [6, 1] * 30
    options = train.superposition(sizes)
    schedule = SuperpositionSchedule(len(sizes) + 1, options.ratio, options.bag_size, options.stages)
    assert [schedule.bag_size_at(step) for step in range(len(sizes))] == sizes


@pytest.mark.parametrize("compiled", [True, False])
def test_the_trainer_takes_the_configuration_and_its_shards(gpu_script, tmp_path, compiled):
    train = gpu_script("train")  # not as a rehearsal has them
    config = train.configuration(tmp_path / "data", train.order(block=15, turns=12, bag_size=6), compiled)
    train.write_shards(tmp_path / "data", config.data.vocabulary)
    for split in ("train", "val"):
        check_batches(config, Shard(tmp_path / "data", split, config.data), world=1)
    assert config.run.compile == compiled and config.dtype == "bfloat16"


def test_collected_text_has_each_content_once_and_no_data(gpu_script, tmp_path):
    compare = gpu_script("compare")
    folder = tmp_path / "files"
    (folder / "deep" / "deeper").mkdir(parents=True)
    files = {"a.py": b"a\n", "deep/b.h": b"b\n", "deep/deeper/c.md": "ç\n".encode(), "deep/copy.txt": b"a\n"}
    files |= {"d.json": b"d", "nul.py": b"\0", "latin.c": b"\xe9 ", "empty.py": b"", "large.cu": b"x" * (2**20 + 1)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    paths = compare.walk([folder])
    assert {Path(path).relative_to(folder).as_posix() for path in paths} == set(files) - {"d.json"}
    counts = compare.collect(paths, tmp_path / "text", most=1000)
    written = [json.loads(line)["text"] for path in (tmp_path / "text").iterdir() for line in path.open()]
    assert sorted(written) == ["a\n", "b\n", "ç\n"]
    assert (counts["files"], counts["bytes"], counts["read"]) == (3, 7, 8)
    assert counts["left_out"] == {"copies": 1, "NUL bytes": 1, "no UTF-8": 1, "empty": 1, "larger": 1}
    assert compare.collect(paths, tmp_path / "less", most=1)["files"] == 1
    assert compare.collect(paths, tmp_path / "none", most=1000, until=lambda: True)["files"] == 0


def test_step_at_which_a_curve_reaches_a_loss(gpu_script):
    reached = gpu_script("compare").reached
    assert reached([(10, 5.0), (20, 3.0), (30, 4.0)], 4.0) == 15
    assert reached([(10, 5.0)], 6.0) == 10 and reached([(10, 5.0)], 4.0) is None


def test_steps_of_the_comparison_fit_into_the_time(gpu_script):
    compare = gpu_script("compare")
    steps = compare.number_of_steps(150, 2, 0.02, 0.2)
    assert steps % compare.VALIDATIONS == 0
    used = 2 * (2 + 3 + steps * 0.02 + compare.VALIDATIONS * 0.2)
    assert 130 < used < 150
    assert compare.number_of_steps(-5, 2, 0.02, 0.2) == 2 * compare.VALIDATIONS  # so that there is a result at all
