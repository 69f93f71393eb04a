"""Count the CPUs that this process may use, and keep torch to them: a container often has fewer than the machine."""

import math
import os
from pathlib import Path

import torch


def cpu_quota(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPUs that control groups allow this process, as `docker run --cpus` sets them; inf for no limit."""
    try:
        groups = [line.split(":", 2)[1:] for line in os.fsdecode(own.read_bytes()).splitlines()]
    except OSError:  # not Linux
        return math.inf
    limits = [math.inf]
    for controllers, path in groups:
        # Version 2 has one group without a name, version 1 one for each controller.
        if controllers == "" or "cpu" in controllers.split(","):
            root = mount / "cpu" if controllers else mount
            # The limit of each group above holds too. A container may show its own group as the root.
            folder = root / path.lstrip("/")
            limits += [_limit(level) for level in (folder, *folder.parents) if level.is_relative_to(root)]
    return min(limits)


def _limit(group: Path) -> float:
    """Return the CPUs that one control group may use: microseconds of CPU time per microsecond."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
        except (OSError, ValueError):
            continue
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


def affinity_cpus() -> int:
    """Count the CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cpus() -> int:
    """Count the CPUs this process may use. A quota smaller than the affinity decides, rounded up."""
    return max(1, math.ceil(min(affinity_cpus(), cpu_quota())))


def chosen_threads() -> bool:
    """Tell whether the environment names the number of threads."""
    return any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def limit_threads() -> None:
    """Keep torch's threads to the available CPUs, unless the environment names their number.

    torch counts the CPUs of the affinity. Threads beyond a quota of CPU time are stopped for most of each period.
    """
    if not chosen_threads() and available_cpus() < torch.get_num_threads():
        torch.set_num_threads(available_cpus())
