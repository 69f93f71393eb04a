"""Bag embedding beside torch's ways, over the bytes it must move at this machine's copy speed."""

from functools import partial

import peers
import torch
from floors import bytes_moved

from conftest import DEVICE, zipf_ids
from tst_ext import bag_embedding

BAGS = 4096
QUICK = [(2048, 16384, 1024, 6, torch.float32)]
CPU = [
    *((v, 1024, 6, torch.float32) for v in (4096, 32768, 128256)),
    *((128256, 1024, s, torch.float32) for s in (1, 2, 4, 8, 16)),
    (128256, 1024, 6, torch.bfloat16),
]
GPU = [  # rows of A, B and C of test_loss.py
    (16384, 128256, 2048, 6, torch.bfloat16),
    (32768, 49152, 1024, 4, torch.bfloat16),
    (8192, 151936, 4096, 16, torch.bfloat16),
    (16384, 128256, 2048, 6, torch.float32),
]
FULL = GPU if DEVICE.type == "cuda" else [(BAGS, *case) for case in CPU]


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("quick")
    directions = ["forward", "forward and backward", "forward and sparse backward"]
    metafunc.parametrize("direction", [*directions, *([] if quick else ["backward"])])
    cases = QUICK if quick else FULL
    ids = [f"{n}x{s}-{v}x{d}-{str(dtype)[6:]}" for n, v, d, s, dtype in cases]
    metafunc.parametrize(("bags", "vocabulary", "dim", "bag_size", "dtype"), cases, ids=ids)


def test_embedding(race, direction, bags, vocabulary, dim, bag_size, dtype):
    weight = torch.randn(vocabulary, dim, device=DEVICE, dtype=dtype, requires_grad=True)
    ids = zipf_ids((bags, bag_size), vocabulary)
    grad = torch.randn(bags, dim, device=DEVICE, dtype=dtype)
    row = dim * weight.element_size()

    def clear():
        weight.grad = None

    def runner(embed):
        def forward():
            with torch.no_grad():
                return embed(ids, weight)

        def both():
            clear()
            out = embed(ids, weight)
            out.backward(grad)
            return out

        def backward():
            clear()
            output.backward(grad, retain_graph=True)
            return output

        if direction == "backward":
            output = embed(ids, weight)
            return backward
        return forward if direction == "forward" else both

    sparse = direction == "forward and sparse backward"
    rows = ids.unique()

    def gradients():
        if direction == "forward":
            return []
        if not sparse:
            return [weight.grad]
        return [weight.grad.coalesce().values() if weight.grad.is_sparse else weight.grad[rows]]

    # Must move, forward: each distinct row read once, a row written per bag; backward: the output's gradient read once,
    # a fresh table written, or those rows of it that are hit. As gathered: a row, or a row of the gradient, read again
    # for every id.
    forward, backward = direction != "backward", direction != "forward"
    read = ids.nbytes + (rows.numel() * row if forward else 0) + (bags * row if backward else 0)
    gathered = ids.nbytes + bags * bag_size * row * (forward + backward)
    written = bags * row if forward else 0
    fresh = (rows.numel() if sparse else vocabulary) * row if backward else 0
    race(
        runner(partial(bag_embedding, sparse=sparse)),
        {name: runner(embed) for name, embed in (peers.sparse_embeddings() if sparse else peers.embeddings()).items()},
        {"bytes": bytes_moved(read, written, fresh), "bytes as gathered": bytes_moved(gathered, written, fresh)},
        rounds=20,
        clear=clear,
        gradients=gradients,
        result_bytes=fresh,
        cold=True,
        tolerance=1e-5 if dtype == torch.float32 else 0.5,  # some add up gradients in bfloat16
        op=f"bag embedding, {direction}",
        shape=f"{bags}x{bag_size} ids, {vocabulary}x{dim}",
        s=bag_size,
        dtype=str(dtype)[6:],
        work={"GB": 1e-9 * (gathered + written + fresh)},
    )
