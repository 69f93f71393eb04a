"""What a run is made of, as typed dataclasses: the source of the command line, of TOML files and of config.json."""

import dataclasses
import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SuperpositionConfig",
    "TrainConfig",
    "UserError",
    "check_out",
    "load_config",
    "save_config",
]


class UserError(Exception):
    """Something the user can put right; the command line prints it in one line, without a traceback."""


def _check(name: str, value: Any, valid: bool, wanted: str) -> None:
    if not valid:
        raise UserError(f"{name}: expected {wanted}, got {value!r}")


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
    """Hidden size of the SwiGLU feed-forward layer; 8/3 dim is usual."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "kv_heads", "ffn_dim"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        _check("heads", self.heads, self.dim % (2 * self.heads) == 0, f"heads with dim = {self.dim} / heads even")
        _check("kv_heads", self.kv_heads, self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}")


@dataclass(frozen=True)
class DataConfig:
    data: tuple[Path, ...] = ()
    """Files (.txt: a document; .jsonl: a document a line), folders of those, or one folder that `tst prepare` wrote.
    Default: the source files of Python's standard library."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    vocabulary: int = 4096
    """Entries of the byte-level BPE that is trained on the text; a prepared folder has its own."""
    holdout: float = 0.02
    """Share of the documents held out for validation."""

    def __post_init__(self) -> None:
        _check(
            "vocabulary", self.vocabulary, 257 <= self.vocabulary <= 2**32, "257 (the bytes and a separator) or more"
        )
        _check("holdout", self.holdout, 0 < self.holdout < 1, "a number between 0 and 1")


@dataclass(frozen=True)
class SuperpositionConfig:
    bag_size: int = 4
    """s, tokens a bag in the superposition phase; the paper uses 4 to 8."""
    ratio: float = 0.2
    """r, share of the steps in the superposition phase; the paper uses 0.2 to 0.4; 0 trains the baseline."""
    position_weights: str = "uniform"
    """Weights of the bag positions in the loss: uniform, power_law, exponential, first or fitted."""

    def __post_init__(self) -> None:
        _check("bag_size", self.bag_size, self.bag_size >= 1, "an integer >= 1")
        _check("ratio", self.ratio, 0 <= self.ratio <= 1, "a number from 0 to 1")
        names = ("uniform", "power_law", "exponential", "first", "fitted")
        _check("position_weights", self.position_weights, self.position_weights in names, f"one of {', '.join(names)}")


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW (betas 0.9, 0.95)."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises to its peak."""
    decay: float = 0.1
    """Share of the steps, at the end, over which it falls to zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; gains of the norms have none."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together."""

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "a number > 0")
        _check("warmup", self.warmup, 0 <= self.warmup <= 1, "a share from 0 to 1")
        _check("decay", self.decay, 0 <= self.decay <= 1 - self.warmup, "a share from 0 to 1 - warmup")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "a number >= 0")
        _check("clip", self.clip, self.clip > 0, "a number > 0")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The default is a small model that shows TST's advantage on a CPU in minutes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 8000
    """Optimiser steps of both phases together; each costs the same FLOPs."""
    batch: int = 8
    """Sequences a step."""
    latent_tokens: int = 64
    """Positions a sequence has in the model: tokens, or bags in the superposition phase."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    eval_every: int = 2000
    """Steps between validations; the last step is always validated."""
    eval_tokens: int = 131072
    """Held-out tokens of a validation, the same ones each time; fewer than 100,000 make comparisons noise."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int = 0
    """CPU threads of this process; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "latent_tokens", "eval_every", "eval_tokens", "log_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1")
        _check("threads", self.threads, self.threads >= 0, "an integer >= 0")
        _check("eval_tokens", self.eval_tokens, self.eval_tokens >= self.latent_tokens, "at least latent_tokens")


def check_out(folder: Path) -> None:
    """Checks, before any work is done, that `folder` can be made or is an empty one.

    Raises:
        UserError: it holds something, is a file, or lies where nothing can be written.
    """
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"out {folder}: {existing} is not a folder that can be written to")
    if existing == folder and any(folder.iterdir()):
        raise UserError(f"out {folder}: the folder is not empty; choose another or remove it")


def load_config(path: Path) -> TrainConfig:
    """Reads a configuration from TOML, or from the config.json of a run. Keys left out keep their defaults.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"config {path}: {error}") from error
    return _from_dict(TrainConfig, values, str(path))


def _from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(fields)}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            arguments[key] = _from_dict(kind, value, f"{where}: {key}")  # type: ignore[arg-type]
        elif key == "data":
            _check(f"{where}: data", value, isinstance(value, list | tuple), "a list of paths")
            arguments[key] = tuple(Path(p) for p in value)
        else:
            number = kind is float and isinstance(value, int)
            right = (isinstance(value, kind) or number) and not isinstance(value, bool)  # type: ignore[arg-type]
            _check(f"{where}: {key}", value, right, f"a value of type {kind.__name__}")  # type: ignore[union-attr]
            arguments[key] = float(value) if number else value
    return cls(**arguments)


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration as JSON, which `load_config` reads back to an equal one."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n", encoding="utf-8")
