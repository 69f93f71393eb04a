"""Other ways to compute the same, each in its best form. Those of the loss leave gradients in hidden and weight."""

import importlib
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tst_ext import bag_embedding, reference

# Whose first call compiles, so that it says nothing about their speed.
COMPILED = {"paper's listing, torch.compile", "paper's loop, torch.compile", "cut-cross-entropy"}

# ---- loss ------------------------------------------------------------------------------------------------------------


def listing(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The paper's listing: full logits, one cross-entropy a position."""
    logits = (hidden @ weight.T).float()
    return torch.stack([F.cross_entropy(logits, y) for y in labels.unbind(1)]).mean()


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels.squeeze(1))


class _Chunked(torch.autograd.Function):
    """Careful plain torch: chunks of rows, one softmax for all positions, the gradient in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        count, total = labels.numel(), hidden.new_zeros((), dtype=torch.float32)
        rows = min(512, len(hidden))
        buffer = hidden.new_empty(rows, len(weight))
        for i, (h, y, dh) in enumerate(zip(*(t.split(rows) for t in (hidden, labels, grad_hidden)), strict=True)):
            z = torch.mm(h, weight.T, out=buffer[: len(h)])
            wide = z.float()  # the logits themselves where they are float32
            m = wide.amax(1, keepdim=True)
            target = wide.gather(1, y) - m
            p = wide.sub_(m).exp_()
            total_exp = p.sum(1, keepdim=True)
            total += (total_exp.log() - target).sum()
            p.mul_(y.shape[1] / count / total_exp)
            p.scatter_add_(1, y, p.new_full((), -1 / count).expand(y.shape))
            z = p if z.dtype == p.dtype else z.copy_(p)
            torch.mm(z, weight, out=dh)
            if i == 0:
                torch.mm(z.T, h, out=grad_weight)
            else:
                grad_weight.addmm_(z.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden, grad_weight, None) if grad == 1 else (grad_hidden * grad, grad_weight * grad, None)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked op."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def soft_targets(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's op with class probabilities, which it takes unchunked only: the bag as one distribution [N, V]."""
    p = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    p.scatter_add_(1, labels, p.new_full((), 1 / labels.shape[1]).expand(labels.shape))
    return F.linear_cross_entropy(hidden, weight, p)


def repeated(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel for one label a row that chunks rows: each row once per position, and one weight gradient in all."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return op(hidden.repeat_interleave(labels.shape[1], 0), weight, labels.flatten())

    return loss


def per_position(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel for one label a row that does not, called once a position."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([op(hidden, weight, y) for y in labels.unbind(1)]).mean()

    return loss


@cache
def imported(module: str):
    """The module, or why it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # a peer may fail in any way, and says so in the table
        return f"{type(error).__name__}: {error}".splitlines()[0]


def cut_cross_entropy(device: torch.device):
    module = imported("cut_cross_entropy")
    if isinstance(module, str):
        return module
    if device.type == "cuda":
        return repeated(lambda h, w, y: module.linear_cross_entropy(h, w, y))
    # Its own kernels need a GPU; this mode has the logits of all rows.
    return per_position(lambda h, w, y: module.linear_cross_entropy(h, w, y, impl="torch_compile"))


def liger(device: torch.device):
    if device.type != "cuda":
        return "its kernels need a GPU"
    module = imported("liger_kernel.transformers.functional")
    if isinstance(module, str):
        return module
    return repeated(lambda h, w, y: module.liger_fused_linear_cross_entropy(h, w, y))


def losses(device: torch.device, bag_size: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str]:
    """Peers by name; a string says why one does not run here."""
    torch._dynamo.reset()  # after eight shapes it would compile no more, and say nothing
    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str] = {
        "paper's listing": listing,
        "paper's listing, torch.compile": torch.compile(listing, dynamic=False),
        "chunked plain torch": _Chunked.apply,
        "cut-cross-entropy": cut_cross_entropy(device),
        "Liger": liger(device),
    }
    if bag_size == 1:
        peers["F.cross_entropy, full logits"] = cross_entropy
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = repeated(linear_cross_entropy)
        if bag_size > 1:
            peers["F.linear_cross_entropy, soft targets"] = soft_targets
    else:
        peers["F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    return peers


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding_bag(ids: Tensor, weight: Tensor, sparse: bool = False) -> Tensor:
    return F.embedding_bag(ids, weight, mode="mean", sparse=sparse)


def loop(ids: Tensor, weight: Tensor) -> Tensor:
    """The paper's loop: one lookup a position."""
    total = F.embedding(ids[:, 0], weight)
    for i in range(1, ids.shape[1]):
        total = total + F.embedding(ids[:, i], weight)
    return total / ids.shape[1]


def embeddings() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    torch._dynamo.reset()
    return {
        "F.embedding_bag": embedding_bag,
        "gather and mean": reference.bag_embedding,
        "paper's loop": loop,
        "paper's loop, torch.compile": torch.compile(loop, dynamic=False),
    }


def sparse_embeddings() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the peers for sparse gradients. F.embedding_bag gives a row per id, which an optimiser has to coalesce."""
    return {"F.embedding_bag, sparse": partial(embedding_bag, sparse=True), "tst_ext, dense": bag_embedding}
