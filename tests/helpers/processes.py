"""Processes of a test, forked from one that has imported torch and the trainer: they begin in 0.1 s, not in 3."""

import datetime
import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed and gloo"
)
METHOD = "spawn" if sys.platform == "darwin" else "forkserver"  # its libraries do not survive a fork
FORKS = multiprocessing.get_context(METHOD)
# FSDP2 imports torch._dynamo, which takes longest.
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "tst_ext.commands"])


def in_process_group(rank, world, path, function):
    torch.set_num_threads(1)
    # A file, not a port: a port that is free now may be taken when the processes bind it.
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timeout)
    try:
        function(rank)
        dist.barrier()  # neither closes its sockets while the other still reads
    finally:
        dist.destroy_process_group()
    leave()


def leave():
    """Ends this process here, as tst_ext.__main__.entry does and for its reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_processes(world, function, tmp_path):
    """Call `function(rank)` in `world` processes of one group, and raise what it raises."""
    arguments = world, str(tmp_path / "rendezvous"), function
    torch.multiprocessing.start_processes(in_process_group, arguments, nprocs=world, start_method=METHOD)
