"""The two operations as modules in the place of a model's `nn.Embedding` and output `nn.Linear`."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn as torch_nn

from .bags import check_constant_weights
from .ops import bag_embedding, linear_multi_hot_cross_entropy

__all__ = ["BagEmbedding", "LinearMultiHotCrossEntropy"]

OPTIONS = set(inspect.signature(linear_multi_hot_cross_entropy).parameters) - {
    "hidden", "weight", "labels", "bias", "label_weights", "logit_softcap"
}  # fmt: skip


class BagEmbedding(torch_nn.Embedding):
    """An `nn.Embedding` that also reads bags; parameters and state dict are those of `nn.Embedding`.

    It maps ids `[B, L] -> [B, L, d]`, as an ordinary embedding, or `[B, l, s] -> [B, l, d]`, one embedding per bag.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: d.
        mode: "mean" (the paper's) or "sum" over the bag.
        padding_idx, position_weights: as in `bag_embedding`. Unlike `nn.Embedding`'s, this `padding_idx` may lie
            outside the vocabulary, and its row, if any, is initialised as every other. The module keeps it as
            `bag_padding_idx`, and a tensor of weights as a buffer outside the state dict.
        sparse: as in `bag_embedding`.

    Raises:
        TypeError: position_weights of another dtype.
        ValueError: unknown mode, position_weights of another rank or with `requires_grad`, or ids of another rank.
        IndexError: an id outside `[0, V)` that is not `padding_idx`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        padding_idx: int | None = None,
        position_weights: str | Tensor | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("mean", "sum"):
            raise ValueError(f"mode: expected 'mean' or 'sum', got {mode!r}")
        check_constant_weights(position_weights)
        super().__init__(num_embeddings, embedding_dim, sparse=sparse, device=device, dtype=dtype)
        self.mode = mode
        # nn.Embedding's own padding_idx stays None: that is a row, which nn.Embedding and libraries fill with zeros.
        self.bag_padding_idx = padding_idx
        if isinstance(position_weights, Tensor):
            self.register_buffer("position_weights", position_weights.detach(), persistent=False)
        else:
            self.position_weights = position_weights

    @classmethod
    def from_pretrained(  # type: ignore[override]  # nn.Embedding's other options do not apply to bags
        cls, embeddings: Tensor, freeze: bool = True, **options: Any
    ) -> "BagEmbedding":
        """Share the table `embeddings` `[V, d]`, trained only with `freeze=False`; options of the constructor.

        With `freeze=False` a Parameter that is trained remains one Parameter, so a head that is tied to it stays tied.

        Raises:
            ValueError: a tensor with `requires_grad` that is no Parameter: no gradient would reach it.
        """
        trained = isinstance(embeddings, torch_nn.Parameter) and embeddings.requires_grad
        if embeddings.requires_grad and not trained:
            raise ValueError("embeddings: expected a Parameter or a constant tensor, got one with requires_grad=True")
        module = cls(*embeddings.shape, **options, device="meta")
        keep = trained and not freeze
        module.weight = embeddings if keep else torch_nn.Parameter(embeddings, requires_grad=not freeze)
        return module

    def _options(self) -> dict[str, Any]:
        return {"mode": self.mode, "padding_idx": self.bag_padding_idx, "position_weights": self.position_weights}

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.dim() == 2:
            if self.bag_padding_idx is None and not self.sparse:  # torch's sparse gradient would have a row per id
                return F.embedding(input_ids, self.weight)
            ids, padding_idx = input_ids.unsqueeze(-1), self.bag_padding_idx
            return bag_embedding(ids, self.weight, padding_idx=padding_idx, sparse=self.sparse)
        if input_ids.dim() != 3:
            raise ValueError(f"input_ids: expected [B, L] tokens or [B, l, s] bags, got shape {tuple(input_ids.shape)}")
        return bag_embedding(input_ids, self.weight, sparse=self.sparse, **self._options())

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{k}={v!r}" for k, v in self._options().items() if v is not None)])


class LinearMultiHotCrossEntropy(torch_nn.Module):
    """An output head that computes its loss without the full logits; with the parameters of `nn.Linear`.

    `head(hidden)` returns logits `[..., V]`, capped if there is a `logit_softcap`. `head(hidden, labels)` returns the
    loss of `linear_multi_hot_cross_entropy`. FSDP2 can wrap the head, and gathers its weight for the loss alone.

    It is no `nn.Linear`. Tools that exchange every `nn.Linear` for one of their own (float8, quantisers) would exchange
    the loss with it, so they pass it by. An initialiser that looks for `nn.Linear` passes it by too: name it there.

    Args:
        in_features: d.
        out_features: V.
        bias: whether the head has one.
        logit_softcap: as in `linear_multi_hot_cross_entropy`.
        options: its other options that are no tensor of the batch, such as position_weights or chunk_size. What depends
            on the batch goes to the call: `head(hidden, labels, normalizer=tokens)`.

    Raises:
        TypeError: an unknown option, or position_weights of another dtype.
        ValueError: position_weights of another rank, or with `requires_grad`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        logit_softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        unknown = set(options) - OPTIONS
        if unknown:
            raise TypeError(f"LinearMultiHotCrossEntropy: unknown option {', '.join(sorted(unknown))}")
        check_constant_weights(options.get("position_weights"))
        super().__init__()
        linear = torch_nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.weight = linear.weight
        self.bias: torch_nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.logit_softcap = logit_softcap
        self.options = options

    def forward(self, hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        cap = self.logit_softcap
        if labels is None:
            logits = F.linear(hidden, self.weight, self.bias)
            return logits if cap is None else cap * torch.tanh(logits / cap)
        options = {**self.options, **options}
        return linear_multi_hot_cross_entropy(hidden, self.weight, labels, bias=self.bias, logit_softcap=cap, **options)

    def extra_repr(self) -> str:
        sizes = dict(in_features=self.in_features, out_features=self.out_features, bias=self.bias is not None)
        cap = {} if self.logit_softcap is None else {"logit_softcap": self.logit_softcap}
        return ", ".join(f"{k}={v!r}" for k, v in (sizes | cap | self.options).items())
