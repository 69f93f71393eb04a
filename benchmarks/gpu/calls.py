"""Bare calls of the ops, which together run every kernel with every way to launch it: what nsight.py runs.

calls.py small    small inputs: one block per row and clusters; logits kept in shared memory and read again; aligned
                  rows and others; all dtypes and options; weighted bags; tokens with many hits
calls.py large    A, B and C with a chunk of 1024 rows
calls.py planted  a call whose logits have less memory than they say, for a tool that must find it
calls.py names    "small" under torch's profiler; fails unless every kernel of csrc/cuda ran
"""

import itertools
import re
import sys

import torch
from common import DEVICE, REHEARSE, ROOT, SHAPES, padded, record, zipf_ids
from torch import Tensor

import tst_ext  # noqa: F401  registers the ops

ops = torch.ops.tst_ext
HALF, SINGLE = torch.bfloat16, torch.float32
EVERYTHING = dict(logit_softcap=5.0, z_loss=0.1, label_smoothing=0.1)


def row_pass(z: Tensor, s: int, gradient: bool, per_row: bool = False, **options: object) -> None:
    n, vocabulary = z.shape
    wide = torch.promote_types(z.dtype, SINGLE)
    labels = zipf_ids((n, s), vocabulary)
    labels[0, 0] = -100
    loss, lse = torch.empty(2, n, dtype=wide, device=DEVICE)
    scale = torch.full((s,), 1 / (n * s), dtype=wide, device=DEVICE)
    upstream = torch.rand(2, n, dtype=wide, device=DEVICE).unbind() if per_row else (None, None)
    ops.multi_hot_cross_entropy_rows_(
        z, labels, scale, loss, lse, grad_loss=upstream[0], grad_lse=upstream[1], gradient=gradient, **options
    )
    assert torch.isfinite(loss).all() and torch.isfinite(lse).all()


def bag(count: int, s: int, vocabulary: int, dim: int, dtype: torch.dtype, **options: object) -> None:
    ids = zipf_ids((count, s), vocabulary)
    out = ops.bag_embedding(ids, torch.randn(vocabulary, dim, device=DEVICE).to(dtype), "mean", **options)
    gradient = ops.bag_embedding_backward(out, ids, vocabulary, "mean", **options)
    assert torch.isfinite(gradient).all()


def scaled_copies(out: Tensor, source: Tensor) -> None:
    half, one = (torch.tensor(factor, device=DEVICE) for factor in (0.5, 1.0))
    ops.scaled_copy_(out, source, one)  # the sum of several chunks
    ops.scaled_copy_(out, out, half)
    ops.scaled_copy_(out, out, one)  # returns at once


def small() -> None:
    # Columns: a warp's row; 256 threads; a cluster of 2 to 8; slices of more than 66 KB; more than shared memory holds.
    lengths = {HALF: (33, 5000, 25000, 50257, 128256, 600_000, 1_000_003), SINGLE: (33, 25000, 128256, 300_000)}
    for dtype, sizes in lengths.items():
        for vocabulary, gradient in itertools.product(sizes[:2] if REHEARSE else sizes, (True, False)):
            row_pass(padded(3, vocabulary, dtype), 4, gradient)
            row_pass(padded(3, vocabulary, dtype), 2, gradient, per_row=gradient, **EVERYTHING)
    for dtype in (torch.float16, torch.float64):
        row_pass(padded(3, 700, dtype), 3, True)
    row_pass(torch.randn(3, 25001, device=DEVICE).to(HALF), 3, True)  # rows that begin at any address
    row_pass(padded(2, 25000), 5, True, objective="mce_alt", z_loss=0.1)
    row_pass(padded(2, 5000), 40, True)  # more labels than a warp has lanes
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64, device=DEVICE)
    for dtype, dim in itertools.product((HALF, SINGLE, torch.float16), (24, 5)):
        bag(300, 3, 40, dim, dtype)  # some tokens have more than 64 hits: rows in pieces
        bag(300, 3, 40, dim, dtype, padding_idx=0, position_weights=weights)
    bag(7, 16, 500, 1032, HALF)
    bag(5, 40, 500, 64, torch.float64)
    for dtype, offset in itertools.product((HALF, torch.float16), (0, 1)):
        source = torch.randn(5001, device=DEVICE)[offset:]
        out = torch.empty(5001, dtype=dtype, device=DEVICE)[offset:]
        scaled_copies(out, source)


def large() -> None:
    for rows, dim, vocabulary, s in SHAPES.values():
        for gradient in (True, False):
            row_pass(padded(min(rows, 1024), vocabulary), s, gradient)
        bag(rows, s, vocabulary, dim, HALF)
        source = torch.randn(vocabulary, dim, device=DEVICE)
        scaled_copies(torch.empty_like(source, dtype=HALF), source)


def planted() -> None:
    z = padded(3, 5000)
    if not REHEARSE:  # a CPU would read what is there, or end the process
        z.untyped_storage().resize_(64)  # the tensor still says [3, 5000]
    row_pass(z, 2, False)


def names() -> None:
    pattern = re.compile(r"__global__[^{;]*?\b(\w+)\s*\([^()]*\)\s*\{")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.*"))
    wanted = {name for path in sources for name in pattern.findall(path.read_text())}
    activities = [torch.profiler.ProfilerActivity.CPU if REHEARSE else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        small()
        if not REHEARSE:
            torch.cuda.synchronize()
    ran = {event.key for event in profile.key_averages()}
    missing = sorted(name for name in wanted if not any(name in key for key in ran))
    variants = len([key for key in ran if any(name in key for name in wanted)])
    record(kernels=sorted(wanted), variants_that_ran=variants, missing=missing)
    if not wanted or (missing and not REHEARSE):
        sys.exit(1)


if __name__ == "__main__":
    {"small": small, "large": large, "planted": planted, "names": names}[sys.argv[1]]()
    if not REHEARSE:
        torch.cuda.synchronize()
    print("calls.py: done", flush=True)
