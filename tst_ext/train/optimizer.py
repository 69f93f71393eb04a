"""Set the optimiser up: the learning rate of a step, the parameter groups, and its reset at the switch."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

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
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


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
