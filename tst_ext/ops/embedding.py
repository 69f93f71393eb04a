"""bag_embedding: the public function, its autograd Function, and the fakes that torch.compile traces."""

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATING, INTEGER, check_integer, check_same_device, check_tensor
from ..bags import resolved_position_weights
from .second_derivative import Function, first_derivative, link


def bag_embedding(
    input_ids: Tensor,
    weight: Tensor,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    position_weights: str | Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Embed each bag as the mean (or sum) of the embeddings of its tokens.

    `out[..., :] = sum_i w_i weight[input_ids[..., i], :] / sum_i w_i` over the positions i whose id is not
    `padding_idx`, summed in float32 (float64 for float64) and rounded once. A token that occurs twice counts twice.
    Repeated calls are bitwise equal, for any number of threads. The gradient of `weight` is dense unless `sparse`.

    Args:
        input_ids: `[..., s]`, int64 or int32, each in `[0, V)` or `padding_idx`. s = 1 is an ordinary embedding.
        weight: `[V, d]`, float32, bfloat16, float16 or float64.
        mode: "mean" or "sum" (without the divisor).
        padding_idx: the id of empty slots, in or outside the vocabulary (such as -100). They count neither in the sum
            nor in the divisor, and a bag of them alone is zeros.
        position_weights: weights w_i of the bag positions, 1 by default: a name that `tst_ext.position_weights` knows,
            or a constant tensor `[s]`, finite and >= 0.
        sparse: return the gradient of `weight` as a coalesced COO tensor of the rows that any id but `padding_idx` hit,
            bitwise equal to those of the dense one, for SGD and SparseAdam. `weight` must be a leaf. Breaks the graph
            of torch.compile, and waits for a GPU to count the rows.

    Returns:
        `[..., d]` in weight's dtype.

    Raises:
        TypeError: another dtype, or a DTensor.
        ValueError: another shape, device, weight or mode; `sparse` with a weight that was computed from another tensor.
        IndexError: an id outside `[0, V)` that is not `padding_idx`; a GPU stops in torch's own check instead.
        RuntimeError: a second or forward-mode derivative, or torch.vmap, which are not implemented.

    Source: arXiv 2605.06546, the input of the superposition phase.
    """
    check_tensor("input_ids", input_ids, INTEGER)
    check_tensor("weight", weight, FLOATING)
    if input_ids.dim() < 1 or input_ids.shape[-1] < 1:
        raise ValueError(f"input_ids: expected [..., bag_size] with bag_size >= 1, got shape {tuple(input_ids.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [num_embeddings, embedding_dim], got shape {tuple(weight.shape)}")
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode: expected 'mean' or 'sum', got {mode!r}")
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx)
    check_same_device(input_ids=input_ids, weight=weight)
    weights = resolved_position_weights(position_weights, input_ids.shape[-1], weight)
    sparse = sparse and weight.requires_grad and torch.is_grad_enabled()
    apply = _apply_sparse if sparse else _BagEmbedding.apply
    return apply(input_ids, weight, mode, padding_idx, weights, sparse, link(weight))


class _BagEmbedding(Function):
    @staticmethod
    def forward(
        input_ids: Tensor,
        weight: Tensor,
        mode: str,
        padding_idx: int | None,
        position_weights: Tensor | None,
        sparse: bool,
        link: Tensor | None,
    ) -> Tensor:
        return torch.ops.tst_ext.bag_embedding(
            input_ids, weight, mode, padding_idx=padding_idx, position_weights=position_weights
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input_ids, weight, ctx.mode, ctx.padding_idx, position_weights, ctx.sparse, link = inputs
        ctx.save_for_backward(input_ids, position_weights, link)
        ctx.num_embeddings = weight.shape[0]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_ids, position_weights, _ = ctx.saved_tensors
        run = _sparse_backward if ctx.sparse else torch.ops.tst_ext.bag_embedding_backward
        gradient = run(
            grad,
            input_ids,
            ctx.num_embeddings,
            ctx.mode,
            padding_idx=ctx.padding_idx,
            position_weights=position_weights,
        )
        return None, gradient, None, None, None, None, None


@torch.compiler.disable(reason="the gradient of bag_embedding(sparse=True) has no static shape")
def _apply_sparse(input_ids: Tensor, weight: Tensor, *options: Any) -> Tensor:
    if not weight.is_leaf:  # few of torch's operations pass a sparse gradient on, and none says what is wrong
        raise ValueError(
            "sparse: expected a weight that is a leaf, got a computed one; cast or scale the output instead"
        )
    return _BagEmbedding.apply(input_ids, weight, *options)


def _sparse_backward(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    mode: str,
    *,
    padding_idx: int | None,
    position_weights: Tensor | None,
) -> Tensor:
    """Run the dense backward on a table of the rows that were hit: in order, so that their sums are the dense ones."""
    hits = input_ids if padding_idx is None else input_ids[input_ids != padding_idx]
    rows, ids = torch.unique(hits, return_inverse=True)  # sorted
    if padding_idx is not None:
        ids = torch.full_like(input_ids, -1, dtype=torch.int64).masked_scatter_(input_ids != padding_idx, ids)
        padding_idx = -1
    values = torch.ops.tst_ext.bag_embedding_backward(
        grad, ids, len(rows), mode, padding_idx=padding_idx, position_weights=position_weights
    )
    size = (num_embeddings, grad.shape[-1])
    return torch.sparse_coo_tensor(rows.long()[None], values, size, is_coalesced=True, check_invariants=False)


@torch.library.register_fake("tst_ext::bag_embedding")
def _(
    input_ids: Tensor,
    weight: Tensor,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    return weight.new_empty(*input_ids.shape[:-1], weight.shape[1])


@torch.library.register_fake("tst_ext::bag_embedding_backward")
def _(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    mode: str,
    *,
    padding_idx: int | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[-1])
