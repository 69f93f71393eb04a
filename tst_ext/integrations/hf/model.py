"""Teach a model of Transformers to read bags, after a trial that it is what TST needs."""

import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast
from transformers.utils import logging

from ... import (
    bag_embedding,
    fold_labels,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
    position_weights,
)
from ...nn import OPTIONS
from .data import PADDING

__all__ = ["restore", "superpose"]

logger = logging.get_logger(__name__)
LOSS_OPTIONS = OPTIONS - {
    "ignore_index", "reduction", "normalizer", "return_lse", "return_z_loss", "tp_group", "sequence_parallel"
}  # fmt: skip


def superpose(model: Any, **loss_options: Any) -> Any:
    """Let `model` read bags, and return it: `model(input_ids=bags, labels=bag_labels).loss` is then TST's.

    `bags` and `bag_labels`, from `fold_batch`, are `[B, l, s]`. `num_items_in_batch` is the number of labels in the
    whole batch ("mce_alt": of bags with a label). It becomes the divisor of the loss, and position weights are scaled
    to a mean of 1. With `output_router_logits` the loss includes the router's. Ids `[B, L]` still go the model's own
    way, and `save_pretrained` writes the same files.

    The model's loss must be the next-token loss of `softcap(head(hidden))`. If the head is an `nn.Linear` without
    hooks, its logits never exist as a whole. Another head, such as LoRA's, is called as it is. An embedding that is
    not plain is called for each token. The model must be causal, and compute the same from `inputs_embeds` as from
    ids. Three tokens are tried out here, unless the model is on the meta device.

    Args:
        model: an `AutoModelForCausalLM`, or a `PeftModel` of one; not wrapped yet by DDP, FSDP or accelerate.
        loss_options: position_weights, objective, z_loss, label_smoothing or chunk_size of
            `linear_multi_hot_cross_entropy`.

    Raises:
        TypeError: not such a model, or an unknown option.
        ValueError: a bad option, or TST does not fit the head or the input of the model; the message names its class.
    """
    unknown = set(loss_options) - LOSS_OPTIONS
    if unknown:
        raise TypeError(f"superpose: expected loss options among {sorted(LOSS_OPTIONS)}, got {sorted(unknown)}")
    check_loss_options(loss_options)
    inner = _inner(model)
    name = type(inner).__name__
    embedding = None if inner.base_model is inner else inner.get_input_embeddings()
    head = inner.get_output_embeddings()
    if embedding is None or head is None:
        raise ValueError(f"model: expected a decoder with an embedding, under an output head, got {name}")
    config = inner.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"model: {name} looks up token ids in every layer, but a bag has no single id")
    if len(set((getattr(inner, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"model: expected {name} on one device, got hf_device_map {inner.hf_device_map}")
    forward = bag_forward(inner)
    if forward is None:
        if "_original_forward" in vars(inner):  # where accelerate keeps what it has wrapped in autocast
            wrapped = f"accelerate has wrapped the forward of {name} for mixed precision, and bags would go past that"
            raise ValueError(f"model: {wrapped}: call superpose, or make the trainer, before accelerator.prepare")
        own = vars(inner).get("forward")
        if own is not None and not hasattr(own, "__func__"):  # Liger Kernel patches instances with a method
            raise ValueError(f"model: expected the forward of {name}, or a method for it, got {type(own).__name__}")
        forward = BagForward(inner, getattr(own, "__func__", None))
    if getattr(config, "output_router_logits", False) and forward.balance is not None:
        forward.router_numbers()
    if inner.device.type != "meta":
        _try_out(inner, BagForward(inner, forward.own))
    forward.set_options(loss_options)
    if "_original_forward" not in vars(inner):
        inner.forward = forward
    return model


def restore(model: Any) -> Any:
    """Undo `superpose` in place and return `model`.

    Raises:
        ValueError: `superpose` has not been applied, or the forward has been wrapped since.
    """
    inner = _inner(model)
    forward = bag_forward(inner)
    if forward is None or "_original_forward" in vars(inner):
        unwrap = "accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes accelerate's autocast off"
        raise ValueError(f"model: expected one that superpose has been applied to, with nothing around it: {unwrap}")
    del inner.forward
    if forward.own is not None:
        inner.forward = MethodType(forward.own, inner)
    return model


def check_loss_options(loss_options: dict[str, Any], bag_size: int | None = None) -> None:
    """Raise the errors of the op for the options of `superpose`; for any bag size, if None is given."""
    weights = loss_options.get("position_weights")
    if bag_size is None:
        bag_size = len(weights) if isinstance(weights, Tensor) and weights.dim() else 1
    one = torch.zeros(1, 1)
    linear_multi_hot_cross_entropy(one, one, torch.zeros(1, bag_size, dtype=torch.int64), **loss_options)


class BagForward:
    """The forward of a superposed model: TST's loss for bags, the model's own forward for token ids.

    An object in place of a closure, so that the model can be pickled and copied.
    """

    def __init__(self, model: PreTrainedModel, own: Callable | None) -> None:
        self.model = model
        self.own = own  # the function of the forward that the instance had; None: the class's
        self.balance: Any = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        self.set_options({})

    def set_options(self, loss_options: dict[str, Any]) -> None:
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        self.options = dict(loss_options, logit_softcap=cap, ignore_index=PADDING)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return (type(self.model).forward if self.own is None else self.own)(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # Trainer and generate look at it
        function = type(self.model).forward if self.own is None else self.own
        return inspect.signature(MethodType(function, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # accelerate's unwrap_model makes a method of this
            args = args[1:]
        return self._call(*args, **kwargs)

    def _call(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if input_ids is None or input_ids.dim() != 3:
            return self.original(input_ids, *args, **kwargs)
        if args:
            raise TypeError("with bags the arguments after input_ids must be keywords")
        model, kwargs = self.model, {name: value for name, value in kwargs.items() if value is not None}
        labels = kwargs.pop("labels", None)
        if labels is None or labels.shape != input_ids.shape:
            got = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels: expected those of the bags, shape {tuple(input_ids.shape)}, got {got}")
        for name in ("inputs_embeds", "past_key_values", "cache", "use_cache", "logits_to_keep"):
            value = kwargs.pop(name, 0)
            if not isinstance(value, int) or value:
                raise ValueError(f"{name}: expected nothing with bags, which are not for generating, got {value!r:.60}")
        kwargs.pop("shift_labels", None)  # for Trainer, which counts them
        items, as_tuple = kwargs.pop("num_items_in_batch", None), not kwargs.pop("return_dict", True)
        by_config = getattr(model.config.get_text_config(), "output_router_logits", False)
        routed = kwargs.pop("output_router_logits", by_config and self.balance is not None)
        if routed:
            experts, chosen, coefficient = self.router_numbers()
            kwargs["output_router_logits"] = True
        embedded = _embed(model, input_ids)
        outputs = model.base_model(inputs_embeds=embedded, use_cache=False, return_dict=True, **kwargs)
        result: Any = CausalLMOutput(loss=self._loss(outputs.last_hidden_state, labels, items))
        if routed:
            aux = self.balance(outputs.router_logits, experts, chosen, (input_ids != PADDING).any(-1))
            loss = result.loss + coefficient * aux
            result = MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux, router_logits=outputs.router_logits)
        result.hidden_states, result.attentions = outputs.get("hidden_states"), outputs.get("attentions")
        return result.to_tuple() if as_tuple else result

    def _loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        options = dict(self.options)
        weights = options.get("position_weights")
        if items is not None and weights is not None:
            w = position_weights(weights, labels.shape[-1]) if isinstance(weights, str) else weights
            items = items * w.to(labels.device).float().mean()
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear and _is_plain(head):
            return linear_multi_hot_cross_entropy(
                hidden, head.weight, labels, bias=head.bias, normalizer=items, **options
            )
        if not torch.compiler.is_compiling():
            kind = f"{type(head).__module__}.{type(head).__qualname__}"
            logger.warning_once(
                f"{type(self.model).__name__}: the output head is a {kind}, or has hooks or a quantised weight. So "
                "logits of all bags are formed at once. To avoid that, exclude it from LoRA, quantisation and float8."
            )
        options.pop("chunk_size", None)
        return multi_hot_cross_entropy(head(hidden), labels, normalizer=items, **options)

    def router_numbers(self) -> tuple[Any, ...]:
        """Return experts, experts per token and the coefficient, as the model's own forward reads them."""
        numbers = [getattr(self.model, n, None) for n in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")]
        if self.balance is None or None in numbers:
            name = type(self.model).__name__
            raise ValueError(f"model: the router's loss of {name} is not known here: set output_router_logits=False")
        return tuple(numbers)


def bag_forward(model: Any) -> BagForward | None:
    """Find the forward of a superposed model, also where accelerate has wrapped it, or made a method of it."""
    attributes = vars(_inner(model))
    forward = attributes.get("_original_forward", attributes.get("forward"))
    forward = getattr(forward, "__func__", forward)
    return forward if isinstance(forward, BagForward) else None


def _inner(model: Any) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, if there is one."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        kind = type(model.active_peft_config).__name__
        raise ValueError(
            f"model: expected an adapter in the model's layers, got {kind}: bags have no prompt before them"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model: expected a transformers PreTrainedModel or a PeftModel of one, not wrapped by DDP, FSDP or "
            f"torch.compile yet, got {type(model).__name__}"
        )
    return inner


def _hooks(module: nn.Module) -> list[Any]:
    """List the hooks, and the patched forward, that a call of the module runs."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    patched = [module.forward] if "forward" in vars(module) else []  # as accelerate's hooks do
    return patched + [hook for kind in kinds for hook in kind.values()]


def _is_plain(module: Any, hooks: int = 0) -> bool:
    """Tell whether a call of the module is what its class computes with its weight, but for a number of known hooks."""
    weight = module.weight
    known = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "placements")  # else quantised, say
    return known and len(_hooks(module)) == hooks


def _embed(model: PreTrainedModel, bags: Tensor) -> Tensor:
    """Embed each bag, as the mean of what the model's own embedding returns for its tokens: `[B, l, s] -> [B, l, d]`.

    An embedding with hooks, or LoRA's, is called with all tokens. Gradient checkpointing's hook, which makes the output
    require a gradient, is run on the bags: it alone would make the tokens' embeddings exist, s times as large.
    """
    module: Any = model.get_input_embeddings()
    makes_grad = [
        hook for hook in _hooks(module) if getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
    ]
    scale = getattr(module, "embed_scale", None)  # Gemma's sqrt(d)
    plain = type(module).forward is nn.Embedding.forward or (isinstance(module, nn.Embedding) and scale is not None)
    if plain:  # bags know none of these options
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if not plain or not _is_plain(module, len(makes_grad)):
        valid = (bags != PADDING).unsqueeze(-1)
        embedded = module(torch.where(bags == PADDING, 0, bags).flatten(1)).unflatten(1, bags.shape[1:])
        total = torch.where(valid, embedded, 0).sum(2, dtype=torch.promote_types(embedded.dtype, torch.float32))
        return (total / valid.sum(2).clamp_min(1)).to(embedded.dtype)
    embedded = bag_embedding(bags, module.weight, padding_idx=PADDING)
    if scale is not None:
        embedded = embedded * torch.as_tensor(scale, device=embedded.device).to(embedded.dtype)
    for hook in makes_grad:
        hook(module, (bags,), embedded)
    return embedded


def _differ(a: Tensor, b: Tensor) -> bool:
    """Tell whether a differs from b by more than rounding in another order explains."""
    return a.shape != b.shape or bool((a - b).abs().max() > 8 * torch.finfo(a.dtype).eps * b.abs().max())


def _try_out(model: PreTrainedModel, forward: BagForward) -> None:
    """Refuse a model whose head, input or loss is not what `superpose` takes it for."""
    name, head = type(model).__name__, cast(nn.Module, model.get_output_embeddings())
    logit_softcap = forward.options["logit_softcap"]
    ids = torch.arange(3, device=model.device).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    reached: list[tuple[Tensor, Tensor]] = []
    more = "does more than hidden @ weight.T + bias"

    def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        # Hidden states that make large logits: an unknown softcap or scale would not show at small ones.
        hidden = inputs[0]
        random = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        probe = random * 50 / cast(Tensor, module.forward(random)).std().clamp_min(1e-6)
        reached.append((hidden, probe))
        return (probe,)

    training = [module for module in model.modules() if module.training]
    hook = head.register_forward_pre_hook(replace)
    model.eval()
    try:
        with torch.no_grad():
            logits = forward.original(input_ids=ids, use_cache=False).logits
            hook.remove()
            hidden = model.base_model(inputs_embeds=_embed(model, ids.unsqueeze(-1)), use_cache=False)[0]
            other = model.base_model(input_ids=ids[:, [0, 1, 1]], use_cache=False)[0]
            model.base_model(inputs_embeds=_embed(model, ids[:, :2].unsqueeze(1)), use_cache=False)  # a bag of two
            own_loss = forward.original(input_ids=ids, labels=ids).loss
            loss = forward(ids.unsqueeze(-1), labels=fold_labels(ids, 1, shifted=False)).loss
            expected = head(reached[0][1]) if reached else logits
    except Exception as error:
        raise ValueError(f"model: {name} does not run on ids, or not on inputs_embeds: {error}") from error
    finally:
        hook.remove()
        for module in training:
            module.training = True
    if logit_softcap is not None:
        expected = logit_softcap * torch.tanh(expected / logit_softcap)
    if len(reached) != 1 or _differ(logits, expected):
        raise ValueError(f"model: the head of {name} {more} and final_logit_softcapping")
    if _differ(reached[0][0], hidden):
        unlike = "does not compute the same from inputs_embeds as from input_ids"
        raise ValueError(f"model: {name} {unlike}, or {more} after it")
    if _differ(other[:, :2], hidden[:, :2]):
        raise ValueError(f"model: {name} is not causal, so a bag would see its targets")
    # The model may round its logits to 16 bits before the loss, under autocast too, and computes the loss of float64 in
    # float32.
    rounding = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, expected.dtype, torch.float32))
    if abs(own_loss - loss) > 16 * rounding * own_loss:
        raise ValueError(f"model: the loss of {name} is not that of the next token: {own_loss:.4f} against {loss:.4f}")
