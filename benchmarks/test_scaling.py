"""How time and memory of the loss grow with rows, vocabulary, bag size and threads, and what a chunk size costs."""

import torch

from conftest import DEVICE, zipf_ids
from tst_ext import linear_multi_hot_cross_entropy

ROWS, DIM, VOCABULARY, BAG_SIZE = 1024, 512, 32768, 4
THREADS = [n for n in (1, 2, 4) if n <= torch.get_num_threads() and DEVICE.type == "cpu"]
POINTS = [
    *(("rows", {"rows": n}) for n in (128, 256, 512, 1024, 2048, 4096, 8192)),
    *(("vocabulary", {"vocabulary": v}) for v in (4096, 8192, 16384, 32768, 65536, 128256)),
    *(("s", {"bag_size": s}) for s in (1, 2, 4, 8, 16)),
    *(("threads", {"threads": n}) for n in THREADS),
    *(("chunk_size", {"dim": 1024, "vocabulary": 128256, "chunk_size": c}) for c in (16, 32, 64, 128, 256, 512, 1024)),
]


def pytest_generate_tests(metafunc):
    points = [] if metafunc.config.getoption("quick") else POINTS
    ids = [f"{axis}-{list(point.values())[-1]}" for axis, point in points]
    metafunc.parametrize(("axis", "point"), points, ids=ids)


def test_scaling(race, axis, point):
    sizes = {"rows": ROWS, "dim": DIM, "vocabulary": VOCABULARY, "bag_size": BAG_SIZE, "chunk_size": None, **point}
    rows, dim, vocabulary = sizes["rows"], sizes["dim"], sizes["vocabulary"]
    hidden = torch.randn(rows, dim, device=DEVICE, requires_grad=True)
    weight = torch.randn(vocabulary, dim, device=DEVICE).div_(dim**0.5).requires_grad_()
    labels = zipf_ids((rows, sizes["bag_size"]), vocabulary)

    def clear():
        hidden.grad = weight.grad = None

    def step(labels):
        clear()
        loss = linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_size=sizes["chunk_size"])
        loss.backward()
        return loss

    def run():
        return step(labels)

    def one_token():
        step(labels[:, :1])  # returns nothing: it is another loss

    threads = torch.get_num_threads()
    torch.set_num_threads(point.get("threads", threads))
    try:
        race(
            run,
            {},
            {"s = 1": one_token} if axis == "s" else {},
            rounds=9 if axis == "s" else 2,
            clear=clear,
            result_bytes=hidden.nbytes + weight.nbytes,
            op="scaling",
            axis=axis,
            value=list(point.values())[-1],
            shape=f"{rows}x{dim}x{vocabulary}",
            s=sizes["bag_size"],
            dtype="float32",
            work={"GFLOP": 6e-9 * rows * dim * vocabulary},
        )
    finally:
        torch.set_num_threads(threads)
