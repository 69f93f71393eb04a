"""What a run reports: lines of metrics.jsonl, and TensorBoard's where asked for."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import UserError, write_text


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to one that is still being written, or damaged by a loss of power."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    metrics: list[dict[str, Any]] = []
    for line in lines:
        try:
            if not line.endswith(b"\n"):
                break
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


class Metrics:
    """Writes them; a context.

    Args:
        folder: of the run; None writes nothing.
        step: where the run goes on; lines of later steps, of a process that died, are dropped.
        tensorboard: whether to write for TensorBoard too.

    Raises:
        UserError: TensorBoard is asked for and its package is missing.
    """

    def __init__(self, folder: Path | None, step: int, tensorboard: bool) -> None:
        self.file, self.board = None, None
        if folder is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise UserError("tensorboard: the package is missing: pip install tensorboard") from error
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and not isinstance(value, str):
                    self.board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Puts the lines on the disk, before a checkpoint that builds on them is."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


class Meter:
    """Time and throughput since the last report: a mean over the run would mix the phases, whose speeds differ s times.

    Args:
        seconds, step, tokens: where the run goes on.
        step_flops: of all processes together.
        peak: measured FLOPs a second of all processes together.
    """

    def __init__(self, seconds: float, step: int, tokens: int, step_flops: int, peak: float) -> None:
        self.start = time.perf_counter() - seconds
        self.since, self.step, self.tokens, self.waited = time.perf_counter(), step, tokens, 0.0
        self.step_flops, self.peak = step_flops, peak

    @property
    def seconds(self) -> float:
        """Of the run so far, those before a resumption included."""
        return round(time.perf_counter() - self.start, 3)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Validation and checkpoints are no training time."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, step: int, tokens: int) -> dict[str, Any]:
        """Data tokens a second, MFU and seconds of waiting for data since the last report, which this one becomes."""
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
