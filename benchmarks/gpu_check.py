"""Builds with CUDA in the ambient Python, runs CUDA tests, compute-sanitizer and benchmarks, and writes results.

Run by `make gpu-check`, all steps in 9 minutes at most: each has its limit, and one that reaches it ends with status
124, what it had measured kept. `make gpu-check STEPS="build tests"` runs some of them. Needs torch with CUDA, nvcc,
pybind11, ninja, pytest, hypothesis and pytest-benchmark; no network. Peers that cannot be imported are named in the
table. Results go to the folder that the environment variable OUT names, else to benchmarks/results: gpu_check.json
(what ended how), gpu_tests.xml, gpu_benchmarks.json, .txt (the table) and .png, gpu_kernels.txt (the time of each
kernel).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = """
import sys
sys.path[:0] = ["benchmarks", "tests"]
import torch
from conftest import zipf_ids
from torch.profiler import ProfilerActivity, profile
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy
for rows, dim, vocabulary, s in ((16384, 2048, 128256, 6), (32768, 1024, 49152, 4), (8192, 4096, 151936, 16)):
    options = dict(device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(rows, dim, **options).requires_grad_()
    weight = torch.randn(vocabulary, dim, **options).div_(dim**0.5).requires_grad_()
    ids = zipf_ids((rows, s), vocabulary)
    def step():
        hidden.grad = weight.grad = None
        linear_multi_hot_cross_entropy(hidden, weight, ids).backward()
        bag_embedding(ids, weight).sum().backward()
    step(), step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    print(f"rows {rows}, d {dim}, V {vocabulary}, s {s}, bfloat16")
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90))
"""


# One process a group of benchmarks, so that a limit costs one group's figures: what is -k'd, of which file.
GROUPS = {
    "embedding": ("test_embedding.py", "bfloat16"),
    "loss_a": ("test_loss.py", "16384x2048x128256-s6"),
    "loss_b": ("test_loss.py", "32768x1024x49152"),
    "loss_c": ("test_loss.py", "8192x4096x151936"),
    "loss_small": ("test_loss.py", "4096x1024x50257 or 2048x512x32768"),
}


def steps(out: Path, groups: Path) -> dict[str, tuple[list[str], int]]:
    """Name: command, and the seconds it may take; 540 in all."""
    python = [sys.executable, "-m"]
    install = ["pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    tests = [*python, "pytest", "-m", "cuda and not slow", "-q"]
    small = [*python, "pytest", "tests/test_cuda.py", "-q", "-x", "-k", "TestSmall", "-p", "no:cacheprovider"]
    found = {
        "build": ([*python, *install], 100),
        "tests": ([*tests, "tests", "--ignore=tests/test_compile.py", f"--junitxml={out / 'gpu_tests.xml'}"], 120),
        "compile_tests": ([*tests, "tests/test_compile.py"], 60),
    }
    # Of our kernels alone: their mangled names have the namespaces tst and cuda (cuBLAS's have nvjet_tst).
    ours = ["--kernel-regex", "kns=tst4cuda", "--report-api-errors", "no", "--error-exitcode", "9"]
    for tool in ("memcheck", "racecheck"):
        found[tool] = ([sanitizer(), "--tool", tool, *ours, *small], 40)
    for group, (file, chosen) in GROUPS.items():
        result = f"--benchmark-json={groups / f'{group}.json'}"
        found[group] = ([*python, "pytest", f"benchmarks/{file}", "-q", "-k", chosen, result], 30)
    found["kernels"] = ([sys.executable, "-c", KERNELS], 30)
    return found


def sanitizer() -> str:
    beside_nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or str(beside_nvcc)


def run(command: list[str], limit: int, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output; 124 where the limit was reached, 127 where there is no such program."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    except FileNotFoundError as error:
        return 127, f"{error}\n"
    # Interrupted, pytest still writes what it has; killed, it and all that it started are gone.
    for seconds, sign in ((limit, signal.SIGINT), (10, signal.SIGKILL), (None, None)):
        try:
            output = process.communicate(timeout=seconds)[0]
            return process.returncode if sign == signal.SIGINT else 124, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sign)
    raise AssertionError("unreachable")


def merge(groups: Path, result: Path) -> bool:
    """One file of all groups that were measured."""
    found = [json.loads(path.read_text()) for path in sorted(groups.iterdir()) if path.stat().st_size]
    if found:
        result.write_text(json.dumps(found[0] | {"benchmarks": [b for f in found for b in f["benchmarks"]]}, indent=1))
    return bool(found)


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device (torch {torch.__version__}); nothing was built, tested or measured")
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "steps": {},
    }
    environment = {**os.environ, "TST_CUDA": "1"}
    major, minor = torch.cuda.get_device_capability()
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a" if major == 9 else f"{major}.{minor}")  # of this device alone
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder)
        found = steps(out, groups)
        chosen = sys.argv[1:] or list(found)
        if set(chosen) - set(found):
            sys.exit(f"gpu-check: expected steps among {', '.join(found)}, got {' '.join(chosen)}")
        for name in [name for name in found if name in chosen]:
            start = time.monotonic()
            # memcheck sees what lies beyond a tensor only where each has memory of its own.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
            status, output = run(*found[name], environment | alone)
            if name == "kernels":
                (out / "gpu_kernels.txt").write_text(output)
            print(output[-4000:])
            summary["steps"][name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
            (out / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
            print(f"gpu-check: {name} ended with status {status}", flush=True)
            if name == "build" and status:
                break
        result = out / "gpu_benchmarks.json"
        if merge(groups, result):
            status, output = run([sys.executable, "benchmarks/report.py", str(result)], 30, environment)
            (out / "gpu_benchmarks.txt").write_text(output)
            print(output)
    return max(abs(step["status"]) for step in summary["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
