"""What the ops are held to: the GEMMs alone, and the bytes they must move at this machine's copy speed."""

from collections.abc import Callable

import torch
from torch import Tensor

from conftest import DEVICE, seconds
from tst_ext import _C

CHUNKS = (2048, 4096, 8192, 16384) if DEVICE.type == "cuda" else (128, 256, 512, 1024)
BLOCK = 2048  # columns of a oneDNN product, which is fresh memory: small enough that the allocator recycles it


def big(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory in the largest pages that the system gives."""
    tensor = torch.empty(*shape, dtype=dtype, device=DEVICE)
    if DEVICE.type == "cpu":
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def gemms(hidden: Tensor, weight: Tensor) -> tuple[dict[str, Callable[[], None]], Callable[[], None], str]:
    """Two floors of forward and backward, {name: runner}, one of the forward alone, and what was chosen.

    Every GEMM runs by torch.mm, and where torch carries oneDNN for float32 by that, at every chunk size; the fastest
    is taken: one library and one chunk size for all, "3 GEMMs, torch.mm"; or each its own, "3 best
    GEMMs". The products are written to memory that is there already, or
    in oneDNN's case to blocks that the allocator recycles. On the CPU bfloat16 has another choice, torch.mm in float32:
    the weight is converted and its gradient rounded once, hidden states are converted in each product. Without bfloat16
    instructions it is the only one, because torch's bfloat16 products would take minutes a call.
    """
    hidden, weight = hidden.detach(), weight.detach()
    rows, vocabulary = len(hidden), len(weight)
    grad_hidden, grad_weight = torch.empty_like(hidden), big(*weight.shape, dtype=weight.dtype).zero_()
    width = -(-vocabulary // 64) * 64 if DEVICE.type == "cuda" else vocabulary  # what tensor cores like
    buffer = big(min(rows, CHUNKS[-1]), width, dtype=weight.dtype).normal_()[:, :vocabulary]
    has_onednn = DEVICE.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def chunked(chunk: int, product: Callable[[Tensor, Tensor, int], object]) -> Callable[[int], None]:
        def run(rows: int) -> None:
            for start in range(0, rows, chunk):
                h = hidden[start : start + chunk]
                product(buffer[: len(h)], h, start)

        return run

    def add_grad_weight(z: Tensor, h: Tensor, start: int) -> None:
        if start == 0:
            torch.mm(z.T, h, out=grad_weight)
        else:
            torch.addmm(grad_weight, z.T, h, out=grad_weight)

    def onednn(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    def logits_onednn(z: Tensor, h: Tensor, _: int) -> None:
        for v in range(0, vocabulary, BLOCK):
            onednn(h, weight[v : v + BLOCK])

    products: dict[str, dict[str, Callable[[Tensor, Tensor, int], object]]] = {
        "logits": {"mm": lambda z, h, _: torch.mm(h, weight.T, out=z)},
        "grad_hidden": {"mm": lambda z, h, i: torch.mm(z, weight, out=grad_hidden[i : i + len(h)])},
        "grad_weight": {"mm": add_grad_weight},
    }
    if has_onednn:
        products["logits"]["onednn"] = logits_onednn
        products["grad_hidden"]["onednn"] = lambda z, h, _: onednn(z, weight.T)
    if DEVICE.type == "cpu" and weight.dtype == torch.bfloat16:
        wide_weight, wide_gradient = big(*weight.shape), big(*weight.shape).zero_()
        wide = big(min(rows, CHUNKS[-1]), vocabulary).normal_()

        def logits_float32(_: Tensor, h: Tensor, start: int) -> None:
            if start == 0:
                wide_weight.copy_(weight)
            torch.mm(h.float(), wide_weight.T, out=wide[: len(h)])

        def grad_hidden_float32(_: Tensor, h: Tensor, start: int) -> None:
            grad_hidden[start : start + len(h)] = wide[: len(h)] @ wide_weight

        def grad_weight_float32(_: Tensor, h: Tensor, start: int) -> None:
            torch.addmm(wide_gradient, wide[: len(h)].T, h.float(), beta=int(start > 0), out=wide_gradient)
            if start + len(h) == rows:
                grad_weight.copy_(wide_gradient)

        own = {"logits": logits_float32, "grad_hidden": grad_hidden_float32, "grad_weight": grad_weight_float32}
        for gemm, product in own.items():
            products[gemm] = (products[gemm] if _C.cpu_bfloat16_gemms() else {}) | {"mm in float32": product}
    first = next(iter(products["logits"]))
    runs = {
        (gemm, library, chunk): chunked(chunk, product)
        for chunk in CHUNKS
        if chunk <= max(rows, CHUNKS[0])
        for gemm, libraries in products.items()
        for library, product in libraries.items()
    }
    some = min(rows, CHUNKS[-1])
    time = {key: min(seconds(lambda r=run: r(some)) for _ in range(2)) for key, run in runs.items()}
    best = {gemm: min((key for key in time if key[0] == gemm), key=time.__getitem__) for gemm in products}
    one = min({key[2] for key in time}, key=lambda c: sum(t for k, t in time.items() if k[1] == first and k[2] == c))

    def all_of(keys: list[tuple[str, str, int]]) -> Callable[[], None]:
        def run() -> None:
            for key in keys:
                runs[key](rows)

        return run

    three = {"3 GEMMs, torch.mm": all_of([(gemm, first, one) for gemm in products])}
    three["3 best GEMMs"] = all_of(list(best.values()))
    chosen = f"torch.{first} {one} rows; best " + ", ".join(f"{g} {lib} {c}" for g, lib, c in best.values())
    return three, all_of([best["logits"]]), chosen


def bytes_moved(read: int, written: int, fresh: int) -> Callable[[], None]:
    """Moves as many bytes by the fastest means torch has: a copy, and a fill of fresh memory, page faults included."""
    half = (read + written) // 2
    source, target = torch.ones(2, half, dtype=torch.uint8, device=DEVICE)

    def run() -> None:
        target.copy_(source)
        if fresh:
            big(fresh // 4).zero_()

    return run
