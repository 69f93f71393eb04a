"""Runs in processes of their own, and what they left."""

import os
import resource
import signal
import sys
import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist
from processes import FORKS
from safetensors import safe_open
from tqdm import tqdm

from tst_ext.__main__ import entry
from tst_ext.train import checkpoint, loop
from tst_ext.train.config import save_config
from tst_ext.train.metrics import read_metrics

TIMES = {"seconds", "tokens_per_s", "mfu", "waited_for_data_s"}  # of a line of metrics: what no two runs share
ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    # No file may grow beyond 20,000 bytes from here on, so that writes fail as on a full disk.
    "fill": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    "nothing": lambda: None,
}


def command(environment, output, arguments, action, at):
    """`tst` with these arguments, in a process of its own: with `action` before the step `at`, counted from 0."""
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in zip(output, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    original = loop.learning_rate

    def learning_rate(config, steps, step):
        if step == at:
            ACTIONS[action]()
        return original(config, steps, step)

    loop.learning_rate = learning_rate
    sys.argv = ["tst", *arguments]
    entry()


def start(config, out, *options, environment=None, action=("nothing", 0)):
    """Begins `tst train`; the process, which has `.output`: the paths of what it prints."""
    path = out.with_suffix(".config.json")
    save_config(config, path)
    arguments = ["train", "--config", path, "--out", out, "--no-progress", *options]
    rank = (environment or {}).get("RANK", "0")
    output = [str(out.with_suffix(f".{name}{rank}")) for name in ("stdout", "stderr")]
    for name in output:
        open(name, "w").close()
    environment = {**os.environ, **(environment or {})}
    process = FORKS.Process(target=command, args=(environment, output, [*map(str, arguments)], *action))
    process.output = output
    process.start()
    return process


def run(config, out, *options, processes=1, action=("nothing", 0), timeout=120):
    """Runs `tst train` to its end in so many processes, which find each other as those of torchrun do: `returncode`,
    of the first that failed, `stdout` and `stderr`."""
    environments = [{}]
    if processes > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        group |= {"TORCHELASTIC_RESTART_COUNT": 0, "WORLD_SIZE": processes}
        environments = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    begun = [
        start(config, out, *options, environment={k: str(v) for k, v in e.items()}, action=action) for e in environments
    ]
    for process in begun:
        process.join(timeout)
    hanging = [process for process in begun if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process did not end"
    texts = ["".join(open(process.output[i]).read() for process in begun) for i in (0, 1)]
    status = next((process.exitcode for process in begun if process.exitcode), 0)
    return SimpleNamespace(returncode=status, stdout=texts[0], stderr=texts[1])


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
