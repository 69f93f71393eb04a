"""The loss under the arguments of Liger Kernel's fused linear cross-entropy, for labels or bags of them.

Liger Kernel itself is not imported. docs/liger.md has the mapping, and that from QuACK's losses.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import linear_multi_hot_cross_entropy

__all__ = ["CrossEntropyOutput", "FusedLinearCrossEntropyLoss", "fused_linear_cross_entropy"]


class CrossEntropyOutput(NamedTuple):
    """The result with `return_z_loss`: the fields of Liger's class of this name, the last two always None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


# Options of Liger's that the loss here does not have, with their defaults, in Liger's order.
UNSUPPORTED = {
    "ce_weight": None,
    "use_token_scaling": False,
    "return_token_accuracy": False,
    "return_predicted_tokens": False,
    "chunk_mem_const": 1,
}


def _refuse(accum_dtype: torch.dtype | None, *unsupported: Any) -> None:
    """Raise ValueError for a value that the loss here does not implement."""
    if accum_dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype: expected None or torch.float32, which sums are always in, got {accum_dtype}")
    for (name, default), value in zip(UNSUPPORTED.items(), unsupported, strict=True):
        if isinstance(value, Tensor) or value != default:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: not implemented here, expected its default {default}, got {got}")


def fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Any:
    """`linear_multi_hot_cross_entropy` with the arguments of `liger_fused_linear_cross_entropy`, in its order.

    Args:
        input, weight, bias: hidden `[..., d]`, the head `[V, d]`, and its bias `[V]`.
        target: labels, `[...]`, or bags of them, `[..., s]`.
        ignore_index, label_smoothing, reduction: as in `linear_multi_hot_cross_entropy`.
        lse_square_scale, softcap: its `z_loss` and `logit_softcap`.
        return_z_loss: return a `CrossEntropyOutput`. Its `z_loss` has a gradient, Liger's has none.
        accum_dtype: None or `torch.float32`. Gradients are summed in float32 anyway (float64 for float64).
        ce_weight, use_token_scaling, return_token_accuracy, return_predicted_tokens, chunk_mem_const: their defaults.

    Returns:
        The loss, float32 (float64 for float64), a scalar or `[...]` for reduction "none"; or a `CrossEntropyOutput`.

    Raises:
        ValueError: an option that is not implemented here.
        TypeError, ValueError, IndexError: those of `linear_multi_hot_cross_entropy`, with its names.
    """
    _refuse(accum_dtype, ce_weight, use_token_scaling, return_token_accuracy, return_predicted_tokens, chunk_mem_const)
    result = linear_multi_hot_cross_entropy(
        input,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        z_loss=lse_square_scale,
        label_smoothing=label_smoothing,
        reduction=reduction,
        logit_softcap=softcap,
        return_z_loss=return_z_loss,
    )
    return CrossEntropyOutput(*result) if return_z_loss else result


class FusedLinearCrossEntropyLoss(nn.Module):
    """`fused_linear_cross_entropy` with the constructor and the call of `LigerFusedLinearCrossEntropyLoss`.

    `FusedLinearCrossEntropyLoss(...)(lin_weight, _input, target, bias=None)` takes the function's `weight` as
    `lin_weight`. Arguments and errors are the function's.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        _refuse(accum_dtype, ce_weight, use_token_scaling, return_token_accuracy, return_predicted_tokens, 1)
        super().__init__()
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        return fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
        )
