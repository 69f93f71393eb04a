"""Runs of `tst train` in processes of their own, for the commands that compare runs."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from .config import TrainConfig, save_config
from .folder import in_use
from .loop import stop_signals

__all__ = ["available_cores", "deferred_signals", "failure", "is_running", "on_cpu", "start", "stop"]


def available_cores() -> int:
    """Cores this process may use, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_cpu(config: TrainConfig) -> bool:
    """Whether the run will be one on the CPU."""
    return config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available())


def start(config: TrainConfig, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Begins a run or goes on with it; its output goes to FOLDER.log, its options to FOLDER.config.json."""
    path = folder.with_name(f"{folder.name}.config.json")
    save_config(config, path)
    command = [sys.executable, "-m", "tst_ext", "train", "--config", str(path), "--out", str(folder), "--no-progress"]
    # OMP_NUM_THREADS: threads that spin for work would take the other runs' cores.
    threads = {"OMP_NUM_THREADS": str(config.run.threads)} if config.run.threads else {}
    with open(_log(folder), "wb") as log:
        # The run keeps this lock with its output, from before it has locked its folder until it ends.
        fcntl.flock(log, fcntl.LOCK_EX)
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads, **(environment or {})}
        )


@contextmanager
def deferred_signals() -> Iterator[None]:
    """SIGTERM and SIGINT act after it: within it a process is started and put where it will be ended."""
    with stop_signals() as received:
        yield
    if received:
        signal.raise_signal(received[0])


def is_running(folder: Path) -> bool:
    """Whether a run is going in that folder, one of `start` or another."""
    return in_use(_log(folder)) or in_use(folder)


def failure(folder: Path, status: int) -> str:
    """What became of a run that ended with this exit status, other than 0."""
    if status < 0:
        return f"was killed by signal {-status} (log {_log(folder)})"
    last = _log(folder).read_text(errors="replace").strip().splitlines()[-1:]
    return f"failed with status {status} (log {_log(folder)}): {' '.join(last)}"


def stop(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """Ends those that still run, each with a checkpoint, and waits for them."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
