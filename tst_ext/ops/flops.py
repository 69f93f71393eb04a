"""The FLOPs of the head for torch's FlopCounterMode, which sees one op where the GEMMs are.

Row passes and embeddings count nothing, as torch's own do.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.tst_ext.linear_multi_hot_cross_entropy)
def _linear_multi_hot_cross_entropy(
    hidden: torch.Size, weight: torch.Size, *_: Any, grad_hidden: bool = False, grad_weight: bool = False, **__: Any
) -> int:
    """Count a GEMM for the logits and one for each gradient that is asked for."""
    return 2 * math.prod(hidden) * weight[0] * (1 + grad_hidden + grad_weight)
