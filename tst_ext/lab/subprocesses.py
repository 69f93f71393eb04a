"""Start runs of `tst train` in processes of their own, follow them, and end them."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..train.config import TrainConfig, save_config
from ..train.files import in_use
from ..train.flops import step_flops
from ..train.metrics import read_metrics

LOG_SECONDS = 30  # between lines of progress where there is no terminal to show them on


def on_cpu(config: TrainConfig) -> bool:
    """Tell whether the run will be on the CPU."""
    return config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available())


def start(config: TrainConfig, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start or resume a run; its output goes to FOLDER.log, its options to FOLDER.config.json."""
    path = folder.with_name(f"{folder.name}.config.json")
    save_config(config, path)
    command = [sys.executable, "-m", "tst_ext", "train", "--config", str(path), "--out", str(folder), "--no-progress"]
    # OMP_NUM_THREADS: threads that spin for work would take the other runs' cores.
    threads = {"OMP_NUM_THREADS": str(config.run.threads)} if config.run.threads else {}
    with open(_log(folder), "wb") as log:
        # The run keeps this lock with its output, from before it has locked its folder until it ends.
        fcntl.flock(log, fcntl.LOCK_EX)
        # Each run is one process, also if a cluster has set for this one what torchrun sets.
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**own, **threads, **(environment or {})}
        )


def is_running(folder: Path) -> bool:
    """Tell whether a run is going in that folder, by `start` or otherwise."""
    return in_use(_log(folder)) or in_use(folder)


def failure(folder: Path, status: int) -> str:
    """Say why a run ended with this exit status, other than 0."""
    if status < 0:
        return f"was killed by signal {-status} (log {_log(folder)})"
    last = _log(folder).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"failed with status {status} (log {_log(folder)}): {' '.join(last)}"


def stop(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """End the processes that still run, each with a checkpoint, and wait for them."""
    processes = list(processes)
    for process in processes:
        process.terminate()  # does nothing to one that has ended
    for process in processes:
        process.wait()


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def run_flops(config: TrainConfig, step: int | None = None) -> float:
    """Count the FLOPs of a run up to a step, by default its last, with the vocabulary of its options."""
    flops = step_flops(config.model, config.data.vocabulary, config.batch, config.latent_tokens)
    return (config.steps if step is None else step) * flops


class Progress:
    """Show how far runs are, by their metrics: a line drawn over on a terminal, else one every LOG_SECONDS."""

    def __init__(self, runs: dict[str, TrainConfig], folder: Path, shown: bool) -> None:
        self.runs, self.folder, self.shown, self.ends = runs, folder, shown, 0
        self.terminal = sys.stderr.isatty()
        self.begin = time.monotonic()
        self.next = self.begin + (0 if self.terminal else LOG_SECONDS)
        self.steps = {name: self._last(name)["step"] for name in runs}
        self.before = self._flops()  # an earlier call's tell nothing of the speed

    def _last(self, name: str) -> dict[str, Any]:
        lines = [line for line in read_metrics(self.folder / name) if "loss" in line]
        return lines[-1] if lines else {"step": 0}

    def _flops(self) -> float:
        return sum(run_flops(config, self.steps[name]) for name, config in self.runs.items())

    def show(self, going: list[str]) -> None:
        """Show the share done, the time left, and steps and losses of the runs that are going."""
        now = time.monotonic()
        if not self.shown or now < self.next:
            return
        self.next = now + (1 if self.terminal else LOG_SECONDS)
        lines = {name: self._last(name) for name in going}
        self.steps |= {name: line["step"] for name, line in lines.items()}
        total, done = sum(map(run_flops, self.runs.values())), self._flops()
        text = f"{done / total:.0%}"
        if done > self.before:
            left = (now - self.begin) / (done - self.before) * (total - done)
            text += f", {timedelta(seconds=round(left))} left"
        for name, line in lines.items():
            loss = f" loss {line['loss']:.3f}" if "loss" in line else ""
            text += f"; {name} {line['step']}/{self.runs[name].steps}{loss}"
        self._print(text, "" if self.terminal else "\n")

    def ended(self, row: dict[str, Any]) -> None:
        """Show the result of a run: its row in results.json."""
        name, self.ends = row["name"], self.ends + 1
        self.steps[name] = self.runs[name].steps
        loss = f"{row['val_loss']:.4f} after {row['seconds']:.0f} s" if "val_loss" in row else row["status"]
        self._print(f"{self.ends}/{len(self.runs)} {name}: {loss}", "\n")

    def close(self) -> None:
        """Leave no half of a line on a terminal."""
        if self.terminal:
            self._print("", "\r")

    def _print(self, text: str, end: str) -> None:
        if self.shown and self.terminal:
            text = f"\r{text if end else text[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        if self.shown:
            print(text, end=end, file=sys.stderr, flush=True)
