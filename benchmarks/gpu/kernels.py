"""The times of our kernels at A, B and C, over this GPU's copy bandwidth and bare GEMMs, measured in this process."""

from functools import partial

import torch
from common import (
    CHUNK,
    CHUNKS,
    DEVICE,
    REHEARSE,
    ROUNDS,
    SHAPES,
    best_three_gemms,
    copy_bandwidth,
    gpu_state,
    head,
    median,
    medians,
    padded,
    record,
    recorded,
    zipf_ids,
)
from torch.profiler import ProfilerActivity, profile

from tst_ext import linear_multi_hot_cross_entropy


def rows(name: str, dtype: torch.dtype, bandwidth: float) -> None:
    """The pass over a chunk of logits. Each call finds fresh logits, copied from `source` before it and not timed."""
    _, _, vocabulary, s = SHAPES[name]
    count = CHUNK
    source, z = padded(count, vocabulary, dtype), padded(count, vocabulary, dtype)
    labels = zipf_ids((count, s), vocabulary)
    scale = torch.full((s,), 1 / (count * s), device=DEVICE)
    loss, lse = torch.empty(2, count, device=DEVICE)
    for gradient in (True, False):
        run = partial(torch.ops.tst_ext.multi_hot_cross_entropy_rows_, z, labels, scale, loss, lse, gradient=gradient)
        time = median(run, before=lambda: z.copy_(source))
        size = (1 + gradient) * count * vocabulary * z.element_size()  # of each logit, read once, written once
        record(
            what="row pass",
            shape=name,
            dtype=str(dtype)[6:],
            gradient=gradient,
            ms=time * 1e3,
            gb_per_s=size / time / 1e9,
            of_copy=size / time / bandwidth,
        )


def bags(name: str, bandwidth: float) -> None:
    """Both directions, with empty caches. Bytes that must move: each distinct row of the table once."""
    count, dim, vocabulary, s = SHAPES[name]
    _, weight = head(1, dim, vocabulary)
    ids = zipf_ids((count, s), vocabulary)
    grad = torch.randn(count, dim, device=DEVICE, dtype=torch.bfloat16)
    ballast = torch.zeros(1 << (20 if REHEARSE else 28), dtype=torch.uint8, device=DEVICE)
    row, out = dim * 2, count * dim * 2
    distinct = ids.unique().numel()
    # Backward: the gradient as it is gathered once by each id at most, and a table written.
    least = {"forward": ids.nbytes + distinct * row + out, "backward": ids.nbytes + out + weight.nbytes}
    gathered = {"forward": ids.nbytes + s * out + out, "backward": ids.nbytes + s * out + weight.nbytes}
    runs = {
        "forward": partial(torch.ops.tst_ext.bag_embedding, ids, weight, "mean"),
        "backward": partial(torch.ops.tst_ext.bag_embedding_backward, grad, ids, vocabulary, "mean"),
    }
    for direction, run in runs.items():
        with recorded(what=f"bag {direction}", shape=name):
            time = median(run, 11, before=lambda: ballast.add_(1))
            record(
                what=f"bag {direction}",
                shape=name,
                ms=time * 1e3,
                over_bytes=time / (least[direction] / bandwidth),
                over_gathered=time / (gathered[direction] / bandwidth),
                mb=least[direction] / 1e6,
                mb_gathered=gathered[direction] / 1e6,
            )


def loss(name: str) -> None:
    """Forward and backward over the three bare GEMMs, in turns: at the default chunk size, then at others."""
    count, dim, vocabulary, s = SHAPES[name]
    hidden, weight = head(count, dim, vocabulary)
    labels = zipf_ids((count, s), vocabulary)
    gemms, chunk = best_three_gemms(hidden, weight)
    hidden.requires_grad_(), weight.requires_grad_()

    def step(chunk_size: int | None) -> None:
        hidden.grad = weight.grad = None
        linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).backward()

    runs = {"default": partial(step, None)} | {str(c): partial(step, c) for c in (*CHUNKS, count) if c <= count}
    for chosen, run in runs.items():
        with recorded(what="loss", shape=name, chunk_size=chosen):
            times = medians({"ours": run, "gemms": gemms}, ROUNDS)
            record(
                what="loss",
                shape=name,
                chunk_size=chosen,
                ms=times["ours"] * 1e3,
                over_3_gemms=times["ours"] / times["gemms"],
                gemms_ms=times["gemms"] * 1e3,
                gemms_chunk=chunk,
            )


def parts(name: str) -> None:
    """Record milliseconds per kernel of one forward and backward pass of the loss."""
    count, dim, vocabulary, s = SHAPES[name]
    hidden, weight = head(count, dim, vocabulary)
    labels = zipf_ids((count, s), vocabulary)
    hidden.requires_grad_(), weight.requires_grad_()
    for _ in range(2):
        linear_multi_hot_cross_entropy(hidden, weight, labels).backward()
        hidden.grad = weight.grad = None
    with profile(activities=[ProfilerActivity.CPU if REHEARSE else ProfilerActivity.CUDA]) as found:
        linear_multi_hot_cross_entropy(hidden, weight, labels).backward()
        if not REHEARSE:
            torch.cuda.synchronize()
    times = {e.key.replace("void ", "")[:60]: e.self_device_time_total / 1e3 for e in found.key_averages()}
    longest = sorted(times, key=times.__getitem__)[:-8:-1]
    record(what="parts", shape=name, all_ms=sum(times.values()), **{key: times[key] for key in longest})


def main() -> None:
    bandwidth = copy_bandwidth()
    record(what="copy", gb_per_s=bandwidth / 1e9)
    for name in SHAPES:
        with recorded(what="loss", shape=name):
            loss(name)
        with recorded(what="row pass", shape=name):
            rows(name, torch.bfloat16, bandwidth)
        bags(name, bandwidth)
        with recorded(what="parts", shape=name):
            parts(name)
    with recorded(what="row pass", shape="A", dtype="float32"):
        rows("A", torch.float32, bandwidth)
    record(what="state after load", **gpu_state())


if __name__ == "__main__":
    main()
