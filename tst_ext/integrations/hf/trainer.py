"""Train both phases with the Trainer of Transformers."""

import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ... import SuperpositionSchedule
from .data import PADDING, CollateGroups, Phases, Samples, SampleStream, fold_batch, join_rows
from .model import bag_forward, check_loss_options, superpose

__all__ = ["SuperpositionCallback", "SuperpositionTrainer"]

logger = logging.getLogger(__name__)


class SuperpositionTrainer(Trainer):
    """Train the first `ratio` of the steps by TST; from the switch on this is the ordinary `transformers.Trainer`.

    A step of the superposition phase reads `bag_size` times as many tokens at the same cost. `train_dataset` has packed
    rows of L tokens. A sample is `bag_size` consecutive rows, and one row after the switch. Rows are shuffled in such
    groups; `train_sampling_strategy="sequential"` keeps their order. Without `max_steps` the run reads the rows
    `num_train_epochs` times. To Trainer the run is one epoch, so "epoch" strategies act at its end; with `ratio` 0 or
    `bag_size` 1 it is Trainer's own run. A run resumes from a checkpoint in either phase. `log_history` has `bag_size`
    and the training loss of the phase. Evaluation is next-token in both phases.

    A collator gets the rows of all samples. It may make as many rows, which are joined and folded by `fold_batch`, or
    one, as `DataCollatorWithFlattening` does for documents.

    Args:
        args, kwargs: arguments of `Trainer`. It needs a `model`, to which `superpose` is applied.
        bag_size: s. The paper's range is 4 to 8.
        ratio: r, the share of the steps in the superposition phase. The paper's range is 0.2 to 0.4.
        stages: further (ratio, bag size) stages of the superposition phase, see `SuperpositionSchedule`.
        loss_options: options of `superpose`, for the superposition phase.

    Raises:
        TypeError, ValueError: what `superpose` and `SuperpositionSchedule` refuse; model_init, label_smoothing_factor,
            compute_loss_func, ignore_data_skip, neftune_noise_alpha, split_batches, sampling by length, DataParallel,
            ZeRO-3, tensor, context or sequence parallelism, an `IterableDataset` with workers.

    Source: arXiv 2605.06546. Optimiser state and learning-rate schedule carry over at the switch.
    """

    def __init__(
        self,
        *args: Any,
        bag_size: int,
        ratio: float,
        stages: tuple[tuple[float, int], ...] = (),
        loss_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Bad numbers are refused before anything is built.
        for _, size in SuperpositionSchedule(0, ratio, bag_size, stages).stage_ends:
            if size > 1:
                check_loss_options(loss_options or {}, size)
        given = inspect.signature(Trainer).bind_partial(*args, **kwargs).arguments
        if given.get("model_init") is not None:
            raise ValueError("model_init: expected a model, which can be tried out before training")
        if given.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected none, TST has its own loss; see loss_options")
        super().__init__(*args, **kwargs)
        self.bag_size, self.ratio, self.stages, self.loss_options = bag_size, ratio, stages, loss_options or {}
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: expected 0, because it forms the logits; see loss_options")
        if self.args.n_gpu > 1:
            raise ValueError(f"args: expected one device per process (torchrun), got DataParallel on {self.args.n_gpu}")
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):  # rows have one length
            raise ValueError(f"train_sampling_strategy: expected 'random' or 'sequential', got {strategy!r}")
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("args: DeepSpeed ZeRO-3 does not gather weights for TST's ops; use FSDP2")
        if isinstance(self.train_dataset, IterableDataset) and self.args.dataloader_num_workers:
            raise ValueError("dataloader_num_workers: expected 0, because each would repeat the IterableDataset")
        if self.accelerator.split_batches:
            raise ValueError("accelerator_config: expected split_batches=False, because the batch size is per device")
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("args: expected DDP or FSDP alone, got tensor, context or sequence parallelism")
        for name in ("ignore_data_skip", "neftune_noise_alpha"):
            if getattr(self.args, name):
                raise ValueError(f"{name}: expected none, got {getattr(self.args, name)}")
        superpose(self.model, **self.loss_options)
        self.add_callback(SuperpositionCallback(self))

    @property
    def schedule(self) -> SuperpositionSchedule:
        """Return the phases, by the number of steps that `args` asks for."""
        return SuperpositionSchedule(max(0, self._steps()), self.ratio, self.bag_size, self.stages)

    def _samples_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _steps(self) -> int:
        """Return max_steps, or else the least number of steps that read the rows `num_train_epochs` times."""
        if self.args.max_steps > 0 or not has_length(self.train_dataset):
            return self.args.max_steps
        rows = math.ceil(self.args.num_train_epochs * len(self.train_dataset))
        stages = ((self.ratio, self.bag_size), *self.stages)
        mean = self._samples_per_step() * (1 + sum(r * (s - 1) for r, s in stages))
        steps = max(1, int(rows / mean) - sum(s for _, s in stages))  # the ends of stages are rounded
        while self._rows(steps) < rows:
            steps += 1
        return steps

    def _rows(self, steps: int) -> int:
        schedule = SuperpositionSchedule(steps, self.ratio, self.bag_size, self.stages)
        samples = self._samples_per_step()
        return Phases(schedule.stage_ends, samples).first_row(steps * samples)

    def _has_bags(self) -> bool:
        schedule = self.schedule
        return any(schedule.bag_size_at(end - 1) > 1 for end, _ in schedule.stage_ends if end)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Return Trainer's numbers for the steps of both phases, and leave `args` as the user has them."""
        if not self._has_bags():
            return super().set_initial_training_values(args, dataloader)
        asked, args.max_steps = args.max_steps, self.schedule.total_steps
        try:
            return super().set_initial_training_values(args, dataloader)
        finally:
            args.max_steps = asked

    def get_train_dataloader(self) -> Any:
        rows, schedule = self.train_dataset, self.schedule
        forward = bag_forward(self.model)
        if forward is None:  # restored since
            superpose(self.model, **self.loss_options)
        else:  # another trainer of the model may have given it other options
            forward.set_options(self.loss_options)
        if rows is None or not self._has_bags():
            return super().get_train_dataloader()
        phases = Phases(schedule.stage_ends, self._samples_per_step())
        columns = None  # all
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            columns = set(cast(list[str], self._signature_columns))
        if has_length(rows):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            shuffle = None if self.args.train_sampling_strategy == "sequential" else seed
            total = schedule.total_steps * self._samples_per_step()
            self.train_dataset = Samples(rows, columns, phases, total, shuffle)
        else:
            self.train_dataset = SampleStream(rows, columns, phases)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        collate = self.data_collator
        self.data_collator = CollateGroups(collate)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if isinstance(train_dataset, Samples):
            return SequentialSampler(train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        bag_size = self.schedule.bag_size_at(self.state.global_step)
        if bag_size > 1:
            objective = self.loss_options.get("objective", "mce")
            epoch_iterator = (fold_batch(join_rows(b, bag_size), bag_size, objective) for b in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens in the bags, where Trainer would count bags or empty slots."""
        ids = inputs.get("input_ids")
        if ids is not None and ids.dim() == 3 and self.args.include_num_input_tokens_seen == "non_padding":
            tokens = ids[ids != PADDING]
            inputs = dict(input_ids=tokens) | (
                dict(attention_mask=torch.ones_like(tokens)) if "attention_mask" in inputs else {}
            )
        super()._track_num_input_tokens(inputs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate the operations of a step from its positions; bags are one each."""
        ids = inputs.get("input_ids")
        if ids is not None and ids.dim() == 3:
            inputs = {**inputs, "input_ids": ids[..., 0]}
        return super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["bag_size"] = self.schedule.bag_size_at(self.state.global_step - 1)
        super().log(logs, *args, **kwargs)


class SuperpositionCallback(TrainerCallback):
    """Write a log when a stage of the superposition phase ends, so that no average of the loss mixes bag sizes."""

    def __init__(self, trainer: SuperpositionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        schedule, step = self.trainer.schedule, state.global_step
        before, after = schedule.bag_size_at(step - 1), schedule.bag_size_at(step)
        if before != after and args.logging_strategy != "no":
            control.should_log = True
            logger.info("step %d: bag size %d instead of %d", step, after, before)
        return control
