"""Run calls.py under Nsight Compute or compute-sanitizer and record what they find: nsight.py MODE.

names      no tool: checks that calls.py runs every kernel, so that a tool which finds nothing has looked at them
ncu        counters of every launch of our kernels at A, B and C
planted    memcheck on a planted error, which it must find in our kernel: else the filter selects nothing
memcheck, racecheck, synccheck
"""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common import REHEARSE, ROOT, record

OURS = "tst4cuda"  # of the mangled names: the namespaces tst and cuda (a kernel of cuBLAS has nvjet_tst)
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read_mb",
    "dram__bytes_write.sum": "written_mb",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_pct",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_pct",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
}
UNITS = {
    **{"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6},
    **{"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3},
}


def tool(name: str) -> str | None:
    """The program, from PATH or where CUDA installs it."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [home / "bin", home / "compute-sanitizer", *sorted(Path("/opt/nvidia/nsight-compute").glob("*"))[::-1]]
    return shutil.which(name) or next((found for p in places if (found := shutil.which(name, path=str(p)))), None)


def run(prefix: list[str], mode: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of calls.py under a tool. The output is shown as it comes, for a limit may cut it off."""
    process = subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / "benchmarks" / "gpu" / "calls.py"), mode],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def ncu() -> int:
    program = tool("ncu")
    if program is None and not REHEARSE:
        record(unavailable="ncu: not on PATH, nor where CUDA or Nsight Compute install it")
        return 1
    kernels = ["--kernel-name-base", "function", "--kernel-name", "regex:loss_rows|bag_|scaled_copy"]
    options = [*kernels, "--clock-control", "none", "--launch-count", "60", "--csv", "--metrics", ",".join(METRICS)]
    status, output = run([program, *options] if program else [], "large")
    found = launches(output)
    for launch in found:
        record(**launch)
    return int(status != 0 or not found) if program else status


def launches(output: str) -> list[dict[str, object]]:
    """ncu's CSV, one line per launch and metric, as one record per launch."""
    start = output.find('"ID"')
    found: dict[str, dict[str, object]] = {}
    for row in csv.DictReader(io.StringIO(output[start:] if start >= 0 else "")):
        short = METRICS.get(row.get("Metric Name") or "")
        if short is None:
            continue
        launch = found.setdefault(row["ID"], {"kernel": short_name(row["Kernel Name"])})
        launch |= {"grid": row.get("Grid Size", ""), "block": row.get("Block Size", "")}
        try:
            launch[short] = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1)
        except ValueError:
            launch[short] = row["Metric Value"]
    return list(found.values())


def short_name(kernel: str) -> str:
    """The kernel with its template arguments, such as loss_rows_kernel<BFloat16, 1, 1>."""
    for part in ("void ", "tst::cuda::", "<unnamed>::", "(bool)", "(int)"):
        kernel = kernel.replace(part, "")
    return kernel.partition(">(")[0].partition("(")[0][:60]


def sanitize(mode: str) -> int:
    """A clean pass counts only if calls.py came to its end; a planted error must be found, in a kernel of ours."""
    program = tool("compute-sanitizer")
    if program is None and not REHEARSE:
        record(unavailable="compute-sanitizer: not on PATH, nor where CUDA installs it")
        return 1
    planted = mode == "planted"
    options = ["--tool", "memcheck" if planted else mode, "--kernel-regex", f"kns={OURS}", "--print-limit", "20"]
    options += ["--report-api-errors", "no", "--error-exitcode", "9"]
    # memcheck sees what lies beyond a tensor only where each tensor has memory of its own.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if mode in ("planted", "memcheck") else {}
    status, output = run([program, *options] if program else [], "planted" if planted else "small", **environment)
    done = "calls.py: done" in output
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    reports = re.findall(r"=+ ((?:Invalid|Error|Warning|Barrier|Race).*)", output)[:8]
    record(exit=status, finished=done, summary=summary[-1:], reports=reports)
    if planted and not REHEARSE:
        found = "Invalid" in output and "tst::cuda::" in output
        record(planted_error_found=found)
        return int(not found)
    return int(status != 0 or not done or (program is not None and not summary))


def main() -> int:
    mode = sys.argv[1]
    if mode == "names":
        return run([], "names")[0]
    return ncu() if mode == "ncu" else sanitize(mode)


if __name__ == "__main__":
    sys.exit(main())
