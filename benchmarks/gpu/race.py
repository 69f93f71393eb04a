"""A peer of our loss next to ours and the three bare GEMMs, in turns: race.py NAME, a key of PEERS.

Forward and backward at A, B and C, first with one label per row, for which the peers were made, then with the shape's
bag size. Kernels for one label per row get each row once per position. Also recorded: the extra memory at the peak,
beyond the gradients, and the relative differences of loss and gradients from ours.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import DEVICE, ROOT, SHAPES, best_three_gemms, head, medians, record, recorded, zipf_ids
from torch import Tensor

from tst_ext import linear_multi_hot_cross_entropy

sys.path.append(str(ROOT / "benchmarks"))
import peers  # noqa: E402

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def compiled(**options: object) -> Loss:
    return torch.compile(peers.listing, dynamic=False, options=options or None)


def liger_cute() -> Loss | str:
    """Liger's kernels for Hopper in CuTe, which its functional interface never calls. They need V % 256 = 0."""
    module = peers.imported("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    return module if isinstance(module, str) else peers.repeated(module.liger_fused_linear_cross_entropy_sm90)


def quack() -> Loss | str:
    """QuACK at its default of 4096 rows per chunk, or 8192 where d is 4096 too: it refuses chunks of d rows."""
    module = peers.imported("quack.linear_cross_entropy")
    if isinstance(module, str):
        return module
    return peers.repeated(
        lambda h, w, y: module.chunked_linear_cross_entropy(h, w, y, chunk_size=8192 if h.shape[1] == 4096 else 4096)
    )


def torch_linear() -> Loss | str:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return peers.repeated(peers.linear_cross_entropy)


PEERS: dict[str, Callable[[], Loss | str]] = {
    "ours": lambda: linear_multi_hot_cross_entropy,
    "quack": quack,
    "liger_cute": liger_cute,
    "liger": partial(peers.liger, DEVICE),
    "cce": partial(peers.cut_cross_entropy, DEVICE),
    "torch_linear": torch_linear,
    "auto_chunker": lambda: compiled(**{"auto_chunker.enable": True}),
    "listing": lambda: peers.listing,
    "listing_compiled": compiled,
    "plain": lambda: peers._Chunked.apply,
}


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def difference(actual: Tensor, wanted: Tensor) -> float:
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return float(norm(actual.detach() - wanted) / norm(wanted))


def measure(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, gemms: Callable[[], None]) -> dict[str, object]:
    def step(function: Loss) -> Tensor:
        hidden.grad = weight.grad = None
        value = function(hidden, weight, labels)
        value.backward()
        return value.detach()

    wanted = step(linear_multi_hot_cross_entropy), hidden.grad, weight.grad
    began = time.monotonic()
    found = step(loss), hidden.grad, weight.grad
    differences = [difference(a, b) for a, b in zip(found, wanted, strict=True)]
    first = time.monotonic() - began
    del wanted, found
    hidden.grad = weight.grad = None
    before = allocated()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    step(loss)
    extra = peak() - before - hidden.nbytes - weight.nbytes
    again = time.monotonic() - began
    runs = {"peer": partial(step, loss), "ours": partial(step, linear_multi_hot_cross_entropy), "gemms": gemms}
    times = medians(runs, 5 if again < 0.5 else 2)
    return {
        "ms": times["peer"] * 1e3,
        "over_3_gemms": times["peer"] / times["gemms"],
        "over_ours": times["peer"] / times["ours"],
        "ours_ms": times["ours"] * 1e3,
        "gemms_ms": times["gemms"] * 1e3,
        "extra_mib": extra / 2**20,
        "first_s": first,
        **dict(zip(("loss_differs", "dh_differs", "dw_differs"), differences, strict=True)),
    }


def main() -> int:
    name = sys.argv[1]
    try:
        loss = PEERS[name]()
    except Exception as error:  # a peer may fail in any way
        loss = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(loss, str):
        record(peer=name, unavailable=loss)
        return 0
    for one in (True, False):
        for shape, (rows, dim, vocabulary, s) in SHAPES.items():
            facts = dict(peer=name, shape=shape, s=1 if one else s)
            with recorded(**facts):
                torch._dynamo.reset()  # after eight shapes it would compile no more, and say nothing
                hidden, weight = head(rows, dim, vocabulary)
                gemms, _ = best_three_gemms(hidden, weight)
                hidden.requires_grad_(), weight.requires_grad_()
                labels = zipf_ids((rows, 1 if one else s), vocabulary)
                record(**facts, **measure(loss, hidden, weight, labels, gemms))
            hidden = weight = gemms = labels = None  # before the next shape takes its own
    return 0


if __name__ == "__main__":
    sys.exit(main())
