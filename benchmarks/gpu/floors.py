"""Measure copies and the GEMMs of the head by themselves, in plain torch. Needs no extension."""

from collections.abc import Callable

import torch
from common import (
    DEVICE,
    REHEARSE,
    SHAPES,
    chunks,
    copy_bandwidth,
    gpu_state,
    head,
    median,
    medians,
    padded,
    record,
    recorded,
    three_gemms,
)
from torch import Tensor


def bandwidths() -> None:
    with recorded(what="copy"):
        record(what="copy", gb_per_s=copy_bandwidth() / 1e9)
    with recorded(what="in place"):
        # As the row pass treats the logits: read, change, write back.
        x = torch.ones(1 << (20 if REHEARSE else 30), dtype=torch.bfloat16, device=DEVICE)
        record(what="in place", gb_per_s=2 * x.nbytes / median(lambda: x.mul_(1.0009765625)) / 1e9)
    with recorded(what="read"):
        x = torch.ones(1 << (20 if REHEARSE else 30), dtype=torch.bfloat16, device=DEVICE)
        record(what="read", gb_per_s=x.nbytes / median(lambda: x.amax()) / 1e9)
    with recorded(what="write"):
        x = torch.ones(1 << (20 if REHEARSE else 30), dtype=torch.bfloat16, device=DEVICE)
        record(what="write", gb_per_s=x.nbytes / median(lambda: x.fill_(2)) / 1e9)


def products(h: Tensor, weight: Tensor, z: Tensor) -> dict[str, Callable[[], object]]:
    """The GEMMs of a chunk by name. "f32": with a float32 result; "add": added to that."""
    chunk, vocabulary = z.shape
    dh, dw = torch.empty_like(h), torch.empty_like(weight)
    dh32, dw32 = torch.zeros_like(h, dtype=torch.float32), torch.zeros_like(weight, dtype=torch.float32)
    logits = padded(chunk, vocabulary)
    f32, ops = torch.float32, torch.ops.aten
    return {
        "logits": lambda: torch.mm(h, weight.T, out=logits),
        "dh": lambda: torch.mm(z, weight, out=dh),
        "dh f32": lambda: ops.mm.dtype_out(z, weight, f32, out=dh32),
        "dw": lambda: torch.mm(z.T, h, out=dw),
        "dw add": lambda: torch.addmm(dw, z.T, h, out=dw),
        "dw f32": lambda: ops.mm.dtype_out(z.T, h, f32, out=dw32),
        "dw f32 add": lambda: ops.addmm.dtype_out(dw32, z.T, h, f32, out=dw32),
    }


def gemms(name: str, hidden: Tensor, weight: Tensor) -> None:
    for chunk in chunks(len(hidden)):
        found: dict[str, object] = {}
        with recorded(what="GEMMs", shape=name, chunk=chunk):
            h, z = hidden[:chunk], padded(chunk, len(weight)).mul_(0.001)
            work = 2 * chunk * weight.numel()
            for gemm, function in products(h, weight, z).items():
                try:
                    time = median(function, 5)
                    found[gemm] = [round(time * 1e3, 3), round(work / time / 1e12, 1)]  # ms, TFLOP/s
                except Exception as error:
                    found[gemm] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            record(what="GEMMs", shape=name, chunk=chunk, **found)


def totals(name: str, hidden: Tensor, weight: Tensor) -> None:
    """All three over all rows, at each chunk size."""
    sizes = chunks(len(hidden))
    logits = padded(max(sizes), len(weight)).mul_(0.001)
    times = medians({str(c): three_gemms(hidden, weight, logits, c) for c in sizes}, 5)
    best = min(times, key=times.__getitem__)
    work = 6 * len(hidden) * weight.numel()
    record(
        what="3 GEMMs",
        shape=name,
        best_ms=times[best] * 1e3,
        best_chunk=int(best),
        tflop_per_s=work / times[best] / 1e12,
        **{f"ms at {chunk}": time * 1e3 for chunk, time in times.items()},
    )


def main() -> None:
    bandwidths()
    for name, (rows, dim, vocabulary, _) in SHAPES.items():
        with recorded(what="3 GEMMs", shape=name):
            hidden, weight = head(rows, dim, vocabulary)
            totals(name, hidden, weight)
            gemms(name, hidden, weight)
    record(what="state after load", **gpu_state())


if __name__ == "__main__":
    main()
