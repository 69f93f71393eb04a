"""Set the optimiser up, AdamW or Muon with it: the learning rate of a step, the groups, and its reset at the switch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from .config import OptimizerConfig
from .model import Transformer, initial_std


def learning_rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """Return the rate at `step` (0-based), Warmup-Stable-Decay: linear to the peak, flat, linear to zero past the end.

    The phase switch does not appear here: the schedule runs through it (arXiv 2605.06546).
    """
    warmup = config.warmup_steps(steps)
    decay = round(config.decay * steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / decay if steps - step <= decay else 1.0
    return config.learning_rate * min(rise, fall)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Give the matrices, embedding and head among them, weight decay, and the gains of the norms none.

    Embedding and head are untied and feed normalised layers, so their scale carries nothing and decay bounds it, as it
    does for the other matrices. Shrinking a gain instead would shrink the signal.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of `config`. The rate of each group is `learning_rate` times the group's `lr_scale`."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return _adamw(groups)
    # The router is a small head over the experts, and stays with AdamW as the head does.
    named = model.named_parameters()
    hidden = {p: None for n, p in named if n.startswith("blocks.") and ".router." not in n and p.dim() >= 2}
    groups[0]["params"] = [p for p in groups[0]["params"] if p not in hidden]
    scale = config.muon_learning_rate / config.learning_rate
    return Muon({"params": list(hidden), "weight_decay": config.weight_decay, "lr_scale": scale}, groups)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


class Muon(torch.optim.Optimizer):
    """Update the group `matrices` by Muon and the groups `others` by AdamW.

    A parameter of `matrices` is one matrix `[m, n]` or a stack `[..., m, n]`, each of whose matrices is orthogonalised
    by itself. The update is the one of torch.optim.Muon, which takes no stacks and does not take all of FSDP2's shards:
    momentum 0.95 (Nesterov), Newton-Schulz, and a rate that is sqrt(m / n) times as large where m > n.

    All groups are in `param_groups`, and the state of all parameters is in `state`.
    """

    def __init__(self, matrices: dict[str, Any], others: list[dict[str, Any]]) -> None:
        super().__init__([matrices], {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95})
        self.matrices = self.param_groups[0]
        self.adamw = _adamw(others)
        self.adamw.state = self.state
        self.param_groups += self.adamw.param_groups  # the same objects, so what is set here holds there

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.adamw.step()
        rate, decay, momentum = (self.matrices[name] for name in ("lr", "weight_decay", "momentum"))
        for parameter in self.matrices["params"]:
            if parameter.grad is None:
                continue
            state, (m, n) = self.state[parameter], parameter.shape[-2:]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            update = orthogonalised(parameter.grad.lerp(average, momentum))
            parameter.mul_(1 - rate * decay).add_(update, alpha=-rate * max(1, m / n) ** 0.5)


def orthogonalised(x: Tensor) -> Tensor:
    """Return `newton_schulz` of the whole matrices of a tensor `[..., m, n]`, sharded as the tensor is."""
    # A CPU computes in float32: without instructions for bfloat16 the matrices of the default model take 66 ms in it,
    # 25 in float32, and forward and backward pass 80.
    x = x if x.device.type == "cpu" else x.bfloat16()
    if not isinstance(x, DTensor):
        return newton_schulz(x)
    # FSDP2 divides the first dimension: the rows of a matrix, but whole matrices of a stack, of which it leaves a
    # process none where there are fewer than processes.
    gathered = x.redistribute(placements=[Replicate()]) if x.dim() == 2 else x
    local = newton_schulz(gathered.to_local())
    update = DTensor.from_local(local, x.device_mesh, gathered.placements, shape=x.shape, stride=x.stride())
    return update.redistribute(placements=x.placements)


def newton_schulz(x: Tensor) -> Tensor:
    """Bring the singular values of each matrix `[..., m, n]` near 1: 0.68 to 1.14 from about 0.01 of its norm on.

    Five steps of the quintic iteration of Keller Jordan's Muon, with its constants (torch.optim.Muon has the same).
    """
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT
    stack = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).reshape(-1, *x.shape[-2:])
    for _ in range(5):
        gram = stack @ stack.mT  # the smaller one, [..., m, m] for m <= n
        # baddbmm rounds a sum once: in bfloat16 the result is 1.4 % off, and 3.3 % with a rounding per operation.
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        stack = torch.baddbmm(stack, polynomial, stack, beta=3.4445)
    return stack.reshape(x.shape)


@torch.no_grad()
def reinitialise(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Make embedding and head those of a fresh model, and forget their gradients: the paper's Table 2."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("embedding.weight", "head.weight"):
        parameter = model.get_parameter(name)
        fresh = torch.empty(parameter.shape).normal_(std=initial_std(name, 1), generator=generator)
        fresh = fresh.to(parameter.device)
        if isinstance(parameter, DTensor):
            fresh = distribute_tensor(fresh, parameter.device_mesh, parameter.placements)
        parameter.copy_(fresh)
        for value in optimizer.state[parameter].values():
            value.zero_()
