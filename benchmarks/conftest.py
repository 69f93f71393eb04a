"""How the benchmarks measure: `race` runs us, our peers and the floors in one go, in random order, round by round.

pytest-benchmark times us. Each of its rounds runs the others too, some before and some after, so that whatever the
machine does in the meantime falls on all alike; their median times, spread, peak memory and our ratios to them are in
`extra_info`. The file of results has these alone, not the samples.
Each timed call follows an untimed one of the same contender: it finds the memory and the pages that it left itself, as
in a training loop, not those of its predecessor. Peers that take more than twice our time are timed three times,
without that, and those of them that take more than `patience` seconds once: their rank is not in doubt.

On a GPU a call's time is the device's, between two events; the host gets a start of a millisecond, so that it is ahead
of the device as in a training loop. pytest-benchmark reads its clock from these same measurements.
"""

import ctypes
import gc
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import COMPILED
from results_file import shortened, summary
from torch import Tensor

from tst_ext import _C, __version__

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "tst_ext"
Contender = Callable[[], Tensor | None]  # returns what all must agree on


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few shapes and rounds, no compiled peers")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # its name is nobody's business
    machine_info.update(
        tst_ext=__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor(),
        threads=torch.get_num_threads(),
        capability=_C.cpu_capability(),
        gemm=_C.cpu_gemm(),
        quick=config.getoption("quick"),
    )


def pytest_unconfigure(config):
    """Shorten the file that --benchmark-json named; pytest-benchmark has written it by now."""
    path = config.getoption("benchmark_json", None)
    if path and path.exists():
        path.write_text(shortened(json.loads(path.read_text())))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    names = {key.strip(): value for key, value in found.items()}
    if "model name" not in names:
        return platform.processor() or platform.machine()
    return f"{names['model name']}, family {names.get('cpu family')} model {names.get('model')}"


def clock() -> float:
    """Seconds of all measured calls of ours so far: pytest-benchmark's timer."""
    return clock.now


clock.now = 0.0


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def seconds(function: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # cycles
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def zipf_ids(shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """Token ids with the frequencies of text, p(k) ~ 1 / k, `shape`, int64."""
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(p, math.prod(shape), replacement=True, generator=generator)
    return ids.reshape(shape).to(DEVICE)


def memory_status(key: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def peak_memory(function: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of a call, and bytes at its peak above those before it; None where this system does not tell."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds(function), torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return seconds(function), None
    ctypes.CDLL(None).malloc_trim(0)  # else memory that the allocator kept would serve unseen
    reset.write_text("5")
    before = memory_status("VmRSS")
    return seconds(function), memory_status("VmHWM") - before


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 0 where the system does not tell, or on a GPU, whose caches are smaller."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    if DEVICE.type == "cuda" or not folder.exists():
        return 0
    units = {"K": 10, "M": 20}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) << units[size[-1]] for size in sizes if size[-1:] in units), default=0)


@pytest.fixture(scope="session")
def evict():
    """Empties the caches: a memory-bound op finds its operands in DRAM, as in a training step."""
    ballast = torch.zeros(max(128 << 20, last_level_cache() * 3 // 2), dtype=torch.uint8, device=DEVICE)
    return lambda: ballast.add_(1)


@pytest.fixture
def race(benchmark, request, evict):
    def run(
        ours: Contender,
        peers: dict[str, Contender | str],  # a string: why this peer does not run here
        floors: dict[str, Contender],
        *,
        rounds: int,
        clear: Callable[[], None] = lambda: None,  # drops the results of a call
        gradients: Callable[[], list[Tensor]] = lambda: [],  # what a call left, on which all must agree too
        result_bytes: int = 0,  # of those results: not counted as extra memory
        cold: bool = False,
        tolerance: float = 1e-3,
        work: dict[str, float] | None = None,  # {"GFLOP": ...} or {"GB": ...} of one call
        **facts: object,
    ) -> None:
        quick = request.config.getoption("quick")
        rounds, patience = (max(2, rounds // 5), 2.0) if quick else (rounds, 5.0)
        if quick and DEVICE.type == "cpu":
            why = "left out by --quick: it compiles for longer than all the others run"
            peers = {name: why if name in COMPILED else peer for name, peer in peers.items()}
        runners = {OURS: ours, **peers, **floors}
        table = {name: {"unavailable": f} for name, f in peers.items() if isinstance(f, str)}
        times: dict[str, list[float]] = {}
        once: dict[str, list[float]] = {}
        far: set[str] = set()
        our_time, agreed = math.inf, None
        for name, function in runners.items():
            if isinstance(function, str):
                continue
            clear()
            row: dict[str, object] = {"floor": name in floors}
            results: list[Tensor | None] = []
            try:
                first = seconds(lambda f=function, r=results: r.append(f()))  # warms up and compiles
                found = None if results[0] is None else [t.detach().double() for t in (results[0], *gradients())]
                results.clear()
                clear()
                slow = name in peers and first > max(2 * patience, 2 * our_time) and name not in COMPILED
                again, peak = (first, None) if slow else peak_memory(function)
            except Exception as error:
                if name not in peers:
                    raise
                table[name] = {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            row["extra_mib"] = None if peak is None else (peak - result_bytes) / 2**20
            if name == OURS:
                our_time = again
            if name in peers and again > 2 * our_time:
                far.add(name)
            if name in far and again > patience:
                once[name] = [again]
            else:
                times[name] = [again] if name in far else []
            if found is not None:
                agreed = agreed or found
                differences = [float((a - b).norm() / b.norm()) for a, b in zip(found, agreed, strict=True)]
                row["differences"] = differences  # relative, of the result and the gradients, from ours
                assert max(differences) < tolerance, f"{name} computes something else: {differences}"
            table[name] = row

        shuffle = random.Random(0)
        after: list[str] = []

        def prepare(name: str) -> None:
            if name not in far:
                runners[name]()
            if cold:
                evict()

        def timed(name: str) -> None:
            prepare(name)
            times[name].append(seconds(runners[name]))

        def before_ours() -> None:
            order = [name for name in times if name not in far or len(times[name]) < 3]
            shuffle.shuffle(order)
            here = order.index(OURS)
            after[:] = order[here + 1 :]
            for name in order[:here]:
                timed(name)
            prepare(OURS)

        def waited() -> None:
            times[OURS].append(seconds(ours))
            clock.now += times[OURS][-1]

        def after_ours() -> None:
            for name in after:
                timed(name)

        benchmark.pedantic(waited, setup=before_ours, teardown=after_ours, rounds=rounds)
        mine = statistics.median(times[OURS])
        for name, values in (times | once).items():
            if values:  # with --benchmark-disable the others never had a turn
                table[name].update(summary(values, mine))
        for name, amount in (work or {}).items():
            facts[f"{name}/s"] = amount / mine
        benchmark.extra_info.update(facts, contenders=table)
        clear()

    return run
