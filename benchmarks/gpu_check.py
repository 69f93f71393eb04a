"""Builds with CUDA in the ambient Python, runs the CUDA tests and the benchmarks, and writes JSON results.

Run by `make gpu-check`. Needs torch with CUDA, nvcc, pybind11, ninja, pytest, hypothesis and pytest-benchmark, and the
packages of the extra `train`; no network. Results go to the folder named by the environment variable OUT, else to
benchmarks/results.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device (torch {torch.__version__}); nothing was built, tested or measured")
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = [sys.executable, "-m"]
    install = ["pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    steps = {
        "build": [*python, *install],
        "tests": [*python, "pytest", "tests", "-m", "cuda", "-q", f"--junitxml={out / 'gpu_tests.xml'}"],
        "benchmarks": [*python, "pytest", "benchmarks", "-q", f"--benchmark-json={out / 'gpu_benchmarks.json'}"],
    }
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "steps": {},
    }
    for name, command in steps.items():
        start = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "TST_CUDA": "1"}).returncode
        summary["steps"][name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        (out / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"gpu-check: {name} ended with status {status}", flush=True)
        if name == "build" and status:
            break
    return max(abs(step["status"]) for step in summary["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
