"""kill -9 at random moments of a run, while it writes checkpoints too: lost are the steps since the last one."""

import dataclasses
import random
import signal
import subprocess
import sys
import time

import pytest
from runs import assert_same_run, lines, run

from tst_ext.train import checkpoint
from tst_ext.train.config import save_config


@pytest.mark.slow
def test_kill_9_at_random_moments(tiny, tmp_path, kills):
    config = dataclasses.replace(tiny, steps=2400, run=dataclasses.replace(tiny.run, checkpoint_every=6, keep=2))
    save_config(config, tmp_path / "c.json")
    straight, rng = tmp_path / "straight", random.Random(0)
    assert run(config, straight, timeout=300).returncode == 0
    expected = lines(straight)
    done = in_checkpoint = restarts = 0
    while done < kills:
        out, reached = tmp_path / f"run{restarts}", 0
        restarts += 1
        while True:

            def unfinished(folder=out / "checkpoints"):
                return set(folder.glob(".unfinished-*"))

            left = unfinished()
            command = [sys.executable, "-m", "tst_ext", "train", "--config", tmp_path / "c.json", "--out", out]
            process = subprocess.Popen([*command, "--no-progress"], stderr=subprocess.PIPE, text=True)
            # Every second one while a checkpoint is written, others anywhere, some while the process starts.
            in_start = done % 2 == 0 and rng.random() < 0.3
            while not in_start and process.poll() is None and len(lines(out)) <= reached:
                time.sleep(0.01)
            if done % 2 == 0:
                time.sleep(rng.uniform(0, 3 if in_start else 1))
            else:
                while process.poll() is None and not unfinished() - left:
                    pass
                time.sleep(rng.uniform(0, 0.003) if done > 1 else 0)
            alive = process.poll() is None
            process.kill()
            error = process.communicate()[1]
            assert process.returncode in (0, -signal.SIGKILL), error
            if not alive:
                break
            done += 1
            in_checkpoint += bool(unfinished() - left)
            found = checkpoint.checkpoints(out)
            step = checkpoint.verify(found[-1])["step"] if found else 0
            assert step >= reached, "a checkpoint that was there is lost"
            kept = [line for line in lines(out) if line["step"] <= step]
            assert kept == [line for line in expected if line["step"] <= step]
            for earlier in found[:-1]:
                checkpoint.verify(earlier)
            reached = step
            if done == kills:
                assert run(config, out, timeout=300).returncode == 0
                break
        assert_same_run(straight, out)
    print(f"{done} kills, {in_checkpoint} of them while a checkpoint was written or removed, {restarts} runs")
    assert in_checkpoint >= max(1, kills // 8)
