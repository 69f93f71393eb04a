"""Results of the benchmarks as they are kept: medians, spread, and the facts of the machine that a reader needs."""

import json
import re
import statistics

MACHINE = (
    "device",
    "threads",
    "capability",
    "gemm",
    "torch",
    "tst_ext",
    "python_version",
    "machine",
    "system",
    "quick",
)
CPU = ("count", "l2_cache_size", "l3_cache_size")


def summary(seconds: list[float], ours: float) -> dict[str, float]:
    """Give the median and spread of a contender's times in ms, their number, and our median over this one."""
    median = statistics.median(seconds)
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    spread = {"min_ms": min(seconds), "max_ms": max(seconds), "iqr_ms": q3 - q1}
    spread = {name: round(value * 1e3, 4) for name, value in spread.items()}
    return {"ms": median * 1e3, **spread, "rounds": len(seconds), "ours_over_this": ours / median}


def shortened(results: dict) -> str:
    """Write what pytest-benchmark reports as JSON with one line per contender, the samples and flags left out."""
    machine = {name: results["machine_info"][name] for name in MACHINE}
    machine["cpu"] = {name: results["machine_info"]["cpu"].get(name) for name in CPU}
    cases = [{"name": case["name"], "extra_info": case["extra_info"]} for case in results["benchmarks"]]
    text = json.dumps({"machine_info": machine, "datetime": results["datetime"], "benchmarks": cases}, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda innermost: re.sub(r"\n *", " ", innermost[0]), text) + "\n"
