"""The two operations as modules that stand where `nn.Embedding` and the output `nn.Linear` of a model stand."""

import torch
from torch import Tensor
from torch import nn as torch_nn

from .ops import bag_embedding, linear_multi_hot_cross_entropy

__all__ = ["BagEmbedding", "LinearMultiHotCrossEntropy"]


class BagEmbedding(torch_nn.Embedding):
    """An `nn.Embedding` that also reads bags; parameters and state dict are those of `nn.Embedding`.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: d.
        mode: "mean" (the paper's) or "sum" over the bag.

    Shapes: ids `[B, L] -> [B, L, d]`, the ordinary embedding; ids `[B, l, s] -> [B, l, d]`, one embedding a bag.

    Raises:
        ValueError: unknown mode, or ids of another rank.
        IndexError: an id outside `[0, V)`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("mean", "sum"):
            raise ValueError(f"mode: expected 'mean' or 'sum', got {mode!r}")
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.mode = mode

    @classmethod
    def from_pretrained(  # type: ignore[override]  # nn.Embedding's other options do not apply to bags
        cls, embeddings: Tensor, freeze: bool = True, *, mode: str = "mean"
    ) -> "BagEmbedding":
        """A module around the table `embeddings` `[V, d]`, which it shares; trained only with `freeze=False`."""
        module = cls(*embeddings.shape, mode=mode, device="meta")
        module.weight = torch_nn.Parameter(embeddings, requires_grad=not freeze)
        return module

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.dim() == 2:
            return super().forward(input_ids)
        if input_ids.dim() == 3:
            return bag_embedding(input_ids, self.weight, mode=self.mode)
        raise ValueError(f"input_ids: expected [B, L] tokens or [B, l, s] bags, got shape {tuple(input_ids.shape)}")


class LinearMultiHotCrossEntropy(torch_nn.Linear):
    """An output head that computes its loss without the full logits; parameters are those of `nn.Linear`.

    `head(hidden)` returns logits `[..., V]`; `head(hidden, labels)` returns the loss of
    `linear_multi_hot_cross_entropy`. The weight lives here, so that a wrapper such as FSDP2 gathers it for the loss
    alone.

    Args:
        in_features: d.
        out_features: V.
        position_weights, ignore_index, reduction, chunk_size: as in `linear_multi_hot_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        position_weights: str | Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.position_weights = position_weights
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.chunk_size = chunk_size

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return linear_multi_hot_cross_entropy(
            hidden,
            self.weight,
            labels,
            position_weights=self.position_weights,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunk_size=self.chunk_size,
        )
