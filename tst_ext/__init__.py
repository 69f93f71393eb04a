"""Token-Superposition Training: the bag embedding and the multi-hot cross-entropy, fused.

The method is that of "Efficient Pre-Training with Token Superposition", arXiv 2605.06546. `tst_ext.ops` holds the two
operations, `tst_ext.bags` the folding of a batch into bags, `tst_ext.nn` the modules, `tst_ext.reference` the same
maths in plain torch.
"""

from . import nn as nn  # an attribute, but not of import *: it would rebind torch.nn, which users call nn
from .bags import (
    bag_entropy,
    bag_positions,
    cu_bags,
    document_offsets,
    fold_inputs,
    fold_labels,
    join_documents,
    position_weights,
    slide_labels,
)
from .ops import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from .schedule import SuperpositionSchedule
from .setup_check import check_setup

__version__ = "0.1.0"

__all__ = [
    "SuperpositionSchedule",
    "bag_embedding",
    "bag_entropy",
    "bag_positions",
    "check_setup",
    "cu_bags",
    "document_offsets",
    "fold_inputs",
    "fold_labels",
    "join_documents",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
    "position_weights",
    "slide_labels",
]
