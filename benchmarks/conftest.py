"""Cases and floors of the benchmarks. Every floor is measured in the same run as what is compared with it."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Median wall time of one call in seconds, after one call to warm up; waits for the device."""

    def timed() -> float:
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(rounds))


def zipf_ids(shape: tuple[int, ...], vocabulary: int) -> torch.Tensor:
    """Token ids with the frequencies of text, p(k) ~ 1 / k, `shape`, int64."""
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(p, torch.Size(shape).numel(), replacement=True, generator=generator)
    return ids.reshape(shape).to(DEVICE)


@pytest.fixture
def measure(benchmark, request):
    """Runs a case under pytest-benchmark and records its ratio to a floor, in seconds, beside the time."""

    def run(function: Callable[[], object], floor: float, **facts: object) -> None:
        def waited() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            facts,
            floor_ms=floor * 1e3,
            ratio_to_floor=median / floor,
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        request.config.stash.setdefault(ROWS, []).append((request.node.name, median, floor, facts))

    return run


ROWS: pytest.StashKey[list] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("time and ratio to the floor measured in this run")
    for name, median, floor, facts in rows:
        what = ", ".join(f"{key} {value}" for key, value in facts.items())
        terminalreporter.line(f"{median * 1e3:10.2f} ms  {median / floor:7.2f} x floor  {name}  ({what})")
