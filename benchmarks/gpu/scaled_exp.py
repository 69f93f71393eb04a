"""The second design of the loss, as an experiment: exponentials instead of logits, and no row pass.

The GEMM of the logits writes E = exp(z - a) in bfloat16, and the sums of E's rows. a is the largest logit of the row's
labels, from a kernel before. Then v = S / sum of the row, S what the row weighs, and the gradient of the logits is v E
but for the columns of the labels, which a small kernel mends. So dh = v (E W), scaled as it is rounded, and
dW = E^T (v h). What the loss in tst_ext has beyond this is missing: ignored labels, options, rows whose largest logit
is more than 88 above `a`.

    pip download --no-deps nvidia-cutlass && unzip nvidia_cutlass-*.whl 'cutlass_library/source/include/*'
    nvcc -shared -cudart shared -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --expt-relaxed-constexpr \\
        -DNDEBUG -Xcompiler -fPIC -I cutlass_library/source/include benchmarks/gpu/scaled_exp.cu -o libscaled_exp.so
    python benchmarks/gpu/scaled_exp.py ./libscaled_exp.so

docs/log.md has its figures, and why it is not in tst_ext.
"""

import ctypes
import sys
from functools import partial

import torch
from common import DEVICE, SHAPES, best_three_gemms, head, medians, record, recorded, zipf_ids
from torch import Tensor

from tst_ext import linear_multi_hot_cross_entropy

LIBRARY = ctypes.CDLL(sys.argv[1])  # after torch, which brings libcudart


def number(name: str, of: int) -> int:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return int(function(of))


def call(name: str, *arguments: Tensor | int) -> None:
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
    if status := getattr(LIBRARY, name)(*given, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)):
        raise RuntimeError(f"{name}: status {status}")


class Chain:
    """Loss and gradients of one batch, into memory that is there already."""

    def __init__(self, rows: int, dim: int, vocabulary: int, s: int) -> None:
        self.size, self.s = (rows, vocabulary, dim), s
        self.h, self.w = head(rows, dim, vocabulary)
        self.labels = zipf_ids((rows, s), vocabulary)
        self.scale = torch.full((s,), 1 / (rows * s), device=DEVICE)
        self.e = torch.empty(rows, number("row_of", vocabulary), dtype=torch.bfloat16, device=DEVICE)[:, :vocabulary]
        float32 = partial(torch.empty, dtype=torch.float32, device=DEVICE)
        self.sums = float32(number("sums_tiles", vocabulary), number("sums_pitch", rows))
        self.z, self.dh32 = float32(rows, s), float32(rows, dim)
        self.a, self.k, self.total, self.lse, self.v, self.loss = (float32(rows) for _ in range(6))
        self.vh, self.dh, self.dw = torch.empty_like(self.h), torch.empty_like(self.h), torch.empty_like(self.w)

    def label_logits(self) -> None:
        rows, _, dim = self.size
        call("label_logits_of", self.h, self.w, self.labels, rows, dim, self.s, self.z, self.a, self.k)

    def exponentials(self) -> None:
        call("exponentials", self.h, self.w, self.k, self.e, self.sums, *self.size)

    def finish(self) -> None:
        rows = (self.sums, self.labels, self.z, self.a, self.scale)
        results = (self.total, self.lse, self.v, self.loss, self.vh)
        call("finish", *rows, *self.size, self.s, self.e, self.h, *results)

    def grad_hidden(self) -> None:
        torch.ops.aten.mm.dtype_out(self.e, self.w, torch.float32, out=self.dh32)
        rows, _, dim = self.size
        call("scaled_rows", self.dh32, self.v, self.dh, rows, dim)

    def grad_weight(self) -> None:
        torch.mm(self.e.T, self.vh, out=self.dw)

    def parts(self) -> dict[str, partial[None]]:
        names = ("label_logits", "exponentials", "finish", "grad_hidden", "grad_weight")
        return {name: partial(getattr(type(self), name), self) for name in names}

    def run(self) -> None:
        for part in self.parts().values():
            part()


def errors(loss: Tensor, dh: Tensor, dw: Tensor, chain: Chain) -> dict[str, float]:
    """Relative errors against float64."""
    h, w, scale = chain.h.double(), chain.w.double(), chain.scale.double()
    z = h @ w.T
    lse = z.logsumexp(1, keepdim=True)
    true = (scale * (lse - z.gather(1, chain.labels))).sum()
    dz = z.sub_(lse).exp_().mul_(scale.sum()).scatter_add_(1, chain.labels, -scale.expand(chain.labels.shape))
    norm = torch.linalg.vector_norm
    relative = {
        name: float(norm(found.double() - wanted) / norm(wanted))
        for name, found, wanted in (("dh", dh, dz @ w), ("dw", dw, dz.T @ h))
    }
    return {"loss": float((loss.double() - true).abs() / true), **relative}


def step(chain: Chain, hidden: Tensor, weight: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    loss = linear_multi_hot_cross_entropy(hidden, weight, chain.labels)
    loss.backward()
    return loss


def accuracy(name: str, chain: Chain) -> None:
    chain.run()
    record(what="accuracy", shape=name, design="exponentials", **errors(chain.loss.sum(), chain.dh, chain.dw, chain))
    hidden, weight = chain.h.clone().requires_grad_(), chain.w.clone().requires_grad_()
    loss = step(chain, hidden, weight).detach()
    record(what="accuracy", shape=name, design="tst_ext", **errors(loss, hidden.grad, weight.grad, chain))


def times(name: str, chain: Chain) -> None:
    hidden, weight = chain.h.detach().requires_grad_(), chain.w.detach().requires_grad_()
    gemms, _ = best_three_gemms(hidden, weight)
    found = medians({"exponentials": chain.run, "tst_ext": partial(step, chain, hidden, weight), "gemms": gemms})
    record(
        what="loss",
        shape=name,
        **{f"{design}_ms": time * 1e3 for design, time in found.items()},
        **{f"{design}_over_3_gemms": found[design] / found["gemms"] for design in ("exponentials", "tst_ext")},
    )
    chain.run()  # so that each part finds the results of those before
    record(what="parts", shape=name, **{part: time * 1e3 for part, time in medians(chain.parts()).items()})


def main() -> None:
    accuracy("456 x 256 x 4160, 5", Chain(456, 256, 4160, 5))  # ends within a tile
    for name, (rows, dim, vocabulary, s) in SHAPES.items():
        with recorded(shape=name):
            times(name, Chain(rows, dim, vocabulary, s))
        with recorded(shape=name):
            accuracy(name, Chain(1024, dim, vocabulary, s))


if __name__ == "__main__":
    main()
