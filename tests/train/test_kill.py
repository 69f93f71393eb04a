"""kill -9 at random moments of a run, while it writes checkpoints too: lost are the steps since the last one."""

import dataclasses
import random
import signal
import time

import pytest

from helpers.runs import assert_same_run, lines, start
from tst_ext.train import checkpoint
from tst_ext.train.loop import train


@pytest.mark.slow
def test_kill_9_at_random_moments(tiny, tmp_path, kills):
    config = dataclasses.replace(tiny, steps=300, run=dataclasses.replace(tiny.run, checkpoint_every=6, keep=2))
    straight, rng = tmp_path / "straight", random.Random(0)
    train(config, straight, progress=False)
    expected = lines(straight)
    done = in_checkpoint = runs = 0
    while done < kills or in_checkpoint < kills // 2:
        out, reached, alive = tmp_path / f"run{runs}", 0, True
        runs += 1

        def unfinished(folder=out / "checkpoints"):
            return set(folder.glob(".unfinished-*"))

        while alive and (done < kills or in_checkpoint < kills // 2):
            assert done < 10 * kills, f"{in_checkpoint} of {done} kills in a save"
            left, moment = unfinished(), rng.choice(["start", "anywhere", "checkpoint", "checkpoint"])
            process = start(config, out)
            if moment == "start":
                time.sleep(rng.uniform(0, 0.5))
            elif moment == "anywhere":
                steps = reached + rng.randint(1, 60)
                while process.poll() is None and len(lines(out)) < steps:
                    time.sleep(0.001)
            else:
                while process.poll() is None and not unfinished() - left:
                    pass
                time.sleep(rng.choice([0, rng.uniform(0, 0.003)]))
            alive = process.poll() is None
            process.kill()
            assert process.wait() in (0, -signal.SIGKILL), process.stderr()
            if not alive:  # it came to its end before
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
        train(config, out, progress=False)
        assert_same_run(straight, out)
    print(f"{done} kills, {in_checkpoint} of them while a checkpoint was written or removed, {runs} runs")
