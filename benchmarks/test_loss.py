"""The loss beside its peers, over the bare GEMMs."""

from functools import cache, partial

import peers
import pytest
import torch
from floors import gemms

from conftest import DEVICE, zipf_ids
from tst_ext import linear_multi_hot_cross_entropy

SMALL, LLAMA3, LLAMA3_LONG = (2048, 512, 32768), (1024, 1024, 128256), (4096, 1024, 128256)  # rows, d, V
QUICK = [((256, 512, 16384), 4, torch.float32)]
CPU = [
    *((SMALL, s, torch.float32) for s in (1, 2, 4, 6, 8, 16)),
    *((SMALL, s, torch.bfloat16) for s in (1, 4, 16)),
    *((LLAMA3, s, torch.bfloat16) for s in (1, 4)),
    *((LLAMA3, s, torch.float32) for s in (1, 4)),
    (LLAMA3_LONG, 4, torch.bfloat16),
    (LLAMA3_LONG, 4, torch.float32),
]
# A: a 3B model's head; B: a small model's, V a multiple of 64 as most are; C: a 10B model's at the paper's largest bag.
A, B, C = (16384, 2048, 128256), (32768, 1024, 49152), (8192, 4096, 151936)
GPU = [
    *(((4096, 1024, 50257), s, torch.bfloat16) for s in (1, 4, 16)),
    (A, 1, torch.bfloat16),
    (A, 6, torch.bfloat16),
    (B, 4, torch.bfloat16),
    (C, 16, torch.bfloat16),
    (SMALL, 4, torch.float32),
]
FULL = GPU if DEVICE.type == "cuda" else CPU


def pytest_generate_tests(metafunc):
    cases = QUICK if metafunc.config.getoption("quick") else FULL
    if "bag_size" not in metafunc.fixturenames:
        cases = [case for case in cases if case[0] != LLAMA3_LONG and (case[1] == 4 or case[:2] == (A, 6))]
    ids = ["x".join(map(str, shape)) + f"-s{s}-{str(dtype)[6:]}" for shape, s, dtype in cases]
    if "bag_size" in metafunc.fixturenames:
        metafunc.parametrize(("shape", "bag_size", "dtype"), cases, ids=ids)
    elif "shape" in metafunc.fixturenames:
        metafunc.parametrize(("shape", "dtype"), [(shape, dtype) for shape, _, dtype in cases], ids=ids)


def tensors(shape, bag_size, dtype):
    rows, dim, vocabulary = shape
    hidden, weight = matrices(shape, dtype)
    return hidden, weight, zipf_ids((rows, bag_size), vocabulary)


@cache
def matrices(shape, dtype):
    rows, dim, vocabulary = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, device=DEVICE).to(dtype)
    weight = (torch.randn(vocabulary, dim, generator=generator, device=DEVICE) / dim**0.5).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


@cache
def floors(shape, dtype):
    return gemms(*matrices(shape, dtype))


def training(hidden, weight, labels):
    """Return a function that drops the gradients, and one that makes a training step of a loss."""

    def clear():
        hidden.grad = weight.grad = None

    def step(loss):
        def run():
            clear()
            value = loss(hidden, weight, labels)
            value.backward()
            return value

        return run

    return clear, step


def facts(shape, bag_size, dtype, gemm_count):
    rows, dim, vocabulary = shape
    work = {"GFLOP": 2e-9 * gemm_count * rows * dim * vocabulary}
    return dict(shape="x".join(map(str, shape)), s=bag_size, dtype=str(dtype)[6:], work=work)


@pytest.fixture(autouse=True)
def one_shape_at_a_time(request):
    """Matrices of the shape before are let go."""
    shape, dtype = request.node.callspec.params["shape"], request.node.callspec.params["dtype"]
    if getattr(one_shape_at_a_time, "now", None) != (shape, dtype):
        matrices.cache_clear()
        floors.cache_clear()
        one_shape_at_a_time.now = (shape, dtype)


def test_forward_backward(race, shape, bag_size, dtype):
    hidden, weight, labels = tensors(shape, bag_size, dtype)
    clear, step = training(hidden, weight, labels)
    others = {n: f if isinstance(f, str) else step(f) for n, f in peers.losses(DEVICE, bag_size).items()}
    if shape == LLAMA3_LONG and DEVICE.type == "cpu":  # minutes a call, or more memory than a workstation has
        for name in set(others) - {"chunked plain torch"}:
            others[name] = "left out at this shape: the full logits take 2 GiB a copy, or a call takes minutes"
    three, _, chosen = floors(shape, dtype)
    race(
        step(linear_multi_hot_cross_entropy),
        others,
        three,
        rounds=7 if DEVICE.type == "cuda" else {SMALL: 5, LLAMA3: 3}.get(shape, 2),
        clear=clear,
        gradients=lambda: [hidden.grad, weight.grad],
        result_bytes=hidden.nbytes + weight.nbytes,
        tolerance=1e-3 if dtype == torch.float32 else 0.1,  # some add up gradients in bfloat16
        op="loss, forward and backward",
        gemms=chosen,
        **facts(shape, bag_size, dtype, 3),
    )


@torch.no_grad()
def test_forward(race, shape, dtype):
    """Without gradients, as in validation: one GEMM."""
    hidden, weight, labels = tensors(shape, 4, dtype)
    _, one, chosen = floors(shape, dtype)
    others = peers.losses(DEVICE, 4) | {"chunked plain torch": "computes gradients in its forward pass"}
    race(
        lambda: linear_multi_hot_cross_entropy(hidden, weight, labels),
        {n: f if isinstance(f, str) else partial(f, hidden, weight, labels) for n, f in others.items()},
        {"best GEMM": one},
        rounds=9 if shape == SMALL else 5,
        tolerance=1e-3 if dtype == torch.float32 else 0.1,  # some add up gradients in bfloat16
        op="loss, forward only",
        gemms=chosen,
        **facts(shape, 4, dtype, 1),
    )


def test_label_weights(race, shape, dtype):
    """Compare weights of 1, so that results agree, with the call without weights and with a call for each position."""
    hidden, weight, labels = tensors(shape, 4, dtype)
    ones = torch.ones(labels.shape, device=DEVICE)
    clear, step = training(hidden, weight, labels)

    def call_for_each_position(hidden, weight, labels):
        rows = [linear_multi_hot_cross_entropy(hidden, weight, y, reduction="none") for y in labels.unbind(1)]
        return sum((u * loss).sum() / u.sum() for u, loss in zip(ones.unbind(1), rows, strict=True)) / len(rows)

    race(
        step(partial(linear_multi_hot_cross_entropy, label_weights=ones)),
        {"without weights": step(linear_multi_hot_cross_entropy), "4 calls": step(call_for_each_position)},
        floors(shape, dtype)[0],
        rounds=7 if shape == SMALL else 3,
        clear=clear,
        gradients=lambda: [hidden.grad, weight.grad],
        result_bytes=hidden.nbytes + weight.nbytes,
        tolerance=1e-3 if dtype == torch.float32 else 0.1,  # some add up gradients in bfloat16
        op="loss with label weights, forward and backward",
        gemms=floors(shape, dtype)[2],
        **facts(shape, 4, dtype, 3),
    )
