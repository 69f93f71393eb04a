"""Save and load checkpoints by torch.distributed.checkpoint (DCP): whole or absent, checked before they are read.

Tensors are stored as safetensors, because DCP's own file format has a pickle, which can run code when it is read.
docs/trainer.md has the layout and what is promised of it.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from .distributed import Processes
from .files import UNFINISHED, UserError, sync, write_text

FORMAT = 1
MANIFEST = "checkpoint.json"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the earliest first, without one that was being written when a process died."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def last_good(folder: Path) -> str:
    """Say in a message which checkpoint a failed run has left."""
    found = checkpoints(folder)
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


@dataclass(frozen=True)
class Found:
    """Hold the folder of a whole checkpoint, and the content of its checkpoint.json."""

    path: Path
    manifest: dict[str, Any]


def choose(folder: Path, resume: str, processes: Processes | None = None) -> Found | None:
    """Find and verify the checkpoint to resume from: "auto", the latest one of the run (or None), or a name or path.

    Raises:
        UserError: it is not there, or not as it was written; names the latest one before it that is whole.
    """
    found = checkpoints(folder)
    if resume == "auto":
        if not found:
            return None
        path = found[-1]
    else:
        path = folder / "checkpoints" / Path(resume).name
        elsewhere = Path(resume).name != resume and Path(resume).resolve() != path.resolve()
        if path not in found or elsewhere:
            raise UserError(f"checkpoint {resume}: {folder} has none of that name; it has {[p.name for p in found]}")
    try:
        return Found(path, verify(path, processes))
    except UserError as error:
        for earlier in reversed(found[: found.index(path)]):
            try:
                verify(earlier, processes)
            except UserError:
                continue
            raise UserError(f"{error}; {earlier.name} before it is whole: --resume {earlier.name}") from error
        raise UserError(f"{error}; there is no whole one before it") from error


def set_aside_after(path: Path) -> None:
    """Rename the checkpoints after `path`, from which a run resumes; the user may still want them."""
    found = checkpoints(path.parent.parent)
    for later in found[found.index(path) + 1 :]:
        number = 1 + sum(1 for _ in path.parent.glob(f"aside-{later.name}-*"))
        later.rename(later.with_name(f"aside-{later.name}-{number}"))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}  # the routers' biases too


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Tensor]:
    """Return all tensors of the state by name, shared with it: loading into them is loading the state."""
    tensors = _weights(model)
    for name, parameter in model.named_parameters():
        assert parameter in optimizer.state, f"no optimiser state of {name}"
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    # The loop draws nothing at random. What it calls might.
    tensors[f"rng.cpu.{processes.rank}"] = torch.get_rng_state()
    if processes.device.type == "cuda":
        tensors[f"rng.cuda.{processes.rank}"] = torch.cuda.get_rng_state()
    return tensors


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    processes: Processes,
    keep: int,
) -> None:
    """Write the checkpoint of `state["step"]` and remove all but the latest `keep`. Every process calls it.

    Raises:
        UserError: it cannot be written, for example to a full disk; what was there before is untouched.
    """
    path = folder / "checkpoints" / f"step-{state['step']:08}"
    unfinished = path.with_name(UNFINISHED + path.name)

    def prepare() -> None:
        for left in path.parent.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        manifest = {"format": FORMAT, **state, "processes": processes.world, "files": files}
        write_text(unfinished / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n")
        sync(unfinished / MANIFEST)
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)

    try:
        processes.first_only(prepare)
        with _alone_is_right():
            dcp.save(
                _tensors(model, optimizer, processes),
                storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                no_dist=processes.world == 1,
            )
        files = _checksums(unfinished, processes)
        processes.first_only(finish)
    except (OSError, UserError, dcp.CheckpointException) as error:
        if processes.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"checkpoint {path}: cannot be written: {_reason(error)}; {last_good(folder)}") from error
    for old in checkpoints(folder)[:-keep] if processes.first else []:
        _discard(old)


def verify(path: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Check every file of the checkpoint and return the content of its checkpoint.json.

    Raises:
        UserError: a file is missing, truncated, altered or one too many; names it.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
        if manifest["format"] != FORMAT or digest != _digest(manifest):
            raise UserError(f"checkpoint {path}: {MANIFEST} has been altered")
        written: dict[str, Any] = manifest["files"]
        there = {p.name for p in path.iterdir()} - {MANIFEST}
        if there != set(written):
            name = sorted(there ^ set(written))[0]
            raise UserError(f"checkpoint {path}: {name} is {'missing' if name in written else 'not part of it'}")
        for name, file in written.items():
            if (size := (path / name).stat().st_size) != file["bytes"]:
                raise UserError(f"checkpoint {path}: {name}: expected {file['bytes']} bytes, got {size}")
        for name, file in _checksums(path, processes).items():
            if file != written[name]:
                raise UserError(f"checkpoint {path}: {name}: its checksum is not the one it was written with")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {path}: {MANIFEST} cannot be read: {error}") from error
    return manifest


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Read a verified checkpoint into model, optimiser and random number generators. Every process calls it.

    Raises:
        UserError: it is not one of this model.
    """
    for parameter in model.parameters():  # a step makes the optimiser's state; its effect is overwritten
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = _tensors(model, optimizer, processes)
    _read(path, tensors, processes.world == 1)
    torch.set_rng_state(tensors[f"rng.cpu.{processes.rank}"])
    if processes.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{processes.rank}"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Read the weights of a verified checkpoint into `model`, on one process."""
    _read(path, _weights(model), alone=True)


def _read(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    try:
        reader = HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
        # A process that was not there when it was written keeps its own random numbers.
        wanted = {name: t for name, t in tensors.items() if not name.startswith("rng.") or name in saved}
        for name, tensor in wanted.items():
            if name not in saved or saved[name].size != tensor.shape:  # type: ignore[union-attr]
                got = tuple(saved[name].size) if name in saved else "nothing"  # type: ignore[union-attr]
                raise UserError(f"checkpoint {path}: expected {name} of shape {tuple(tensor.shape)}, got {got}")
        with _alone_is_right():
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # safetensors has its own type, and DCP's is no Exception
        raise UserError(f"checkpoint {path}: cannot be read: {_reason(error)}") from error


def _checksums(path: Path, processes: Processes | None) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file but the manifest; each process reads its share of the files."""
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    mine = {}
    for file in sorted(p for p in path.iterdir() if p.name != MANIFEST)[rank::world]:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        mine[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    parts = processes.gather(mine) if processes else [mine]
    return {name: file for part in parts for name, file in part.items()}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a process killed half-way leaves none that looks whole."""
    doomed = path.with_name(f"{UNFINISHED}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what another process still reads goes with the next one


def _reason(error: BaseException) -> str:
    """Return the first process's own words, without DCP's wrapper of them and the tracebacks of all."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C
        raise error
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _alone_is_right() -> Iterator[None]:
    """Silence DCP's warning that a process reads and writes alone: no_dist says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
