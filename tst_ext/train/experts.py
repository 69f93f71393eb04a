"""Route each position to a few of many feed-forward networks: the mixture-of-experts layer of Qwen3.

    x -> router -> k of E experts, and their weights -> the positions sorted by expert -> two grouped GEMMs -> sums

No position is dropped and no expert has a capacity: the groups of the GEMMs have whatever length the router gives them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class Routing(NamedTuple):
    """Hold the counts and the mean probabilities of a layer's router in one forward pass."""

    counts: Tensor  # [E] int64: for each expert how many positions chose it, k * positions in all
    probabilities: Tensor  # [E]: for each expert the mean of its probability over the positions, differentiable


class Router(nn.Module):
    """Choose `experts_per_token` experts for each of `[N, d]`: their weights and indices `[N, k]`, and the routing.

    It computes in float32 or more, whatever the rest does: in bfloat16, rounding would choose among close experts.
    """

    bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen = config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.experts, config.dim))
        self.register_buffer("bias", torch.zeros(config.experts) if config.balance == "bias" else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # [N, E]
        scores = logits.detach() if self.bias is None else logits.detach() + self.bias
        chosen = scores.topk(self.chosen, sorted=False).indices
        weights = logits.gather(1, chosen).softmax(-1)  # finite even where the bias chose what is improbable
        slots = chosen.flatten()
        # scatter_add and not bincount, for which a GPU would have to wait.
        counts = torch.zeros(len(self.weight), dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, slots, torch.ones_like(slots))
        return weights, chosen, Routing(counts, logits.softmax(-1).mean(0))


class _Move(torch.autograd.Function):
    """Copy the rows `[N, d]` to their slots `[N k, d]`, sorted by expert, or add up the slots of each row: transposes.

    Autograd would add the gradients of a row by atomics, in no fixed order on a GPU; here each has its place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int, to_slots: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k, ctx.to_slots = k, to_slots
        return x[order // k] if to_slots else _sum_slots(x, order, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        moved = _sum_slots(gradient, order, ctx.k) if ctx.to_slots else gradient[order // ctx.k]
        return moved, None, None, None


def _sum_slots(slots: Tensor, order: Tensor, k: int) -> Tensor:
    unsorted = torch.empty_like(slots)
    unsorted[order] = slots
    return unsorted.unflatten(0, (-1, k)).sum(1, dtype=slots.dtype)  # or CUDA's autocast copies it to float32


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Apply `weight[e]` `[E, out, in]` to the next `counts[e]` rows of x `[rows, in]`, for each e in turn."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size % 8 == 0 for size in weight.shape[1:])  # GPUs need rows of a multiple of 16 bytes
    if x.dtype == torch.bfloat16 and (x.device.type == "cpu" or (x.is_cuda and aligned)):
        return _grouped_mm(x, weight, counts)
    return _grouped_linear_untraced(x, weight, counts)


def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


@torch.compiler.disable  # torch 2.13 traces no grouped_mm but of bfloat16, and the loop needs the counts on the host
def _grouped_linear_untraced(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float16):
        return _grouped_mm(x, weight, counts)
    return _in_a_loop(x, weight, counts)


def _in_a_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    groups = x.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight.unbind(), strict=True)])


class Experts(nn.Module):
    """Apply to each position the weighted sum of its experts, each a SwiGLU: `[B, l, d] -> [B, l, d]`, and the routing.

    As in Qwen3, the k weights are the softmax over the chosen experts alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.ffn_in = nn.Parameter(torch.empty(config.experts, 2 * config.ffn_dim, config.dim))
        self.ffn_out = nn.Parameter(torch.empty(config.experts, config.dim, config.ffn_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        rows = x.flatten(0, 1)  # [N, d]
        weights, chosen, routing = self.router(rows)
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # slot n k + i is the choice i of row n
        slots = _Move.apply(rows, order, k, True)
        gate, up = grouped_linear(slots, self.ffn_in, routing.counts).chunk(2, dim=-1)
        # Weighted before the second GEMM, where a slot has ffn_dim values, fewer than d.
        inner = F.silu(gate) * up * weights.flatten()[order, None].to(gate.dtype)
        outputs = grouped_linear(inner, self.ffn_out, routing.counts)
        return _Move.apply(outputs, order, k, False).view_as(x), routing


class Balance(nn.Module):
    """Keep the experts of each layer equally busy over the batch of all processes and of all parts of a step.

    "loss": the mean over layers of E sum_e f_e P_e, with f_e the share of positions that chose the expert e and P_e its
    mean probability; k if all are equally busy. transformers averages f and P over layers first, so that the imbalance
    of one can hide another's. f is of the batch as far as the step has come (arXiv 2501.11873).
    "bias": after each step, the bias of each expert with less than its even share rises by a fixed amount, and the bias
    of each with more falls. Experts are chosen by the logits with their biases, and weighted without them.
    DeepSeek-V3 (arXiv 2412.19437) corrects sigmoids. Probabilities have a scale of 1 / E, logits have none.
    """

    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.method, self.rate, self.chosen = config.balance, config.balance_rate, config.experts_per_token
        self.register_buffer("load", torch.zeros(config.layers, config.experts, dtype=torch.int64), persistent=False)

    def forward(self, routings: list[Routing], parts: int) -> Tensor | None:
        """Count what the routers chose, and return the part's share of the loss, a 0-d tensor, or None with "bias".

        Args:
            parts: of a step, whose gradients are added.
        """
        counts = torch.stack([routing.counts for routing in routings])  # [layers, E]
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.load += counts
        if self.method == "bias":
            return None
        frequency = self.chosen * self.load / self.load.sum(1, keepdim=True)
        probabilities = torch.stack([routing.probabilities for routing in routings])
        return self.rate / parts * self.load.shape[1] * (frequency * probabilities).sum(1).mean()

    @torch.no_grad()
    def end_step(self, routers: list[Router]) -> Tensor:
        """Return each expert's load over its even share `[layers, E]`, correct the biases, and start counting anew."""
        load = self.load / self.load.double().mean(1, keepdim=True)
        for router, busy in zip(routers, load, strict=True):
            if router.bias is not None:
                correction = torch.sign(1 - busy)
                # Their mean changes no choice, and would grow without limit.
                router.bias += self.rate * (correction - correction.mean())
        self.load.zero_()
        return load
