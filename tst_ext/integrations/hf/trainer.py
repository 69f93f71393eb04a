"""Train both phases with the Trainer of Transformers."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ... import SuperpositionSchedule
from .data import Samples, SampleStream, fold_batch
from .model import superpose

__all__ = ["SuperpositionCallback", "SuperpositionTrainer"]

logger = logging.getLogger(__name__)


class SuperpositionTrainer(Trainer):
    """Train the first `ratio` of the steps by TST; from the switch on this is the ordinary `transformers.Trainer`.

    A step of the superposition phase reads `bag_size` times as many tokens at the same cost. `train_dataset` has packed
    rows of L tokens. A sample is `bag_size` consecutive rows, and one row after the switch. Rows are shuffled in such
    groups; `train_sampling_strategy="sequential"` keeps their order. Without `max_steps` the run reads the rows
    `num_train_epochs` times. To Trainer the run is one epoch, so "epoch" strategies act at its end. A run resumes from
    a checkpoint in either phase. `log_history` has `bag_size` and the training loss of the phase. Evaluation is
    next-token in both phases.

    Args:
        args, kwargs: arguments of `Trainer`. It needs a `model`, to which `superpose` is applied.
        bag_size: s. The paper's range is 4 to 8.
        ratio: r, the share of the steps in the superposition phase. The paper's range is 0.2 to 0.4.
        loss_options: options of `superpose`, for the superposition phase.

    Raises:
        TypeError, ValueError: what `superpose` and `SuperpositionSchedule` refuse; model_init, label_smoothing_factor,
            compute_loss_func, ignore_data_skip, neftune_noise_alpha, split_batches, sampling by length, DataParallel,
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
            raise ValueError("compute_loss_func: expected none, TST has its own loss; see loss_options")
        super().__init__(*args, **kwargs)
        self.bag_size, self.ratio, self.loss_options = bag_size, ratio, loss_options or {}
        self.max_steps = self.args.max_steps  # as asked for
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
        superpose(cast(PreTrainedModel, self.model), **self.loss_options)
        self.add_callback(SuperpositionCallback(self))

    @property
    def schedule(self) -> SuperpositionSchedule:
        """Return the phases, by the number of steps that `args` asks for."""
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
        columns = None  # all
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            columns = set(cast(list[str], self._signature_columns))
        if has_length(rows):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            shuffle = None if self.args.train_sampling_strategy == "sequential" else seed
            total = self.args.max_steps * self._samples_per_step()
            self.train_dataset = Samples(rows, columns, self.bag_size, bagged, total, shuffle)
        else:
            self.train_dataset = SampleStream(rows, columns, self.bag_size, bagged)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return SequentialSampler(train_dataset) if isinstance(train_dataset, Samples) else None

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
    """Write a log when the superposition phase ends, so that no average of the loss mixes both phases."""

    def __init__(self, trainer: SuperpositionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == self.trainer.schedule.switch_step:
            control.should_log = True
            logger.info("step %d: the superposition phase ends", state.global_step)
        return control
