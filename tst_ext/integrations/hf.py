"""TST for Hugging Face Transformers: any decoder whose output head is a plain linear layer, and a Trainer.

`superpose(model)` teaches a model to read bags; `SuperpositionTrainer` is a `transformers.Trainer` for both phases. The
model's class, parameters and files stay what they were. Needs the extra `hf`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count, islice
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import has_length

from .. import (
    SuperpositionSchedule,
    bag_embedding,
    fold_inputs,
    fold_labels,
    linear_multi_hot_cross_entropy,
    position_weights,
)
from ..nn import OPTIONS

__all__ = ["SuperpositionCallback", "SuperpositionTrainer", "fold_batch", "restore", "superpose"]

logger = logging.getLogger(__name__)

PADDING = -100  # in empty slots of bags, of ids and labels alike
LOSS_OPTIONS = (
    OPTIONS
    - {"ignore_index", "reduction", "normalizer", "return_lse", "return_z_loss"}
    - {"tp_group", "sequence_parallel"}
)


# ---- a model ----------------------------------------------------------------------------------------------------


def superpose(model: PreTrainedModel, **loss_options: Any) -> PreTrainedModel:
    """Lets `model` read bags, in place: `model(input_ids=bags, labels=bag_labels).loss` is then TST's.

    Bags are `[B, l, s]` and labels those of `fold_labels`, `[B, l, s]`. With `num_items_in_batch`, the number of labels
    that count in the whole batch ("mce_alt": of bags that have one), the loss is their sum divided by it; position
    weights are scaled to a mean of 1. Neither the logits nor embeddings of single tokens are formed. Everything else,
    ids `[B, L]` above all, goes the model's own way, and `save_pretrained` writes what it always does.

    The head must be `logits = softcap(hidden @ weight.T + bias)`, the model causal, and the same for `inputs_embeds` as
    for ids. That is tried out here on three tokens, unless the model is on the meta device.

    Args:
        model: an `AutoModelForCausalLM`, not wrapped yet by DDP, FSDP or PEFT.
        loss_options: position_weights, objective, z_loss, label_smoothing, chunk_size or memory_budget of
            `linear_multi_hot_cross_entropy`.

    Returns:
        `model`.

    Raises:
        TypeError: not a `PreTrainedModel`, or an unknown option.
        ValueError: a head or an input that TST does not fit; names the class.
    """
    unknown = set(loss_options) - LOSS_OPTIONS
    if unknown:
        raise TypeError(f"superpose: expected loss options among {sorted(LOSS_OPTIONS)}, got {sorted(unknown)}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel that is not wrapped, got {type(model).__name__}"
        )
    name, base, head, embedding = type(model).__name__, model.base_model, model.get_output_embeddings(), None
    if base is not model:
        embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"model: expected a decoder under a head, with an nn.Embedding, got {name}")
    if type(head) is not nn.Linear:
        raise ValueError(f"model: expected an output head of type nn.Linear, got {type(head).__name__} in {name}")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"model: the router's loss of {name} is not part of TST's: set output_router_logits=False")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"model: {name} looks ids up in every layer, which a bag has no one of")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"model: expected {name} on one device, got hf_device_map {model.hf_device_map}")
    if embedding._forward_hooks or embedding._forward_pre_hooks:
        raise ValueError(f"model: expected no hooks on the embedding of {name}, which bags go past")
    before = vars(model).get("forward")  # of an instance that something else has patched
    if before is not None and not hasattr(before, "__func__"):
        raise ValueError(
            f"model: expected the forward of {name}, or a method in its place, got {type(before).__name__}"
        )
    original = cast(MethodType, model.forward).__func__
    logit_softcap = getattr(config, "final_logit_softcapping", None)
    if not head.weight.is_meta:
        _try_out(model, logit_softcap)
    weights = loss_options.get("position_weights")

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
        loss = linear_multi_hot_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            logit_softcap=logit_softcap,
            normalizer=items,
            ignore_index=PADDING,
            **loss_options,
        )
        return CausalLMOutput(loss=loss)

    forward.superposed = before  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Takes `superpose` back, in place, and returns `model`.

    Raises:
        ValueError: `superpose` has not been applied, or something has been put around it since.
    """
    if not hasattr(model.forward, "superposed"):
        raise ValueError("model: expected one that superpose has been applied to, and nothing to its forward since")
    before = model.forward.superposed
    del model.forward
    if before is not None:
        model.forward = before
    return model


def _embed(model: PreTrainedModel, bags: Tensor) -> Tensor:
    """One embedding a bag, as the model's embedding layer scales them (Gemma by sqrt(d))."""
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Embedding)
    embedded = bag_embedding(bags, module.weight, padding_idx=PADDING)
    scale = getattr(module, "embed_scale", None)
    return embedded if scale is None else embedded * torch.as_tensor(scale, device=embedded.device).to(embedded.dtype)


@contextmanager
def _in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: {type(model).__name__} does not run on ids, or not on inputs_embeds: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True


def _differ(a: Tensor, b: Tensor) -> bool:
    """By more than rounding in another order explains."""
    return a.shape != b.shape or bool((a - b).abs().max() > 8 * torch.finfo(a.dtype).eps * b.abs().max())


def _try_out(model: PreTrainedModel, logit_softcap: float | None) -> None:
    """Refuses a model whose head, input or loss is not what `superpose` takes it for."""
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

    hook = head.register_forward_pre_hook(replace)
    try:
        with _in_evaluation(model):
            logits = model(input_ids=ids, use_cache=False).logits
            hook.remove()
            hidden = model.base_model(inputs_embeds=_embed(model, ids.unsqueeze(-1)), use_cache=False)[0]
            other = model.base_model(input_ids=ids[:, [0, 1, 1]], use_cache=False)[0]
            model.base_model(inputs_embeds=_embed(model, ids[:, :2].unsqueeze(1)), use_cache=False)  # a bag of two
            own_loss = model(input_ids=ids, labels=ids).loss
            labels = fold_labels(ids, 1, shifted=False)
            loss = linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, logit_softcap=logit_softcap)
    finally:
        hook.remove()
    expected = F.linear(probe, weight, bias)
    if logit_softcap is not None:
        expected = logit_softcap * torch.tanh(expected / logit_softcap)
    if len(reached) != 1 or _differ(logits, expected):
        raise ValueError(
            f"model: the head of {name} does more than hidden @ weight.T + bias and final_logit_softcapping"
        )
    if _differ(reached[0], hidden):
        raise ValueError(
            f"model: {name} does not compute the same from inputs_embeds as from input_ids, or does more than "
            "hidden @ weight.T + bias after it"
        )
    if _differ(other[:, :2], hidden[:, :2]):
        raise ValueError(f"model: {name} is not causal, so a bag would see its targets")
    if abs(own_loss - loss) > 16 * torch.finfo(weight.dtype).eps * own_loss:
        raise ValueError(f"model: the loss of {name} is not that of the next token: {own_loss:.4f} against {loss:.4f}")


def fold_batch(batch: dict[str, Any], bag_size: int, objective: str = "mce") -> dict[str, Any]:
    """A batch as collators make it, in bags: what a model after `superpose` reads.

    Args:
        batch: input_ids `[B, L]`, labels `[B, L]` in the convention of Transformers (`labels[t]` is `input_ids[t]`, or
            -100) and, if there is one, attention_mask `[B, L]`. L need not be a multiple of s.
        bag_size: s.
        objective: that of the loss.

    Returns:
        input_ids and labels `[B, ceil(L / s), s]`, with -100 in slots of padding; attention_mask `[B, ceil(L / s)]`;
        shift_labels, where Trainer counts what `num_items_in_batch` is: the labels again, or for "mce_alt" one a bag.

    Raises:
        ValueError: the batch has other tensors, or lacks one of these.
    """
    unknown = batch.keys() - {"input_ids", "labels", "attention_mask"}
    if unknown or not {"input_ids", "labels"} <= batch.keys():
        raise ValueError(f"batch: expected input_ids, labels and perhaps attention_mask, got {sorted(batch)}")
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    short = -ids.shape[-1] % bag_size
    if mask is not None:
        ids = torch.where(mask == 0, PADDING, ids)
    ids, labels = (F.pad(t, (0, short), value=PADDING) for t in (ids, labels))
    labels = fold_labels(labels, bag_size, shifted=False, ignore_index=PADDING)
    counted = labels.amax(-1) if objective == "mce_alt" else labels
    folded = {"input_ids": fold_inputs(ids, bag_size), "labels": labels, "shift_labels": counted}
    if mask is not None:
        folded["attention_mask"] = fold_inputs(F.pad(mask, (0, short)).long(), bag_size).amax(-1)
    return folded


# ---- Trainer ----------------------------------------------------------------------------------------------------


class SuperpositionTrainer(Trainer):
    """A `transformers.Trainer` whose first `ratio` of the steps are TST's; from the switch on it is that Trainer.

    A step of the superposition phase reads `bag_size` times as many tokens at the same cost: of a `train_dataset` with
    rows of L tokens, packed, each sample is `bag_size` consecutive rows, and one row afterwards. Rows are shuffled in
    such groups (`train_sampling_strategy="sequential"` keeps their order), and `num_train_epochs` counts passes over
    them: without `max_steps`, the steps that read them so often. To Trainer the run is one epoch, so "epoch" strategies
    act at its end. It goes on from a checkpoint in either phase.

    `log_history` has the training loss of the phase and `bag_size`; a log is written at the switch, so that no average
    mixes the two losses. Evaluation is next-token in both phases.

    Args:
        args, kwargs: those of `Trainer`. A model is given as `model`; `superpose` is applied to it.
        bag_size: s. The paper's range is 4 to 8.
        ratio: r, the share of the steps in the superposition phase. The paper's range is 0.2 to 0.4.
        loss_options: those of `superpose`, for the superposition phase.

    Raises:
        TypeError, ValueError: what `superpose` and `SuperpositionSchedule` refuse; model_init, label_smoothing_factor,
            compute_loss_func, ignore_data_skip, neftune_noise_alpha, sampling by length, DataParallel, DeepSpeed
            ZeRO-3, tensor, context or sequence parallelism, an `IterableDataset` with workers.

    Source: arXiv 2605.06546. Optimiser state and learning-rate schedule carry over at the switch.
    """

    def __init__(
        self, *args: Any, bag_size: int, ratio: float, loss_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        SuperpositionSchedule(0, ratio, bag_size)  # refuses bad numbers before anything is built
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init: expected a model, which can be tried out before training")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the superposition phase has a loss of its own; see loss_options")
        super().__init__(*args, **kwargs)
        self.bag_size, self.ratio, self.loss_options = bag_size, ratio, loss_options or {}
        self.max_steps = self.args.max_steps  # as asked for
        if self.args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: it forms the logits; expected 0, and label_smoothing in loss_options for the "
                "superposition phase"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"args: expected one device a process (torchrun), got DataParallel on {self.args.n_gpu}")
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy: expected 'random' or 'sequential', rows being packed to one length, got "
                f"{self.args.train_sampling_strategy!r}"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("args: DeepSpeed ZeRO-3 gathers weights for modules, not for TST's ops; FSDP2 does both")
        if isinstance(self.train_dataset, IterableDataset) and self.args.dataloader_num_workers:
            raise ValueError("dataloader_num_workers: expected 0 for an IterableDataset, whose workers read apart")
        if self.accelerator.split_batches:
            raise ValueError(
                "accelerator_config: expected split_batches=False; per_device_train_batch_size is a device's"
            )
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "args: expected data parallelism alone (DDP or FSDP), got tensor, context or sequence parallelism"
            )
        for name in ("ignore_data_skip", "neftune_noise_alpha"):
            if getattr(self.args, name):
                raise ValueError(f"{name}: expected none, got {getattr(self.args, name)}")
        superpose(cast(PreTrainedModel, self.model), **self.loss_options)
        self.add_callback(SuperpositionCallback(self))

    @property
    def schedule(self) -> SuperpositionSchedule:
        """The phases, by the steps that `args` asks for in the end."""
        return SuperpositionSchedule(max(0, self._steps()), self.ratio, self.bag_size)

    def _samples_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _steps(self) -> int:
        if self.max_steps > 0 or not has_length(self.train_dataset):
            return self.max_steps
        rows = self.args.num_train_epochs * len(self.train_dataset)
        return max(1, int(rows / (self._samples_per_step() * (1 + self.ratio * (self.bag_size - 1)))))

    def get_train_dataloader(self) -> Any:
        rows = self.train_dataset
        if rows is None:
            return super().get_train_dataloader()
        self.args.max_steps = self._steps()  # Trainer derives the learning-rate schedule from it
        bagged = self.schedule.switch_step * self._samples_per_step()
        if has_length(rows):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            shuffle = None if self.args.train_sampling_strategy == "sequential" else seed
            total = self.args.max_steps * self._samples_per_step()
            self.train_dataset = _Samples(rows, self._columns(), self.bag_size, bagged, total, shuffle)
        else:
            self.train_dataset = _SampleStream(rows, self._columns(), self.bag_size, bagged)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _columns(self) -> set[str] | None:
        """What Trainer keeps of a row; None: everything."""
        if not self.args.remove_unused_columns:
            return None
        self._set_signature_columns_if_needed()
        return set(cast(list[str], self._signature_columns))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return SequentialSampler(train_dataset) if isinstance(train_dataset, _Samples) else None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        bag_size = self.schedule.bag_size_at(self.state.global_step)
        if bag_size > 1:
            objective = self.loss_options.get("objective", "mce")
            epoch_iterator = (fold_batch(batch, bag_size, objective) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["bag_size"] = self.schedule.bag_size_at(self.state.global_step - 1)
        super().log(logs, *args, **kwargs)


class SuperpositionCallback(TrainerCallback):
    """Writes a log when the phase ends, so that no average of the loss is of both phases."""

    def __init__(self, trainer: SuperpositionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == self.trainer.schedule.switch_step:
            control.should_log = True
            logger.info("step %d: the superposition phase ends", state.global_step)
        return control


def _join(rows: list[dict[str, Any]], columns: set[str] | None) -> dict[str, Any]:
    """One row of several: the lists or tensors of each column one after the other."""
    joined: dict[str, Any] = {}
    for name in rows[0].keys() if columns is None else rows[0].keys() & columns:
        parts = [row[name] for row in rows]
        if len(rows) == 1:
            joined[name] = parts[0]
        elif all(isinstance(part, list) for part in parts):
            joined[name] = [t for part in parts for t in part]
        else:
            try:
                joined[name] = torch.cat([torch.as_tensor(part) for part in parts])
            except (TypeError, RuntimeError) as error:
                raise TypeError(f"train_dataset: expected a list or tensor as {name!r}, got {parts[0]!r}") from error
    return joined


class _Samples(Dataset):
    """Sample i is rows of a dataset: `bag_size` of them for i < `bagged`, one afterwards; in order, pass after pass.

    A function of i alone, so that skipping to a sample, as Trainer does to go on with a run, costs nothing.
    """

    def __init__(
        self, rows: Any, columns: set[str] | None, bag_size: int, bagged: int, total: int, shuffle: int | None
    ) -> None:
        if len(rows) < bag_size:
            raise ValueError(f"train_dataset: expected at least bag_size = {bag_size} rows, got {len(rows)}")
        self.rows, self.columns, self.bag_size = rows, columns, bag_size
        self.bagged, self.total, self.shuffle = bagged, total, shuffle
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))  # of the pass that was read last

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < self.bagged:
            first, size = i * self.bag_size, self.bag_size
        else:
            first, size = self.bagged * self.bag_size + i - self.bagged, 1
        number, place = divmod(first, len(self.rows) // self.bag_size * self.bag_size)
        if self.order[0] != number:
            self.order = (number, self._order(number))
        return _join([self.rows[k] for k in self.order[1][place : place + size].tolist()], self.columns)

    def _order(self, number: int) -> Tensor:
        """The rows of pass `number`: groups in random order, as far as bags read them, then single rows."""
        s = self.bag_size
        groups = len(self.rows) // s
        if self.shuffle is None:
            return torch.arange(groups * s)
        generator = torch.Generator().manual_seed(self.shuffle + number)
        order = (torch.randperm(groups, generator=generator).unsqueeze(1) * s + torch.arange(s)).flatten()
        rest = order[min(max(0, self.bagged * s - number * len(order)), len(order)) :]
        rest.copy_(rest[torch.randperm(len(rest), generator=generator)])
        return order


class _SampleStream(IterableDataset):
    """The same for rows that come one after the other, in their order, and from the beginning when they end."""

    def __init__(self, rows: Any, columns: set[str] | None, bag_size: int, bagged: int) -> None:
        self.rows, self.columns, self.bag_size, self.bagged = rows, columns, bag_size, bagged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self._endless()
        for i in count():
            sample = list(islice(rows, self.bag_size if i < self.bagged else 1))
            if not sample:
                return
            yield _join(sample, self.columns)

    def _endless(self) -> Iterator[dict[str, Any]]:
        empty = False
        while not empty:
            empty = True
            for row in self.rows:
                empty = False
                yield row
