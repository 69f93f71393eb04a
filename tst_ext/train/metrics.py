"""Measure a run and report it, in lines of metrics.jsonl and optionally for TensorBoard."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import UserError, write_text


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, up to one that a loss of power has damaged."""
    path = folder / "metrics.jsonl"
    metrics: list[dict[str, Any]] = []
    with suppress(ValueError):
        for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:  # the last is still being written
            metrics.append(json.loads(line))
    return metrics


def load_range(load: Tensor | None) -> dict[str, Any]:
    """Return the least and the greatest load of all experts, over their even share. Nothing without experts."""
    if load is None:
        return {}
    return {"load_min": round(load.min().item(), 4), "load_max": round(load.max().item(), 4)}


def load_table(load: Tensor | None) -> dict[str, Any]:
    """Return the load of each expert of each layer, over its even share: `[layers][experts]`."""
    return {} if load is None else {"load": [[round(value, 4) for value in layer] for layer in load.tolist()]}


class Metrics(ExitStack):
    """Append metrics to metrics.jsonl, and optionally to TensorBoard.

    Args:
        folder: of the run; None writes nothing.
        step: where the run resumes; lines of later steps, of a process that died, are dropped.
        tensorboard: whether to write for TensorBoard too. Raises UserError if its package is missing.
    """

    def __init__(self, folder: Path | None, step: int, tensorboard: bool) -> None:
        super().__init__()
        self.file, self.board = None, None
        if folder is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise UserError("tensorboard: the package is missing: pip install tensorboard") from error
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self.callback(self.board.close)
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.enter_context(open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1))

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Put the lines on the disk, before a checkpoint that builds on them."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()


# The estimate of a run's end comes after 20 steps of this process. It leaves out the first 5, which compile.
ESTIMATE_AFTER, WARM_UP = 20, 5


class Meter:
    """Measure throughput since the last report: a mean over the run would mix phases, whose speeds differ s times.

    `seconds`, `step` and `tokens` are where the run resumes. `step_flops`, and `peak` in measured FLOPs per second, are
    of all processes together.
    """

    def __init__(self, seconds: float, step: int, tokens: int, step_flops: int, peak: float) -> None:
        self.start = time.perf_counter() - seconds
        self.since, self.step, self.tokens, self.waited = time.perf_counter(), step, tokens, 0.0
        self.step_flops, self.peak = step_flops, peak
        self.first, self.paused, self.warm = step, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Duration of the run so far, including the time before it was resumed."""
        return round(time.perf_counter() - self.start, 3)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave validation and checkpoints out of the training time."""
        start = time.perf_counter()
        yield
        passed = time.perf_counter() - start
        self.since += passed
        self.paused += passed

    def estimate(self, step: int, steps: int, finish: Callable[[], None]) -> str | None:
        """Say after 20 steps of this process when the run will end; return None after others, or if fewer are left.

        Args:
            step: how many of the run's `steps` are done.
            finish: waits for the device, which may be many steps behind the host.
        """
        done = step - self.first
        if done not in (WARM_UP, ESTIMATE_AFTER) or steps - self.first < 2 * ESTIMATE_AFTER:
            return None
        finish()
        now = time.perf_counter() - self.paused
        if done == WARM_UP:
            self.warm = now
            return None
        left = (now - self.warm) / (ESTIMATE_AFTER - WARM_UP) * (steps - step)
        today, end = (datetime.fromtimestamp(time.time() + seconds) for seconds in (0, left))
        at = f"{end:%H:%M}" if end.date() == today.date() else f"{end:%Y-%m-%d %H:%M}"
        units = ((1, "s"), (60, "min"), (3600, "hours"), (86400, "days"))
        size, unit = next((u for u in reversed(units) if left >= 2 * u[0]), units[0])
        return f"ends in about {left / size:.0f} {unit}, at {at} (without validations and checkpoints)"

    def report(self, step: int, tokens: int) -> dict[str, Any]:
        """Return data tokens per second, MFU and seconds of waiting for data since the last report."""
        now = time.perf_counter()
        passed = now - self.since
        line = {
            "data_tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_s": round((tokens - self.tokens) / passed),
            "mfu": round(self.step_flops * (step - self.step) / passed / self.peak, 4),
            "waited_for_data_s": round(self.waited, 4),
        }
        self.since, self.step, self.tokens, self.waited = now, step, tokens, 0.0
        return line
