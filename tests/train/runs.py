"""Runs in processes of their own, and what they left."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from tst_ext.train import checkpoint
from tst_ext.train.config import save_config
from tst_ext.train.metrics import read_metrics

TIMES = {"seconds", "tokens_per_s", "mfu", "waited_for_data_s"}  # of a line of metrics: what no two runs share
DRIVER = Path(__file__).with_name("driver.py")


def run(config, out, *options, processes=1, action=("nothing", 0), timeout=120):
    """Runs `tst train`, with `action` at a step; the finished process."""
    path = out.with_suffix(".config.json")
    save_config(config, path)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, DRIVER, *map(str, action), "train", "--config", path, "--out", out, "--no-progress", *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)


def lines(folder):
    """The metrics of a run without its times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def tensors(path):
    """All tensors of a checkpoint by name, parts put together: `{name: {offset: tensor}}` flattened to whole ones."""
    parts = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for key in f.keys():
                parts.setdefault(key, []).append(f.get_tensor(key))
    # Shards of FSDP2 are slices of the first dimension, in the order of the processes.
    return {key: torch.cat(p) if len(p) > 1 else p[0] for key, p in parts.items()}


def assert_same_run(a, b):
    """Two runs logged the same and ended in the same state, bit for bit."""
    assert lines(a) == lines(b)
    x, y = (tensors(checkpoint.checkpoints(folder)[-1]) for folder in (a, b))
    assert x.keys() == y.keys() and len(x) > 10
    for name in x:
        assert torch.equal(x[name], y[name]), name
