"""The command `tst` in processes of its own, forked, and what runs left."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from processes import FORKS
from safetensors import safe_open
from tqdm import tqdm

from tst_ext.__main__ import entry
from tst_ext.train import checkpoint, launch, loop
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


def run_command(environment, outputs, close, arguments, action, at):
    """The command `tst` in this process, with an action before the step `at`, counted from 0."""
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.descriptor, number)
    if close:  # what a fork alone keeps open: locks of the process it came from
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background jobs of a shell ignore
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the one of a command that forked it
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    launch.subprocess = SimpleNamespace(Popen=Fork, STDOUT=subprocess.STDOUT)
    original = loop.learning_rate

    def learning_rate(config, steps, step):
        if step == at:
            ACTIONS[action]()
        return original(config, steps, step)

    loop.learning_rate = learning_rate
    sys.argv = ["tst", *arguments]
    entry()


class Output:
    """An open file that goes to a process with its arguments."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def __reduce__(self):
        return _receive, (DupFd(self.descriptor),)


def _receive(duplicate):
    return Output(duplicate.detach())


class Fork:
    """What subprocess.Popen is for `python -m tst_ext`, forked."""

    def __init__(self, command, stdout, stderr, env, action=("nothing", 0)):
        assert list(command[:3]) == [sys.executable, "-m", "tst_ext"]
        outputs = [Output(file.fileno()) for file in (stdout, stdout if stderr == subprocess.STDOUT else stderr)]
        # A process that was forked itself has no threads yet, so that it can fork.
        forked = multiprocessing.parent_process() is not None
        context = multiprocessing.get_context("fork") if forked else FORKS
        arguments = [str(argument) for argument in command[3:]]
        self.process = context.Process(target=run_command, args=(dict(env), outputs, forked, arguments, *action))
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired("tst", timeout)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.process.pid, number)


def tst(*arguments, output, environment=None, action=("nothing", 0)):
    """Begins `tst` with these arguments; the process, whose `.stdout()` and `.stderr()` are read from files that begin
    with `output`."""
    names = [f"{output}.stdout", f"{output}.stderr"]
    with open(names[0], "w") as stdout, open(names[1], "w") as stderr:
        command = [sys.executable, "-m", "tst_ext", *arguments]
        process = Fork(command, stdout, stderr, {**os.environ, **(environment or {})}, action)
    process.stdout, process.stderr = (Path(name).read_text for name in names)
    return process


def start(config, out, *options, action=("nothing", 0), environment=None):
    """Begins `tst train`."""
    path, rank = out.with_suffix(".config.json"), (environment or {}).get("RANK", "")
    save_config(config, path)
    arguments = ["train", "--config", path, "--out", out, "--no-progress", *options]
    return tst(*arguments, output=f"{out}{rank}", action=action, environment=environment)


def run(config, out, *options, processes=1, action=("nothing", 0), timeout=120):
    """Runs `tst train` to its end in so many processes, which find each other as those of torchrun do. `returncode` is
    that of the first that failed."""
    environments = [{}]
    if processes > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(processes))
        group |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    begun = [start(config, out, *options, action=action, environment=each) for each in environments]
    statuses = [process.wait(timeout) for process in begun]
    return SimpleNamespace(
        returncode=next(filter(None, statuses), 0),
        stdout="".join(process.stdout() for process in begun),
        stderr="".join(process.stderr() for process in begun),
    )


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
