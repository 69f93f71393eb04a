"""The command `tst` in processes of its own, forked, and what runs left."""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tqdm import tqdm

from helpers.processes import FORKS, METHOD
from tst_ext.__main__ import entry
from tst_ext.lab import subprocesses
from tst_ext.train import checkpoint, loop, prepare
from tst_ext.train.config import save_config
from tst_ext.train.metrics import read_metrics

TIMES = {"seconds", "tokens_per_s", "mfu", "waited_for_data_s"}  # of a line of metrics: what no two runs share
STOPS = {signal.SIGINT, signal.SIGTERM}
begun = []  # every Fork since the last `end_forks`
ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    # No file may grow beyond 20,000 bytes from here on, so that writes fail as on a full disk.
    "fill": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    "nothing": lambda: None,
}


def speed(*_):
    """Stand in for the measurement of the machine's GEMMs."""
    return 1e9


def run_command(environment, outputs, nested, arguments, action, at):
    """Run `tst` in this process, with an action before the step `at`, counted from 0."""
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.descriptor, number)
    if nested:  # or this process would hold its parent's locks
        for name in os.listdir("/dev/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):
                    os.close(int(name))
    else:
        os.setsid()  # a group of its own, with what it starts, for `end_forks`
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the command that forked this has a handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    subprocesses.subprocess = SimpleNamespace(Popen=Fork, STDOUT=subprocess.STDOUT)
    loop.gemm_flops_per_second = speed
    prepare.COMMIT_SECONDS, prepare.BATCH = 0.02, 1 << 17  # so that a short preparation has something to lose
    loop.train = functools.partial(loop.train, on_step=lambda step: ACTIONS[action]() if step == at else None)
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
    """Stand in for subprocess.Popen where the command is `python -m tst_ext`: fork it."""

    def __init__(self, command, stdout, stderr, env, action=("nothing", 0)):
        assert list(command[:3]) == [sys.executable, "-m", "tst_ext"]
        outputs = [Output(file.fileno()) for file in (stdout, stdout if stderr == subprocess.STDOUT else stderr)]
        # A forked process can fork again: it has no threads.
        nested = METHOD == "forkserver" and multiprocessing.parent_process() is not None
        context = multiprocessing.get_context("fork") if nested else FORKS
        arguments = [str(argument) for argument in command[3:]]
        self.process = context.Process(target=run_command, args=(dict(env), outputs, nested, arguments, *action))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until its own handlers are there
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        begun.append(self)
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("tst", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)


def end_forks():
    """End all that was forked since the last call, with what it started."""
    for fork in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(fork.process.pid, signal.SIGKILL)
        fork.kill()  # which may have no group yet
        fork.process.join()
    begun.clear()


def wait_for(condition, process, seconds=120):
    """Return as soon as `condition()` is true; fail where the process ends before, or so many seconds pass."""
    late = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < late
        time.sleep(0.01)


def tst(*arguments, output, environment=None, action=("nothing", 0)):
    """Begin `tst` with these arguments and return the process. Its `stdout()` and `stderr()` read what it printed, from
    files whose names begin with `output`."""
    names = [f"{output}.stdout", f"{output}.stderr"]
    with open(names[0], "w") as stdout, open(names[1], "w") as stderr:
        command = [sys.executable, "-m", "tst_ext", *arguments]
        process = Fork(command, stdout, stderr, {**os.environ, **(environment or {})}, action)
    process.stdout, process.stderr = (Path(name).read_text for name in names)
    return process


def start(config, out, *options, action=("nothing", 0), environment=None):
    """Begin `tst train`."""
    path, rank = out.with_suffix(".config.json"), (environment or {}).get("RANK", "")
    save_config(config, path)
    arguments = ["train", "--config", path, "--out", out, "--no-progress", *options]
    return tst(*arguments, output=f"{out}{rank}", action=action, environment=environment)


def run(config, out, *options, processes=1, action=("nothing", 0), timeout=120):
    """Run `tst train` to its end in so many processes, which find each other as under torchrun. The `returncode` is the
    status of the first that failed."""
    environments = [{}]
    if processes > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(processes))
        group |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [start(config, out, *options, action=action, environment=each) for each in environments]
    statuses = [process.wait(timeout) for process in started]
    return SimpleNamespace(
        returncode=next(filter(None, statuses), 0),
        stdout="".join(process.stdout() for process in started),
        stderr="".join(process.stderr() for process in started),
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


def assert_close_runs(a, b, rtol):
    """Equal but for the order of float32 sums."""
    assert len(lines(a)) == len(lines(b))
    for x, y in zip(lines(a), lines(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if isinstance(x[name], list):  # the loads of experts
                torch.testing.assert_close(torch.tensor(x[name]), torch.tensor(y[name]), rtol=rtol, atol=0)
            else:
                expected = x[name] if isinstance(x[name], str) else pytest.approx(x[name], rel=rtol)
                assert y[name] == expected, (x["step"], name)
