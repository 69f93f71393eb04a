"""Runs the command line with something done to the run at a step, from inside its process.

`python driver.py ACTION STEP train ...`, or under torchrun. STEP counts from 0; the action comes before the step.
"""

import os
import resource
import signal
import sys

from tst_ext.__main__ import entry
from tst_ext.train import loop

ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    # No file may grow beyond 20,000 bytes from here on, so that writes fail as on a full disk.
    "fill": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    "nothing": lambda: None,
}

action, at = ACTIONS[sys.argv[1]], int(sys.argv[2])
original = loop.learning_rate


def learning_rate(config, steps, step):
    if step == at:
        action()
    return original(config, steps, step)


loop.learning_rate = learning_rate
del sys.argv[1:3]
entry()
