"""Build, test and measure on this machine's GPU, in three stages: `make gpu-check STAGE=1`, 2 or 3.

1 "correct": floors of this GPU while the extension builds, the times of our kernels, the CUDA tests. About 3 minutes.
2 "measured": our loss next to its peers, Nsight Compute's counters, compute-sanitizer. About 8 minutes.
3 "in training": the trainer's throughput in both phases, a step of its model next to the same model in other code, the
tests of torch.compile, a comparison of TST with its baseline. Up to 11 minutes.

Every step is a command with a limit in seconds and a process group of its own. A step that fails or reaches its limit
does not stop the next ones; only the build does. Each step appends its results to gpu_stageN.jsonl at once, one JSON
object per line, and its output to gpu_stageN.log. Both are in the folder that the environment variable OUT names, else
in benchmarks/results. `--steps NAME...` runs the named steps only, `--within SECONDS` leaves out what does not fit into
that time. `--rehearse` runs everything on the CPU with tiny
shapes, to find mistakes in these scripts; its numbers mean nothing.

Needs torch with CUDA, nvcc, pybind11, ninja, pytest, pytest-xdist and hypothesis, and no network. A peer that cannot
be imported is named in the results with the reason.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5  # seconds between the request to stop, at which pytest still reports, and the kill
TESTS = ("bag_embedding", "loss", "loss_options", "torch")  # whose fixture `device` has CUDA
PEERS = ("quack", "liger_cute", "liger", "listing", "plain", "torch_linear", "cce")
COMPILED = ("listing_compiled", "auto_chunker")  # minutes of compilation, so last
TOOLS = ("names", "planted", "memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]  # arguments of this Python
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)


def script(name: str, file: str, *arguments: str, limit: float, **environment: str) -> Step:
    return Step(name, [f"benchmarks/gpu/{file}.py", *arguments], limit, environment)


def tests(name: str, *arguments: str, limit: float, marks: str = "cuda and not slow") -> Step:
    options = ["-q", "-m", marks, "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    return Step(name, ["-m", "pytest", *options, *arguments], limit)


def stages(rehearse: bool) -> dict[int, list[list[Step]]]:
    """The steps of each stage in order. The steps of an inner list run at the same time."""
    build = script("build", "build", limit=240)
    workers = "2" if rehearse else "8"
    here = dict(marks="not slow and not extended") if rehearse else {}  # without a GPU there are no tests marked cuda
    chosen = ["-k", "bag_sizes or opcheck"] if rehearse else []
    return {
        1: [
            [build, script("floors", "floors", limit=100)],
            [script("kernels", "kernels", limit=60)],
            [
                Step("info", ["-m", "tst_ext", "info", "--check"], 120),
                tests("test_cuda", "-n", "2" if rehearse else "4", "tests/test_cuda.py", limit=150, **here),
                tests("test_ops", "-n", workers, *chosen, *(f"tests/test_{t}.py" for t in TESTS), limit=150, **here),
            ],
        ],
        2: [
            [build],
            [script("ours", "race", "ours", limit=40)],
            [script(name, "nsight", name, limit=60) for name in TOOLS],  # nothing is timed there
            [script("ncu", "nsight", "ncu", limit=60)],
            *([script(name, "race", name, limit=75)] for name in PEERS),
            *([script(name, "race", name, limit=110)] for name in COMPILED),
        ],
        3: [
            [build],
            [script("train", "train", limit=100)],
            [script("train_eager", "train", "--eager", limit=80)],
            [script("step", "step", limit=90)],
            [tests("test_compile", "-n", workers, *chosen, "tests/test_compile.py", limit=120, **here)],
            [script("compare", "compare", limit=280)],  # which fits itself into 240 seconds
        ],
    }


class Results:
    """The file of results, to which the steps append too, and the log."""

    def __init__(self, folder: Path, stage: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / f"gpu_stage{stage}.jsonl", folder / f"gpu_stage{stage}.log"
        self.path.touch()
        self.start = self.path.stat().st_size  # earlier runs stay in the file

    def add(self, line: dict[str, object]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def facts(self) -> dict | None:
        """Return the record of the device, of this run or an earlier one."""
        return next((line for line in self.lines(0) if "capability" in line), None)

    def lines(self, start: int | None = None) -> list[dict]:
        """Return the lines of this run, or from byte `start` on. A killed process may have left half a line."""
        found = []
        for line in self.path.read_bytes()[self.start if start is None else start :].splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


RUNNING: set[subprocess.Popen] = set()


def kill(process: subprocess.Popen) -> None:
    """Kill a step's process group, its children included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(step: Step, results: Results, environment: dict[str, str]) -> str:
    """Run a step to its end or limit, record how it ended, and return that: "ok", "failed" or "limit"."""
    began = time.monotonic()
    with open(results.log, "ab", buffering=0) as log:
        log.write(f"\n==== {step.name}: {' '.join(step.command)}\n".encode())
        place = log.tell()
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment | step.environment | {"GPU_CHECK_RESULTS": str(results.path), "GPU_CHECK_STEP": step.name},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        RUNNING.add(process)
        status = None
        try:
            for seconds, sign in ((step.limit, signal.SIGINT), (GRACE, signal.SIGKILL)):
                try:
                    process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    status = "limit"
                    os.killpg(process.pid, sign)
            process.wait()
        finally:  # also children that it left, and also where this program is told to stop
            kill(process)
            RUNNING.discard(process)
    status = status or ("ok" if process.returncode == 0 else "failed")
    output = results.log.read_bytes()[place:].decode(errors="replace")
    line: dict[str, object] = {"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if status == "failed":
        line["exit"] = process.returncode
    if "pytest" in step.command:
        endings = re.findall(r"(?m)^(?:=+ )?((?:\d+|no) (?:passed|failed|skipped|error|tests ran).*?)(?: =+)?$", output)
        line["tests"] = (endings or ["none"])[-1]
        line["failures"] = [text[:200] for text in re.findall(r"(?m)^((?:FAILED|ERROR) .*)$", output)[:40]]
    results.add(line)
    print(f"gpu-check: {step.name} {status} after {line['seconds']} s", flush=True)
    if status != "ok":
        print(output[-1200:], flush=True)
    return status


def run_all(
    groups: list[list[Step]], results: Results, environment: dict[str, str], deadline: float = math.inf
) -> list[str]:
    """Run the groups one after the other, up to a failed build or the deadline. Returns how each step ended."""
    ended: list[str] = []
    for group in groups:
        left = deadline - time.monotonic() - GRACE
        if left < 10:
            results.add({"step": group[0].name, "status": "left out", "reason": "no time is left"})
            ended.append("left out")
            continue
        first, *others = (replace(step, limit=min(step.limit, left)) for step in group)
        # Threads that are daemons: where this program is told to stop, it does not wait for them.
        pool = [Background(step, results, environment) for step in others]
        status = run(first, results, environment)
        ended += [status, *(thread.status() for thread in pool)]
        if first.name == "build" and status != "ok":
            print("gpu-check: without a build nothing else can run")
            break
    return ended


class Background(threading.Thread):
    """A step that runs in the meantime."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.arguments, self.ended = arguments, "failed"
        self.start()

    def run(self) -> None:
        self.ended = run(*self.arguments)

    def status(self) -> str:
        self.join()
        return self.ended


def table(lines: list[dict]) -> str:
    """One line per result, in the order in which they came, short enough for the end of a terminal's output."""
    text = []
    for line in lines:
        rest = {key: value for key, value in line.items() if key not in ("step", "status", "seconds", "failures")}
        values = " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in rest.items())
        status = f"{line['status']} {line.get('seconds', '')}".strip() if "status" in line else ""
        text.append(f"{line.get('step', ''):12} {status:12} {values}"[:230].rstrip())
        text += [f"{'':12} {failure[:160]}" for failure in line.get("failures", [])[:8]]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--steps", nargs="*", default=[], metavar="NAME", help="the steps to run; default: all")
    parser.add_argument("--within", type=float, default=3600, metavar="SECONDS", help="for all steps; default: 3600")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    arguments = parser.parse_args(argv)
    groups = stages(arguments.rehearse)[arguments.stage]
    names = [step.name for group in groups for step in group]
    if unknown := set(arguments.steps) - set(names):
        parser.error(f"steps: expected some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if arguments.steps:
        groups = [chosen for group in groups if (chosen := [s for s in group if s.name in arguments.steps])]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running step is ended too
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    results = Results(folder, arguments.stage)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TST_CUDA": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"
    if arguments.rehearse:
        environment |= {"GPU_CHECK_REHEARSE": "1", "TST_CUDA": "0"}
    facts = results.facts()
    if facts is None:
        run(script("facts", "facts", limit=90), results, environment)
        facts = results.facts()
    if facts is None:
        print("gpu-check: torch finds no CUDA device here, so nothing was built, tested or measured")
        return 1
    environment["TORCH_CUDA_ARCH_LIST"] = facts["architecture"]  # of this device alone
    try:
        ended = run_all(groups, results, environment, time.monotonic() + arguments.within)
    finally:
        for process in list(RUNNING):  # of a thread, where this program was told to stop
            kill(process)
        print(f"\ngpu-check: results in {results.path}, output in {results.log}\n{table(results.lines())}", flush=True)
    return int(any(status != "ok" for status in ended))


if __name__ == "__main__":
    sys.exit(main())
