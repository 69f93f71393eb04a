"""TST in TorchTitan: Llama 3, Qwen3 and DeepSeek-V3, its data, checkpoints, FSDP2, tensor and expert parallelism.

`superpose(config)` exchanges the embedding, the output head, the loss and the trainer in a config of TorchTitan, and
the model where it has multi-token prediction. Parameters keep their names. Needs the extra `torchtitan`.

    torchrun --nproc-per-node=8 -m torchtitan.train --module tst_ext.integrations.torchtitan --config llama3_8b \\
        --parallelism.spmd_backend partial_dtensor --superposition.bag_size 6 --superposition.ratio 0.3
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import Embedding, Linear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, MTPLoss
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3
from torchtitan.models.deepseek_v3.mtp import roll_mtp_sequence
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3
from torchtitan.trainer import Trainer

from .. import SuperpositionSchedule, bag_embedding, fold_inputs, fold_labels, linear_multi_hot_cross_entropy
from .. import position_weights as named_position_weights
from .._checks import check_integer
from ..ops.loss import LossOptions, checked_options

__all__ = ["BagEmbedding", "LossHead", "MultiTokenModel", "SuperpositionLoss", "SuperpositionTrainer", "superpose"]

Batch: TypeAlias = tuple[dict[str, Tensor], Tensor]  # inputs and labels
logger = logging.getLogger(__name__)


class BagEmbedding(Embedding):
    """TorchTitan's embedding of ids `[B, L]` or bags `[B, l, s]`, also where the vocabulary is divided."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return super().forward(input)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if self.tp_group is None:
            return bag_embedding(input, weight)
        # This process's rows of the table, as the superclass has them; TorchTitan adds up what the processes return.
        first = dist.get_rank(self.tp_group) * -(-self.num_embeddings // dist.get_world_size(self.tp_group))
        own = torch.where((input >= first) & (input < first + len(weight)), input - first, -1)
        return bag_embedding(own, weight, mode="sum", padding_idx=-1) / input.shape[-1]


class LossHead(Linear):
    """TorchTitan's output head, which returns the loss if it is given labels, and else logits.

    `head(hidden, labels=..., **options)` calls `linear_multi_hot_cross_entropy` inside its forward, where FSDP2 has the
    weight whole. The processes of tensor parallelism are the `tp_group`. `further` pairs of hidden states and labels
    add `further_scale` times their losses.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(
        self,
        input: Tensor,
        *,
        labels: Tensor | None = None,
        further: Sequence[tuple[Tensor, Tensor]] = (),
        further_scale: float = 1.0,
        **options: Any,
    ) -> Tensor:
        if labels is None:
            return super().forward(input)
        weight, bias, group = self.weight, self.bias, None
        if isinstance(weight, DTensor):
            if weight.placements != (Shard(0),):
                raise ValueError(f"lm_head.weight: expected it whole or [Shard(0)] over tp, got {weight.placements}")
            group = weight.device_mesh.get_group()
            weight, bias = (t if t is None else t.to_local() for t in (weight, bias))
        losses = []
        for hidden, y in ((input, labels), *further):  # in one forward: FSDP2 gathers and reduces the weight once
            if isinstance(hidden, DTensor):
                if not all(placement.is_replicate() for placement in hidden.placements):
                    raise ValueError(f"lm_head: expected hidden states that are whole over tp, got {hidden.placements}")
                hidden = hidden.to_local()
            losses.append(linear_multi_hot_cross_entropy(hidden, weight, y, bias=bias, tp_group=group, **options))
        return losses[0] + further_scale * sum(losses[1:]) if further else losses[0]


class MultiTokenModel(DeepSeekV3Model):
    """DeepSeek-V3 with TorchTitan's multi-token prediction, whose depth k reads and predicts k bags further on.

    In training it returns a list of hidden states `[B, l, d]`, first for the next bag. In evaluation it is the
    model without its `mtp_layers`. Ids `[B, l]` are bags of one.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(DeepSeekV3Model.Config):
        pass

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Any:
        if not self.training:
            return Decoder.forward(self, tokens, positions, attention_masks)
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = layer(hidden, attention_masks, positions)
        outputs = [self.norm(hidden)]
        for depth, layer in enumerate(self.mtp_layers, 1):
            further, valid = shift_bags(tokens, depth, positions, 0)
            hidden = layer(self.tok_embeddings(further), hidden, valid, attention_masks, positions)
            outputs.append(hidden)
        return outputs


def shift_bags(bags: Tensor, depth: int, positions: Tensor | None, filler: int) -> tuple[Tensor, Tensor]:
    """Move bags `[B, l, s]`, or `[B, l]`, `depth` places to the left; also return where there was one, `[B, l]` bool.

    TorchTitan's rule: `filler` stands where a document or row ends before. Its own function has no third dimension.
    """
    if bags.dim() == 2:
        return roll_mtp_sequence(bags, shift=depth, positions=positions, fill_value=filler, return_valid_mask=True)
    slots = [shift_bags(slot, depth, positions, filler) for slot in bags.unbind(-1)]
    return torch.stack([slot for slot, _ in slots], dim=-1), slots[0][1]


class SuperpositionLoss(ChunkedLossWrapper):
    """The loss of both phases and of validation, from hidden states, by a `LossHead`.

    The trainer hands the head and the hidden states to a ChunkedLossWrapper. This one chunks inside the op.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        position_weights: str | None = None
        """Weights of the bag positions by name, see tst_ext.position_weights; scaled to a mean of 1."""

        objective: str = "mce"
        """'mce', multi-hot cross-entropy, or 'mce_alt', the sum-to-one variant, one loss per bag."""

        z_loss: float = 0.0
        """Add z_loss * lse^2 for each label."""

        chunk_size: int | None = None
        """The most rows whose logits exist at a time."""

        mtp_scale: float = 0.3
        """Multi-token prediction: weight of the mean over its depths; the loss of the next bag has 1."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        weights = config.position_weights
        checked_options(LossOptions(config.objective, IGNORE_INDEX, None, config.z_loss), weights)
        if weights is not None:
            named_position_weights(weights, 1)
        if config.chunk_size is not None:
            check_integer("chunk_size", config.chunk_size, 1)
        if not 0 <= config.mtp_scale < math.inf:
            raise ValueError(f"mtp_scale: expected a finite number >= 0, got {config.mtp_scale}")
        self.config = config
        self.lm_head: torch.nn.Module | None = None

    def __call__(
        self,
        pred: Tensor | list[Tensor],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over labels `[B, l]` or `[B, l, s]` of hidden states `pred` `[B, l, d]`, over `global_valid_tokens`.

        A list, from a `MultiTokenModel`, adds `mtp_scale` times the mean loss of its depths, which predict
        later bags. Without `global_valid_tokens`, in validation, it is the next token's loss alone.
        """
        assert self.lm_head is not None
        config, validates = self.config, global_valid_tokens is None
        divisor: Any = 1 if validates else global_valid_tokens
        options: dict[str, Any] = dict(chunk_size=config.chunk_size, ignore_index=IGNORE_INDEX)
        options["z_loss"] = 0.0 if validates else config.z_loss
        if labels.dim() == 3:
            bag_size = labels.shape[-1]
            options["objective"] = config.objective
            if config.objective == "mce_alt":
                divisor = divisor / bag_size  # bags, but for those at the end of a row, which have fewer labels
            if config.position_weights is not None:
                weights = named_position_weights(config.position_weights, bag_size, device=labels.device)
                options["position_weights"] = weights / weights.mean()
        hidden, *depths = pred if isinstance(pred, list) else [pred]
        if depths and not validates:
            options["further_scale"] = config.mtp_scale / len(depths)
            options["further"] = [
                (further, shift_bags(labels, depth, positions, IGNORE_INDEX)[0])
                for depth, further in enumerate(depths, 1)
            ]
        return self.lm_head(hidden, labels=labels, normalizer=divisor, **options), {}


class SuperpositionTrainer(Trainer):
    """TorchTitan's trainer in two phases. From the switch on only the loss op differs from TorchTitan's own.

    In the superposition phase the rows of a batch have `training.seq_len` bags, s times as many tokens. The data stream
    resumes at the switch, and from checkpoints of either phase. A bag's position is its number in its document, which
    begins at the bag with its first token. `tps` and MFU count bags, `n_tokens_seen` counts tokens.
    """

    @dataclass(kw_only=True, slots=True)
    class Superposition:
        bag_size: int = 6
        """s, tokens per bag; the paper's range is 4 to 8"""

        ratio: float = 0.3
        """r, the share of training.steps in the superposition phase; the paper's range is 0.2 to 0.4"""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        superposition: "SuperpositionTrainer.Superposition" = field(
            default_factory=lambda: SuperpositionTrainer.Superposition()
        )

    def __init__(self, config: Config) -> None:
        phases, parallelism, data = config.superposition, config.parallelism, config.dataloader
        self.schedule = SuperpositionSchedule(config.training.steps, phases.ratio, phases.bag_size)
        for name in ("pipeline_parallel_degree", "context_parallel_degree"):
            if getattr(parallelism, name) > 1:
                raise ValueError(f"parallelism.{name}: expected 1, got {getattr(parallelism, name)}")
        if not config.training.disable_cuda_graphs:
            raise ValueError("training.disable_cuda_graphs: expected True: shapes change at the switch")
        backend, degree = parallelism.spmd_backend, parallelism.tensor_parallel_degree
        if backend == "full_dtensor" or (backend == "spmd_types" and degree > 1):
            wanted = "'partial_dtensor', or 'spmd_types' without tensor parallelism"
            got = f"{backend!r} with tensor_parallel_degree {degree}"
            raise ValueError(f"parallelism.spmd_backend: expected {wanted}, got {got}")
        if config.debug.spmd_typechecking:
            raise ValueError("debug.spmd_typechecking: expected False: the ops have no spmd types")
        if not isinstance(config.loss, SuperpositionLoss.Config):
            got = type(config.loss).__qualname__
            raise ValueError(f"loss: expected SuperpositionLoss.Config, got {got}; use superpose")
        model: Any = config.model_spec.model
        if getattr(model, "mtp_layers", None) and not isinstance(model, MultiTokenModel.Config):
            got = type(model).__qualname__
            raise ValueError(f"model_spec.model: with mtp_layers, expected MultiTokenModel.Config, got {got}")
        if type(data) is not HuggingFaceTextDataLoader.Config or data.num_workers:  # whose row length can change
            got = f"{type(data).__qualname__} with num_workers={getattr(data, 'num_workers', 0)}"
            raise ValueError(f"dataloader: expected a HuggingFaceTextDataLoader with num_workers=0, got {got}")
        super().__init__(config)
        for name, ours in (("tok_embeddings", BagEmbedding), ("lm_head", LossHead)):
            module = getattr(self.model_parts[0], name)  # built, because --override.imports may have exchanged it
            if not isinstance(module, ours):
                wanted = f"a {ours.__qualname__} (by superpose, without an override)"
                raise ValueError(f"model_spec.model.{name}: expected {wanted}, got {type(module).__qualname__}")
        self.dataset: Any = self.dataloader.dataset  # type: ignore[attr-defined]

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        step = self.step - 1  # TorchTitan counts from 1
        if step == self.schedule.switch_step:
            logger.info("step %d: the superposition phase has ended", self.step)
        self.dataset.seq_len = self.schedule.bag_size_at(step) * self.config.training.seq_len
        super().train_step(data_iterator)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        for inputs, labels in super().batch_generator(data_iterable):
            bag_size = labels.shape[-1] // self.config.training.seq_len
            if bag_size > 1:
                self.metrics_processor.ntokens_since_last_log -= labels.numel() - labels.numel() // bag_size
                inputs, labels = fold_batch(inputs, labels, bag_size)
            yield inputs, labels


def fold_batch(inputs: dict[str, Tensor], labels: Tensor, bag_size: int) -> Batch:
    """Fold a batch of TorchTitan's dataloader: input, labels `[B, L]` to `[B, l, s]`, positions to `[B, l]`, all int64.

    TorchTitan's labels are shifted already, inside documents. Positions begin at 0 with each document.

    Raises:
        ValueError: the batch has other inputs than input and positions.
    """
    if inputs.keys() - {"input", "positions"}:
        raise ValueError(f"dataloader: expected input and perhaps positions, got {sorted(inputs)}")
    folded = {"input": fold_inputs(inputs["input"], bag_size)}
    if "positions" in inputs:
        starts = (fold_inputs(inputs["positions"], bag_size) == 0).any(-1)
        number = torch.arange(starts.shape[-1]).expand(starts.shape)
        folded["positions"] = number - torch.where(starts, number, 0).cummax(-1).values
    return folded, fold_labels(labels, bag_size, shifted=True, ignore_index=IGNORE_INDEX)


def superpose(config: Trainer.Config, *, bag_size: int = 6, ratio: float = 0.3, **loss: Any) -> Any:
    """Make a `SuperpositionTrainer.Config` of a config of TorchTitan's trainer. CUDA graphs are turned off.

    Args:
        config: from a config registry, of a model whose embedding and output head are TorchTitan's plain ones, tied or
            not, such as Llama 3, Qwen3 and DeepSeek-V3. Multi-token prediction only of DeepSeek-V3.
        bag_size, ratio: s and r; also `--superposition.bag_size` and `--superposition.ratio`.
        loss: fields of `SuperpositionLoss.Config`; by default mtp_scale is the config's.

    Raises:
        ValueError: a config of another trainer, or of a model whose embedding or head is not plain, or that is another
            one with multi-token prediction.
    """
    if type(config) is not Trainer.Config or config.model_spec is None:
        raise ValueError(f"config: expected a Trainer.Config with a model_spec, got {type(config).__qualname__}")
    model: Any = copy.deepcopy(config.model_spec.model)
    for name, plain, ours in (
        ("tok_embeddings", Embedding.Config, BagEmbedding.Config),
        ("lm_head", Linear.Config, LossHead.Config),
    ):
        given = getattr(model, name, None)
        if type(given) is not plain:
            raise ValueError(f"config: expected {name} to be a {plain.__qualname__}, got {type(given).__qualname__}")
        setattr(model, name, ours(**_fields(given)))
    if getattr(model, "mtp_layers", None):
        if type(model) is not DeepSeekV3Model.Config:
            got = type(model).__qualname__
            raise ValueError(f"config: with mtp_layers, expected a DeepSeekV3Model.Config, got {got}")
        model = MultiTokenModel.Config(**_fields(model))
        if isinstance(config.loss, MTPLoss.Config):
            loss = {"mtp_scale": config.loss.mtp_scale} | loss
    options = _fields(config) | {
        "model_spec": dataclasses.replace(config.model_spec, model=model),
        "loss": SuperpositionLoss.Config(**loss),
        "training": dataclasses.replace(config.training, disable_cuda_graphs=True),
        "superposition": SuperpositionTrainer.Superposition(bag_size=bag_size, ratio=ratio),
    }
    return SuperpositionTrainer.Config(**options)


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def _superposed(plain: Callable[[], Trainer.Config]) -> Callable[[], Any]:
    return lambda: superpose(plain())


# The names that --config takes.
llama3_debugmodel = _superposed(llama3.llama3_debugmodel)
llama3_8b = _superposed(llama3.llama3_8b)
qwen3_debugmodel = _superposed(qwen3.qwen3_debugmodel)
qwen3_0_6b = _superposed(qwen3.qwen3_0_6b)
qwen3_moe_debug = _superposed(qwen3.qwen3_moe_debug)
qwen3_30b_a3b = _superposed(qwen3.qwen3_30b_a3b)
deepseek_v3_debugmodel = _superposed(deepseek_v3.deepseek_v3_debugmodel)
deepseek_v3_debugmodel_mtp = _superposed(deepseek_v3.deepseek_v3_debugmodel_mtp)
deepseek_v3_16b = _superposed(deepseek_v3.deepseek_v3_16b)
deepseek_v3_671b = _superposed(deepseek_v3.deepseek_v3_671b)
