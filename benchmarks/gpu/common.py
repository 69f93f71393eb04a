"""Shapes, timing and the file of results, for all scripts of gpu_check.py."""

import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
REHEARSE = os.environ.get("GPU_CHECK_REHEARSE") == "1"
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
# Rows, d, V, s: a 3B model's head; a small model's; a 10B model's at the paper's largest bag.
SHAPES = {"A": (16384, 2048, 128256, 6), "B": (32768, 1024, 49152, 4), "C": (8192, 4096, 151936, 16)}
CHUNKS = (2048, 4096, 8192, 16384)
CHUNK = 4096  # rows of the row pass
ROUNDS = 7
START = 4_000_000  # cycles, 2 ms: the host enqueues a whole step meanwhile, as it is ahead of the GPU in training
if REHEARSE:
    SHAPES = {"A": (64, 32, 515, 6), "B": (128, 16, 130, 4), "C": (32, 64, 600, 16)}
    CHUNKS, CHUNK, ROUNDS = (16, 32, 64), 32, 2


def record(**values: object) -> None:
    """Append one line to the results at once, and print it."""
    line = json.dumps({"step": os.environ.get("GPU_CHECK_STEP", Path(sys.argv[0]).stem), **rounded(values)})
    if path := os.environ.get("GPU_CHECK_RESULTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)


def rounded(values: dict[str, object]) -> dict[str, object]:
    """Five digits; NaN and infinity as text, which JSON has no other way to write."""
    digits = lambda x: float(f"{x:.5g}") if math.isfinite(x) else str(x)  # noqa: E731
    return {key: digits(x) if isinstance(x, float) else x for key, x in values.items()}


@contextmanager
def recorded(**values: object) -> Iterator[None]:
    """Record an exception of the block with `values`, and go on behind it."""
    try:
        yield
    except Exception as error:
        record(**values, error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def seconds(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call on the device, between two events. `before` runs first and is not timed."""
    if DEVICE.type != "cuda":
        before(), function()
        return 1e-3  # a rehearsal measures nothing
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    torch.cuda._sleep(START)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def medians(
    functions: dict[str, Callable[[], object]],
    rounds: int = ROUNDS,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each, taken in turns in random order.

    A GPU at its power limit is faster after a contender that draws little: in a fixed order the one that followed such
    a peer was 8 % faster than by itself.
    """
    for function in functions.values():
        before(), function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(seconds(functions[name], before))
    return {name: statistics.median(values) for name, values in times.items()}


def median(function: Callable[[], object], rounds: int = ROUNDS, before: Callable[[], object] = lambda: None) -> float:
    return medians({"": function}, rounds, before)[""]


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written ones counted."""
    source = torch.empty(1 << (20 if REHEARSE else 31), dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(lambda: target.copy_(source))


def zipf_ids(shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """Token ids with the frequencies of text, p(k) ~ 1 / k, `shape`, int64."""
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(p, math.prod(shape), replacement=True, generator=generator).reshape(shape).to(DEVICE)


def head(rows: int, dim: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """hidden [N, d] and weight [V, d] in bfloat16, whose logits have a variance of 1; of a fixed seed."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    return normal(rows, dim), normal(vocabulary, dim).mul_(dim**-0.5)


def padded(rows: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers `[rows, V]`, each row padded to a multiple of 64 columns, as the op has its logits."""
    full = torch.empty(rows, -(-vocabulary // 64) * 64, dtype=dtype, device=DEVICE)
    return full.normal_()[:, :vocabulary]


def chunks(rows: int) -> list[int]:
    """Return the sizes to measure: each of CHUNKS below `rows`, and all rows at once."""
    return [c for c in CHUNKS if c < rows] + [rows]


def three_gemms(hidden: Tensor, weight: Tensor, logits: Tensor, chunk: int) -> Callable[[], None]:
    """The bare GEMMs of loss and gradients in bfloat16, in chunks of rows, into memory that is there already.

    Args:
        logits: `[chunk, V]`, any numbers; the gradient's GEMMs read it too.
    """
    hidden, weight = hidden.detach(), weight.detach()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, len(hidden), chunk):
            h = hidden[start : start + chunk]
            z = logits[: len(h)]
            torch.mm(h, weight.T, out=z)
            torch.mm(z, weight, out=grad_hidden[start : start + chunk])
            if start == 0:
                torch.mm(z.T, h, out=grad_weight)
            else:
                torch.addmm(grad_weight, z.T, h, out=grad_weight)

    return run


def best_three_gemms(hidden: Tensor, weight: Tensor) -> tuple[Callable[[], None], int]:
    """The fastest chunk size of `three_gemms`, and that."""
    sizes = chunks(len(hidden))
    logits = padded(max(sizes), len(weight))
    runs = {chunk: three_gemms(hidden, weight, logits, chunk) for chunk in sizes}
    times = medians(runs, 5)  # in turns: timed one after the other, 2048 rows once seemed best and were 4 % slower
    best = min(times, key=times.__getitem__)
    return runs[best], best


STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def gpu_state(names: tuple[str, ...] = STATE) -> dict[str, str]:
    """Ask nvidia-smi for its present state, one name at a time: drivers do not know them all. Change nothing."""
    found = {}
    for name in names:
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired) as error:
            return found | {"nvidia_smi": f"{type(error).__name__}: {error}"[:100]}
        if result.returncode == 0:
            found[name] = result.stdout.partition("\n")[0].strip()
    return found
