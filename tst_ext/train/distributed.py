"""Connect the processes of a run, one or those of torchrun, and share out the model by PyTorch's own engines."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .files import UserError, check
from .model import Block, Transformer

T = TypeVar("T")


def _from_environment(name: str) -> int | None:
    """Return a variable as torchrun sets it, None if it is unset or empty."""
    value = os.environ.get(name, "")
    if not value:
        return None
    try:
        number = int(value)
    except ValueError:
        number = -1
    check(name, value, number >= 0, "an integer >= 0, as torchrun sets it")
    return number


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many there are, by the environment: (0, 1) without torchrun.

    Raises:
        UserError: a variable is missing, no number or out of range. Slurm and others set some of them alone.
    """
    rank, world = _from_environment("RANK"), _from_environment("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    if rank is None or world is None:
        got = ", ".join(f"{name}={os.environ.get(name)!r}" for name in ("RANK", "WORLD_SIZE"))
        raise UserError(f"RANK, WORLD_SIZE: expected both, as torchrun sets them, or neither, got {got}")
    check("WORLD_SIZE", world, world >= 1, "an integer >= 1")
    check("RANK", rank, rank < world, f"an integer below WORLD_SIZE = {world}")
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            value = os.environ.get(name)
            check(name, value, bool(value), f"one, as torchrun sets it, with WORLD_SIZE = {world}")
        port = _from_environment("MASTER_PORT")
        check("MASTER_PORT", port, port is not None and port < 2**16, "an integer below 65536")
    return rank, world


def choose_device(name: str) -> torch.device:
    """Return the device of that name, for "auto" the GPU if there is one. Raise UserError if it cannot be used."""
    try:
        if name != "auto" and torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("the trainer runs on these")
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        local_rank = _from_environment("LOCAL_RANK")
        if device.type == "cuda" and device.index is None:  # torch.cuda.set_device wants a certain one
            device = torch.device("cuda", torch.cuda.current_device() if local_rank is None else local_rank)
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # names or devices torch lacks
        raise UserError(f"device: expected auto, cpu or cuda, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


class Processes:
    """Join the group of processes, and leave it when this context ends.

    This process is number `rank` of `world`, and computes on `device`. Rank 0 writes the files and talks to the user.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.world = rank_and_world()
        self.device = choose_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "Processes":
        if self.world > 1:
            # gloo for what lies on the CPU: counts, the request to stop, the files of a checkpoint
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            except (RuntimeError, ValueError) as error:  # an address that is not there, a port that is taken
                at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                reason = str(error).splitlines()[0]
                raise UserError(f"MASTER_ADDR, MASTER_PORT: cannot join the processes at {at}: {reason}") from error
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.world > 1:
            if kind is None:
                dist.barrier()  # gloo aborts a process whose peer closes its sockets first
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, numbers: list[int]) -> list[int]:
        """Sum each of the numbers over all processes."""
        return numbers if self.world == 1 else self.sum(torch.tensor(numbers)).tolist()

    def first_only(self, function: Callable[[], T]) -> T:
        """Return `function()` of the first process, or raise its error, on every process, so that none waits."""
        value, error = None, None
        if self.first:
            try:
                value = function()
            except (UserError, OSError) as raised:
                error = raised if isinstance(raised, UserError) else UserError(str(raised))
        value, error = self.share((value, error))
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def share(self, value: Any) -> Any:
        """Return rank 0's `value` on every process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value` on every process."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def parallelise(self, model: Transformer, config: TrainConfig) -> nn.Module:
        """Compile the blocks and share out the parameters as `config` asks."""
        for block in model.blocks:
            assert isinstance(block, Block)
            block.recompute = config.run.activation_checkpointing
            if config.run.compile:
                block.compile()  # one graph for all blocks, the same in both phases: nothing compiles at the switch
        if self.world == 1:
            return model
        if config.run.parallel == "ddp":
            devices = [self.device] if self.device.type == "cuda" else None
            # The buffers, cos and sin, never change: nothing to broadcast in each forward pass.
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        # Inputs are not cast: activations have the parameters' dtype by themselves, cos and sin stay float32.
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
        policy = MixedPrecisionPolicy(**half) if config.dtype == "bfloat16" else MixedPrecisionPolicy()  # type: ignore[arg-type]
        mesh = init_device_mesh(self.device.type, (self.world,))
        if config.dtype == "bfloat16":
            for router in model.routers():  # units of their own, whose weights stay float32
                fully_shard(router, mesh=mesh, reshard_after_forward=True)
        # Embedding and head are units of their own: the full head exists only during the loss. The root, the last norm,
        # is sharded again after a forward pass. FSDP2's default leaves it whole, as another object than the optimiser's
        # parameter, and a checkpoint after a validation would lack its optimiser state.
        for module in (model.embedding, *model.blocks, model.head, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        return model

    def finish(self) -> None:
        """Wait for the device's work, so that what follows is timed alone."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self, config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
        """Use mixed precision unless FSDP2 brings its own."""
        if config.dtype == "float32" or (self.world > 1 and config.run.parallel == "fsdp"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def accumulate(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange the gradients of a batch with its last part under DDP, with each part under FSDP2."""
        # FSDP2 would have to keep all gradients whole: 4 bytes per parameter, 12 GiB at 3B.
        hold = isinstance(model, DistributedDataParallel) and not last
        return model.no_sync() if hold else contextlib.nullcontext()  # type: ignore[operator]
