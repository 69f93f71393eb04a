"""Teach a model of Transformers to read bags, after a trial that it is what TST needs."""

from functools import wraps
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ... import bag_embedding, fold_labels, linear_multi_hot_cross_entropy, position_weights
from ...nn import OPTIONS
from .data import PADDING

__all__ = ["restore", "superpose"]

LOSS_OPTIONS = OPTIONS - {
    "ignore_index", "reduction", "normalizer", "return_lse", "return_z_loss", "tp_group", "sequence_parallel"
}  # fmt: skip


def superpose(model: PreTrainedModel, **loss_options: Any) -> PreTrainedModel:
    """Let `model` read bags, and return it: `model(input_ids=bags, labels=bag_labels).loss` is then TST's.

    `bags` and `bag_labels`, from `fold_labels`, are `[B, l, s]`. `num_items_in_batch` is the number of labels in the
    whole batch ("mce_alt": of bags with a label). It becomes the divisor of the loss, and position weights are scaled
    to a mean of 1. Ids `[B, L]` still go the model's own way, and `save_pretrained` writes the same files.

    The head must be `softcap(hidden @ weight.T + bias)`. The model must be causal, and compute the same from
    `inputs_embeds` as from ids. Three tokens are tried out here, unless the model is on the meta device.

    Args:
        model: an `AutoModelForCausalLM`, not wrapped yet by DDP, FSDP or PEFT.
        loss_options: position_weights, objective, z_loss, label_smoothing or chunk_size of
            `linear_multi_hot_cross_entropy`.

    Raises:
        TypeError: not a `PreTrainedModel`, or an unknown option.
        ValueError: TST does not fit the head or the input of the model; the message names its class.
    """
    unknown = set(loss_options) - LOSS_OPTIONS
    if unknown:
        raise TypeError(f"superpose: expected loss options among {sorted(LOSS_OPTIONS)}, got {sorted(unknown)}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, not wrapped, got {type(model).__name__}")
    name, head = type(model).__name__, model.get_output_embeddings()
    embedding = None if model.base_model is model else model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"model: expected a decoder under a head, with an nn.Embedding, got {name}")
    if type(head) is not nn.Linear:
        raise ValueError(f"model: expected an output head of type nn.Linear, got {type(head).__name__} in {name}")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"model: the router's loss of {name} is not part of TST's: set output_router_logits=False")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"model: {name} looks up token ids in every layer, but a bag has no single id")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"model: expected {name} on one device, got hf_device_map {model.hf_device_map}")
    if embedding._forward_hooks or embedding._forward_pre_hooks:
        raise ValueError(f"model: expected no hooks on the embedding of {name}, which bags go past")
    before = vars(model).get("forward")  # of an instance that something else has patched
    if before is not None and not hasattr(before, "__func__"):
        raise ValueError(f"model: expected the forward of {name}, or a method for it, got {type(before).__name__}")
    original = cast(MethodType, model.forward).__func__
    logit_softcap = getattr(config, "final_logit_softcapping", None)
    if not head.weight.is_meta:
        _try_out(model, logit_softcap)
    weights = loss_options.get("position_weights")
    options = dict(loss_options, logit_softcap=logit_softcap, ignore_index=PADDING)

    @wraps(original)  # Trainer looks at the signature
    def forward(self: PreTrainedModel, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if input_ids is None or input_ids.dim() != 3:
            return original(self, input_ids, *args, **kwargs)
        labels = kwargs.pop("labels", None)
        kwargs.pop("shift_labels", None)  # what Trainer counts
        if args:
            raise TypeError("with bags the arguments after input_ids must be keywords")
        if labels is None or labels.shape != input_ids.shape:
            got = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels: expected those of the bags, shape {tuple(input_ids.shape)}, got {got}")
        items = kwargs.pop("num_items_in_batch", None)
        if items is not None and weights is not None:
            w = position_weights(weights, labels.shape[-1]) if isinstance(weights, str) else weights
            items = items * w.to(labels.device).float().mean()
        hidden = self.base_model(inputs_embeds=_embed(self, input_ids), use_cache=False, **kwargs)[0]
        head = self.get_output_embeddings()
        loss = linear_multi_hot_cross_entropy(hidden, head.weight, labels, bias=head.bias, normalizer=items, **options)
        return CausalLMOutput(loss=loss)

    forward.superposed = before  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `superpose` in place and return `model`.

    Raises:
        ValueError: `superpose` has not been applied, or the forward has been wrapped since.
    """
    if not hasattr(model.forward, "superposed"):
        raise ValueError("model: expected one that superpose has been applied to, with nothing around its forward")
    before = model.forward.superposed
    del model.forward
    if before is not None:
        model.forward = before
    return model


def _embed(model: PreTrainedModel, bags: Tensor) -> Tensor:
    """Embed each bag, scaled as the model's own layer does (Gemma by sqrt(d))."""
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Embedding)
    embedded = bag_embedding(bags, module.weight, padding_idx=PADDING)
    scale = getattr(module, "embed_scale", None)
    return embedded if scale is None else embedded * torch.as_tensor(scale, device=embedded.device).to(embedded.dtype)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Tell whether a differs from b by more than rounding in another order explains."""
    return a.shape != b.shape or bool((a - b).abs().max() > 8 * torch.finfo(a.dtype).eps * b.abs().max())


def _try_out(model: PreTrainedModel, logit_softcap: float | None) -> None:
    """Refuse a model whose head, input or loss is not what `superpose` takes it for."""
    name, head = type(model).__name__, model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    ids = torch.arange(3, device=weight.device).remainder(len(weight)).unsqueeze(0)
    # Hidden states that make large logits: an unknown softcap or scale would not show at those of a fresh model.
    probe = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    probe *= 50 / (weight.float().std() * weight.shape[1] ** 0.5).clamp_min(1e-6)
    reached: list[Tensor] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        reached.append(inputs[0])
        return (probe,)

    training = [module for module in model.modules() if module.training]
    hook = head.register_forward_pre_hook(replace)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            hook.remove()
            hidden = model.base_model(inputs_embeds=_embed(model, ids.unsqueeze(-1)), use_cache=False)[0]
            other = model.base_model(input_ids=ids[:, [0, 1, 1]], use_cache=False)[0]
            model.base_model(inputs_embeds=_embed(model, ids[:, :2].unsqueeze(1)), use_cache=False)  # a bag of two
            own_loss = model(input_ids=ids, labels=ids).loss
            labels = fold_labels(ids, 1, shifted=False)
            loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, logit_softcap=logit_softcap)
    except Exception as error:
        raise ValueError(f"model: {name} does not run on ids, or not on inputs_embeds: {error}") from error
    finally:
        hook.remove()
        for module in training:
            module.training = True
    expected = F.linear(probe, weight, bias)
    if logit_softcap is not None:
        expected = logit_softcap * torch.tanh(expected / logit_softcap)
    more = "does more than hidden @ weight.T + bias"
    if len(reached) != 1 or _differ(logits, expected):
        raise ValueError(f"model: the head of {name} {more} and final_logit_softcapping")
    if _differ(reached[0], hidden):
        unlike = "does not compute the same from inputs_embeds as from input_ids"
        raise ValueError(f"model: {name} {unlike}, or {more} after it")
    if _differ(other[:, :2], hidden[:, :2]):
        raise ValueError(f"model: {name} is not causal, so a bag would see its targets")
    if abs(own_loss - loss) > 16 * torch.finfo(weight.dtype).eps * own_loss:
        raise ValueError(f"model: the loss of {name} is not that of the next token: {own_loss:.4f} against {loss:.4f}")
