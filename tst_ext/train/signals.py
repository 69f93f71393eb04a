"""Handle SIGTERM and SIGINT: a run saves and stops, and no process is lost while it is started."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """A signal ended the run, after it was saved."""

    def __init__(self, signum: int, step: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved at step {step}; --out {folder} goes on")
        self.status = 128 + signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Append SIGTERM and SIGINT to the list yielded; a second one acts as it did before."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT act afterwards: within it a process is started and put where it will be ended."""
    with stop_signals() as received:
        yield
    if received:
        signal.raise_signal(received[0])
