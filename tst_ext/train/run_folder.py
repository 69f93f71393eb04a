"""Lock the folder of a run, and write everything in it but metrics and checkpoints."""

import glob
import json
import os
import platform
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .. import __version__
from . import checkpoint
from .config import TrainConfig, config_dict, config_of_run, load_config, save_config
from .data import has_tokens, load_tokenizer
from .distributed import Processes
from .files import UserError, check_out, lock, sync, write_text
from .model import Transformer
from .past import LENGTH, check_past
from .plot import plot_losses


class RunFolder(ExitStack):
    """Keep a folder locked for one run, until this context ends. Only the first process touches it."""

    def __init__(self, path: Path, processes: Processes) -> None:
        super().__init__()
        self.path, self.processes = path, processes
        self.lock: int | None = None

    def open(self, config: TrainConfig, resume: str) -> checkpoint.Found | None:
        """Return the checkpoint to resume from, None to begin. Write nothing.

        Raises:
            UserError: the folder holds something else than a run of this configuration, cannot be written to, or
                another process trains in it; the checkpoint cannot be used; the run's data is no longer where it was.
        """

        def enter() -> None:
            if resume == "never" or not (self.path / "config.json").exists():
                check_out(self.path)
            if self.path.exists():
                self._claim()
            if (self.path / "config.json").exists():
                _check_place(config)

        def begin() -> None:
            if (self.path / "config.json").exists():
                self._compare(self.path, load_config(self.path / "config.json"), config)
                print(f"{self.path} has no checkpoint yet: starts at step 0", file=sys.stderr)

        self.processes.first_only(enter)
        found = None if resume == "never" else checkpoint.choose(self.path, resume, self.processes)
        if found is None:
            self.processes.first_only(begin)
        return found

    def _claim(self) -> None:
        self.lock = lock(self.path)
        if self.lock is None:
            raise UserError(f"out {self.path}: another process trains in this folder")
        self.callback(os.close, self.lock)

    def check_same(self, found: checkpoint.Found, identity: dict[str, Any], tokens: int) -> None:
        """Raise UserError unless a checkpoint is of this configuration and data, whose training shard has `tokens`.

        The section `run` may differ, and the place of the data: checksums tell whether it is the same. The number of
        steps may differ where `check_past` allows it.
        """
        saved, now = (config_of_run(values["config"], str(found.path)) for values in (found.manifest, identity))
        self._compare(found.path, saved, now)
        for name in identity.keys() - {"config"}:
            if found.manifest[name] != identity[name]:
                other = _other(name, found.manifest[name], identity[name])
                raise UserError(f"resume: {found.path} was trained on {other}")
        check_past(found.path, found.manifest["step"], saved, now, tokens)

    def _compare(self, path: Path, saved: TrainConfig, config: TrainConfig) -> None:
        before, now = _flat(config_dict(saved)), _flat(config_dict(config))
        for name in before:
            if not name.startswith(("run.", "data.")) and name not in LENGTH and before[name] != now[name]:
                values = f"{path} has {name} = {before[name]!r}, this run {now[name]!r}"
                may = "the section run, the place of the same data and the number of steps"
                raise UserError(f"resume: {values}; only {may} may change")

    def begin(
        self, config: TrainConfig, found: checkpoint.Found | None, tokenizer: Path | None, facts: dict[str, Any]
    ) -> None:
        """Write config.json, environment.json and tokenizer.json, and set aside checkpoints after the one found.

        Remove the results of a run that has steps left.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.lock is None:
            self._claim()
            check_out(self.path)  # another run may have come and gone meanwhile
        if found is None:
            self._check_facts(facts)
        if found is None or found.manifest["step"] < config.steps:
            # First, so that the result of a shorter run never stands next to the configuration of a longer one.
            for name in ("result.json", "loss.png"):
                (self.path / name).unlink(missing_ok=True)
            sync(self.path)
        save_config(config, self.path / "config.json")
        versions = {
            "tst_ext": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
        }
        write_text(self.path / "environment.json", json.dumps({**versions, **facts}, indent=2) + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, self.path / "tokenizer.json")
        if found:
            checkpoint.set_aside_after(found.path)
            print(f"resumes from {found.path}", file=sys.stderr)
        sync(self.path)

    def _check_facts(self, facts: dict[str, Any]) -> None:
        """Raise UserError if a run that has no checkpoint yet began on other data."""
        try:
            text = (self.path / "environment.json").read_text(encoding="utf-8")
            before = {name: json.loads(text)[name] for name in ("vocabulary", "data", "held_out")}
        except (OSError, ValueError, LookupError, TypeError):  # it died before it had one
            return
        for name, value in before.items():
            if value != facts[name]:
                raise UserError(f"resume: {self.path} began on {_other(name, value, facts[name])}")

    def end(self, result: dict[str, Any]) -> None:
        """Write loss.png and result.json."""
        if self.processes.first:
            plot_losses({"run": self.path}, self.path / "loss.png")
            write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")


@dataclass(frozen=True)
class LoadedRun:
    """Hold a run's model as of a checkpoint, for use."""

    config: TrainConfig  # with the default optimizer
    model: Transformer  # on the CPU
    tokenizer_path: Path | None  # None if the data came without a tokenizer
    end_of_text: int | None  # id of the token that ends a document
    step: int

    def tokenizer(self) -> Tokenizer:
        """Read the run's tokenizer; raise UserError if it has none."""
        if self.tokenizer_path is None:
            raise UserError("run: its data came without a tokenizer.json, so it reads and writes ids, not text")
        return load_tokenizer(self.tokenizer_path)


def load_run(path: Path, which: str = "auto") -> LoadedRun:
    """Read the run in folder `path` at a checkpoint: "auto", the latest, or one by name.

    Raises:
        UserError: there is no run or no checkpoint, or it is not as it was written.
    """
    if not (path / "config.json").exists():
        raise UserError(f"run {path}: expected the folder of a run of tst train")
    found = checkpoint.choose(path, which)
    if found is None:
        raise UserError(f"run {path}: it has no checkpoint yet")
    # How it was trained does not matter, and a run from before a check of these options can still be read.
    config = config_of_run({**found.manifest["config"], "optimizer": {}}, str(found.path))
    model = Transformer(config.model, found.manifest["vocabulary"], config.latent_tokens)
    checkpoint.load_weights(found.path, model)
    tokenizer = path / "tokenizer.json"
    step, end_of_text = found.manifest["step"], found.manifest["end_of_text"]
    return LoadedRun(config, model, tokenizer if tokenizer.exists() else None, end_of_text, step)


def _check_place(config: TrainConfig) -> None:
    """Raise UserError unless the data of a run that began before is where `config` says."""
    places = [("data", path) for path in config.data.data]
    prepared = any(has_tokens(path) for _, path in places)  # with a tokenizer of its own
    if config.data.tokenizer and not prepared:
        places.append(("tokenizer", config.data.tokenizer))
    for option, path in places:
        if not (path.exists() or glob.glob(str(path), recursive=True)):
            raise UserError(
                f"{option} {path}: no such file or folder; if it has moved, give its new place by --{option}"
            )


def _other(name: str, before: Any, now: Any) -> str:
    return f"other data: {name} was {before!r}, is {now!r}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables, with keys `section.name`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
