"""Other ways to compute the same, each in its best form. Those of the loss leave gradients in hidden and weight."""

import importlib
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tst_ext import reference

# ---- loss ------------------------------------------------------------------------------------------------------------


def listing(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The paper's listing: full logits, one cross-entropy a position."""
    return reference.multi_hot_cross_entropy(hidden @ weight.T, labels)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels.squeeze(1))


class _Chunked(torch.autograd.Function):
    """Careful plain torch: chunks of rows, one softmax for all positions, the gradient in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        count, total = labels.numel(), hidden.new_zeros((), dtype=torch.float32)
        rows = 512 if len(hidden) > 512 else len(hidden)
        for h, y, dh in zip(hidden.split(rows), labels.split(rows), grad_hidden.split(rows), strict=True):
            z = h @ weight.T
            wide = z.float()
            lse = wide.logsumexp(1, keepdim=True)
            total += (lse - wide.gather(1, y)).sum()
            wide = wide.sub_(lse).exp_().mul_(y.shape[1] / count)
            wide.scatter_add_(1, y, wide.new_full((), -1 / count).expand(y.shape))
            z = wide if z.dtype == wide.dtype else z.copy_(wide)
            torch.mm(z, weight, out=dh)
            grad_weight.addmm_(z.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked op, which takes one label a row: once per position."""
    options = torch.nn.LinearCrossEntropyOptions()
    parts = [F.linear_cross_entropy(hidden, weight, y, options=options) for y in labels.unbind(1)]
    return torch.stack(parts).mean()


def soft_targets(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's op with class probabilities, which it takes unchunked only: the bag as one distribution [N, V]."""
    p = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    p.scatter_add_(1, labels, p.new_full((), 1 / labels.shape[1]).expand(labels.shape))
    return F.linear_cross_entropy(hidden, weight, p)


def per_position(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel for one label a row, called once a position."""

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
    impl = "cce" if device.type == "cuda" else "torch_compile"  # its own kernels need a GPU
    return per_position(lambda h, w, y: module.linear_cross_entropy(h, w, y, impl=impl))


def liger(device: torch.device):
    if device.type != "cuda":
        return "its kernels need a GPU"
    module = imported("liger_kernel.transformers.functional")
    if isinstance(module, str):
        return module
    return per_position(lambda h, w, y: module.liger_fused_linear_cross_entropy(h, w, y))


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
        peers["F.linear_cross_entropy"] = linear_cross_entropy
        if bag_size > 1:
            peers["F.linear_cross_entropy, soft targets"] = soft_targets
    else:
        peers["F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    return peers


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding_bag(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(ids, weight, mode="mean")


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
