"""Raise an error on a second derivative and on vmap, which are not implemented.

torch's once_differentiable does so only where the upstream gradient has a graph. A gradient penalty without one would
silently lose its gradient.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = "tst_ext: the second derivative of this operation is not implemented"


class Function(torch.autograd.Function):
    """The base of the ops' autograd Functions."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> None:  # type: ignore[override]
        names = inspect.signature(cls.forward).parameters
        batched = [name for name, dim in zip(names, in_dims, strict=True) if isinstance(dim, int)]
        given = [name for name in batched if name not in ("label_scale", "link")]  # these two follow from others
        name = ", ".join(given) or "normalizer, position_weights or label_weights"
        raise RuntimeError(
            f"{name}: expected a plain tensor, got a batch of "
            "torch.vmap, which tst_ext does not support. Pass the whole batch in one call, in leading dimensions"
        )


class _Link(torch.autograd.Function):
    """Return an empty tensor that depends on all `tensors` and keeps none of them alive."""

    generate_vmap_rule = True  # so that the op itself refuses vmap, by the name of the argument

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.count


class _First(torch.autograd.Function):
    """Return `gradient` as a function of `sources` whose own gradient is an error."""

    generate_vmap_rule = True  # for torch.func.jacrev, which maps over backward passes

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.detach() if gradient.is_sparse else gradient.view_as(gradient)  # a sparse one has no views

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(MESSAGE)


def link(*tensors: Tensor | None) -> Tensor | None:
    """Return an input for second derivatives with respect to `tensors` to flow into; None without a graph."""
    tracked = [t for t in tensors if t is not None and t.requires_grad]
    return _Link.apply(*tracked) if tracked and torch.is_grad_enabled() else None


def first_derivative(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate a `backward` whose last saved tensor is the link to the inputs."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # compiled: refuses by itself
        # Before the backward, which may overwrite what it saved. Not in vain: some hooks allow to unpack only once.
        link = ctx.saved_tensors[-1] if differentiable else None
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        sources = [t for t in (*grads, link) if differentiable and t is not None and t.requires_grad]
        if not sources:
            return gradients
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients):
            # Autograd's own vmap would drop the graph of a Function's result.
            raise RuntimeError(f"{MESSAGE}, so is_grads_batched=True does not go with create_graph=True")
        return tuple(g if g is None else _First.apply(g, *sources) for g in gradients)

    return wrapper
