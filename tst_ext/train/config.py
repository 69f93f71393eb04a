"""Describe a run by typed dataclasses: the source of the command line, of TOML files and of config.json."""

import dataclasses
import json
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..bags import FITTED
from .files import UserError, check, write_text

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SuperpositionConfig",
    "TrainConfig",
    "load_config",
    "save_config",
]


def _check_integers(config: Any, low: int, *names: str) -> None:
    for name in names:
        check(name, getattr(config, name), getattr(config, name) >= low, f"an integer >= {low}")


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        if typing.get_origin(f.type) is Literal:
            choices, value = typing.get_args(f.type), getattr(config, f.name)
            check(f.name, value, value in choices, f"one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 96
    """Hidden size d."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 3
    """Query heads; dim / heads is the head size, which RoPE needs even."""
    kv_heads: int = 3
    """Key and value heads (grouped-query attention where there are fewer than query heads)."""
    ffn_dim: int = 256
    """Hidden size of the SwiGLU feed-forward layer, or of each expert; 8/3 dim is usual without experts."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head, as Qwen3 does."""
    experts: int = 0
    """Experts of each feed-forward layer, among which a router chooses for each position; 0: a dense layer."""
    experts_per_token: int = 2
    """Experts that a position chooses."""
    shared_experts: int = 0
    """Experts that every position passes through in addition."""
    balance: Literal["loss", "bias"] = "loss"
    """loss: a load-balancing loss over the whole batch keeps the experts equally busy. bias: DeepSeek-V3's correction
    of the router, without a loss."""
    balance_rate: float = 1e-2
    """Weight of that loss, or the step of that correction, in the router's logits."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_integers(self, 1, "dim", "layers", "heads", "kv_heads", "ffn_dim", "experts_per_token")
        _check_integers(self, 0, "experts", "shared_experts")
        check("heads", self.heads, self.dim % (2 * self.heads) == 0, f"heads with dim = {self.dim} / heads even")
        check("kv_heads", self.kv_heads, self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}")
        check("rope_theta", self.rope_theta, 0 < self.rope_theta < math.inf, "a number > 0")
        if self.experts:
            fits = self.experts_per_token <= self.experts
            check("experts_per_token", self.experts_per_token, fits, f"at most experts = {self.experts}")
        check("shared_experts", self.shared_experts, self.experts > 0 or not self.shared_experts, "0 without experts")
        check("balance_rate", self.balance_rate, 0 <= self.balance_rate < math.inf, "a number >= 0")


@dataclass(frozen=True)
class DataConfig:
    data: tuple[Path, ...] = ()
    """Files of text (.txt, .jsonl, .csv, .parquet, .arrow, also .gz, .zst, .xz, .bz2), folders or patterns of them; or
    one folder of tokens. Default: the source files of Python's standard library."""
    dataset: str = ""
    """In place of data: a dataset of the Hugging Face Hub by name, or the folder of one, which is streamed."""
    subset: str = ""
    """Name of the dataset's configuration, where it has several."""
    split: str = "train"
    """Split of the dataset to read; part of it is held out."""
    text_key: str = "text"
    """Key or column of the text, where documents have several."""
    vocabulary: int = 4096
    """Entries of the byte-level BPE that is trained on the text. A prepared folder has its own; of other token files
    that come without a tokenizer, ids are below it."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training a BPE; for token files, the one they were written with."""
    tokenizer_sample: int = 64_000_000
    """Characters of text, spread over the files, that the BPE is trained on."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends a document, which a given tokenizer must have; of token files without one, its id."""
    holdout: float = 0.02
    """Share of the documents held out for validation."""

    def __post_init__(self) -> None:
        check("vocabulary", self.vocabulary, 1 <= self.vocabulary <= 2**32, "an integer from 1 to 2**32")
        check("holdout", self.holdout, 0 < self.holdout < 1, "a number between 0 and 1")
        _check_integers(self, 1, "tokenizer_sample")
        check("dataset", self.dataset, not (self.dataset and self.data), "either dataset or data")
        check("subset", self.subset, bool(self.dataset) or not self.subset, "none without dataset")
        check("split", self.split, bool(self.dataset) or self.split == "train", "train without dataset")


@dataclass(frozen=True)
class SuperpositionConfig:
    bag_size: int = 4
    """s, tokens per bag in the superposition phase; the paper uses 4 to 8."""
    ratio: float = 0.2
    """r, share of the steps in the superposition phase; the paper uses 0.2 to 0.4; 0 trains the baseline."""
    stages: tuple[tuple[float, int], ...] = ()
    """Further stages of the superposition phase, coarse to fine: each a share of the steps and a bag size."""
    sides: Literal["both", "input", "output"] = "both"
    """input: reads bags, predicts the next token. output: reads tokens, predicts the next bag. The paper: both wins."""
    scale: Literal["sequence", "batch"] = "sequence"
    """sequence: a step reads sequences of s times more tokens. batch: s times more sequences of as many tokens."""
    straddle: bool = True
    """Whether a bag may hold the end of one document and the beginning of the next."""
    position_weights: Literal["uniform", "power_law", "exponential", "first", "fitted"] = "uniform"
    """Weights of the bag positions in the loss. The paper: uniform for s = 4, power_law from s = 8 on."""
    fitted: tuple[float, float, float] = FITTED
    """C0, a, k of the weights `fitted`, C0 + a * i**k; `tst fit-weights` measures them on your data."""
    objective: Literal["mce", "mce_alt"] = "mce"
    """Multi-hot cross-entropy, or the paper's sum-to-one alternative, which has no position weights."""
    reinitialise: bool = False
    """Fresh embedding and head, with fresh optimiser state, at the switch (the paper's Table 2: it loses the gain)."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_integers(self, 1, "bag_size")
        check("ratio", self.ratio, 0 <= self.ratio <= 1, "a number from 0 to 1")
        for ratio, bag_size in self.stages:
            check("stages", self.stages, 0 <= ratio <= 1 and bag_size >= 1, "pairs of a share and a bag size >= 1")
        total = self.ratio + sum(ratio for ratio, _ in self.stages)
        check("stages", self.stages, total <= 1 + 1e-9, "shares that add up to at most 1 with ratio")
        check("scale", self.scale, self.sides != "output" or self.scale == "sequence", "sequence with sides output")
        uniform = self.objective == "mce" or self.position_weights == "uniform"
        check("position_weights", self.position_weights, uniform, "uniform with objective mce_alt")
        if self.position_weights == "fitted":
            c0, a, k = self.fitted
            try:
                weights = [c0 + a * i**k for i in range(1, max(self.bag_sizes(), default=1) + 1)]
            except OverflowError:
                weights = [math.inf]
            usable = all(0 <= w < math.inf for w in weights) and weights[0] > 0
            check("fitted", self.fitted, usable, "C0, a, k with weights >= 0, and the first above 0")

    def bag_sizes(self) -> tuple[int, ...]:
        """Return the bag sizes of all stages with a share of the steps."""
        return tuple(s for ratio, s in ((self.ratio, self.bag_size), *self.stages) if ratio > 0)


@dataclass(frozen=True)
class OptimizerConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for embedding, head, gains of the norms and router."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW (betas 0.9, 0.95)."""
    muon_learning_rate: float = 2.5e-3
    """Peak learning rate of Muon (momentum 0.95), which rises and falls with the other one."""
    warmup: float = 0.1
    """Steps in which the learning rate rises to its peak: a share of all steps if below 1, else their number."""
    decay: float = 0.1
    """Share of the steps, at the end, in which it falls to zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; gains of the norms have none."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("learning_rate", "muon_learning_rate"):
            check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number > 0")
        whole = self.warmup < 1 or float(self.warmup).is_integer()
        check("warmup", self.warmup, self.warmup >= 0 and whole, "a share below 1 or a number of steps")
        share = self.warmup if self.warmup < 1 else 0
        check("decay", self.decay, 0 <= self.decay <= 1 - share, "a share from 0 to 1 - warmup")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a number >= 0")
        check("clip", self.clip, self.clip > 0, "a number > 0")

    def warmup_steps(self, steps: int) -> int:
        """Return the steps of the warm-up in a run of so many steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True)
class RunConfig:
    """Say how a run is carried out. A resumed run may change these options and no others."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int = 0
    """CPU threads of each process; 0 leaves torch's choice."""
    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """With more than one process (torchrun): parameters sharded by FSDP2, or copied by DDP."""
    micro_batch: int = 0
    """Sequences in the model at a time in each process; gradients of the parts are summed. 0: all of its share."""
    compile: bool = False
    """Compile each block of the model by torch.compile."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks for the backward pass, which computes the rest again."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept, the latest ones."""
    eval_every: int = 2000
    """Steps between validations; the last step is always validated."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (pip install tensorboard)."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_integers(self, 1, "checkpoint_every", "keep", "eval_every", "log_every")
        _check_integers(self, 0, "threads", "micro_batch")


@dataclass(frozen=True)
class TrainConfig:
    """Describe one training run. The default is a small model that shows TST's advantage on a CPU in minutes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    steps: int = 8000
    """Optimiser steps of both phases together; each costs the same FLOPs."""
    batch: int = 8
    """Sequences per step, of all processes together."""
    latent_tokens: int = 64
    """Positions of a sequence in the model: tokens, or bags in the superposition phase."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; bfloat16 is mixed precision, with float32 weights and optimiser state."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    order: Literal["epoch", "random"] = "epoch"
    """epoch: every window of the text once before any is read again. random: windows drawn with replacement."""
    eval_tokens: int = 131072
    """Held-out tokens of a validation, the same ones each time; fewer than 100,000 make comparisons noise."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_integers(self, 1, "steps", "batch", "latent_tokens", "eval_tokens")
        check("seed", self.seed, 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1")
        check("eval_tokens", self.eval_tokens, self.eval_tokens >= self.latent_tokens, "at least latent_tokens")
        # Shares add up to at most 1. Rounded they can be a step more, which the peak survives: it is the last step of
        # the warm-up and the first of the decay.
        warmup, decay = self.optimizer.warmup_steps(self.steps), round(self.optimizer.decay * self.steps)
        if self.optimizer.warmup >= 1 and warmup + decay > self.steps:
            got = f"got {warmup} and {decay} (decay = {self.optimizer.decay})"
            raise UserError(f"warmup, decay: expected at most steps = {self.steps} together, {got}")
        for s in self.superposition.bag_sizes() if self.superposition.scale == "batch" else ():
            wanted = f"a multiple of the bag size {s}, with scale batch"
            check("latent_tokens", self.latent_tokens, self.latent_tokens % s == 0, wanted)


def load_config(path: Path) -> TrainConfig:
    """Read a configuration from TOML, or from the config.json of a run. Keys left out keep their defaults.

    A config.json without `order` is read as `config_of_run` does.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"config {path}: {error}") from error
    return (config_of_run if path.suffix == ".json" else config_from_dict)(values, str(path))


def config_from_dict(values: Any, where: str) -> TrainConfig:
    """Invert `config_dict`. Raise UserError as `load_config` does, with messages that begin with `where`."""
    return _from_dict(TrainConfig, values, where)


def config_of_run(values: Any, where: str) -> TrainConfig:
    """Read the configuration that a run was saved with, as `config_from_dict` does.

    A field that it lacks is newer than the run and has its default. `order` is "random", as runs were before it.
    """
    return config_from_dict({"order": "random", **values} if isinstance(values, dict) else values, where)


def _from_dict(cls: type, values: Any, where: str) -> Any:
    check(where, values, isinstance(values, dict), "a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := [key for key in values if key not in fields]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    converted = {key: _convert(fields[key].type, value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a value of TOML or JSON to a field of type `kind`."""
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:  # __post_init__ knows the choices
        return value
    if origin is tuple:
        check(where, value, isinstance(value, list | tuple), "a list")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        check(where, value, len(value) == len(arguments), f"a list of {len(arguments)}")
        return tuple(_convert(part, item, where) for part, item in zip(arguments, value, strict=True))
    if type(None) in arguments:  # X | None
        return None if value is None else _convert(arguments[0], value, where)
    if kind is Path:
        check(where, value, isinstance(value, str), "a path")
        return Path(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    check(where, value, type(value) is kind, f"a value of type {kind.__name__}")
    return value


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the resolved configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as JSON, which `load_config` reads back to an equal one."""
    write_text(path, json.dumps(config_dict(config), indent=2) + "\n")
