"""kill -9 at random moments of a run, while it writes checkpoints too, and of a preparation: the next one resumes."""

import dataclasses
import json
import random
import signal
import time

import pytest

from helpers.corpus import write_corpus
from helpers.runs import assert_same_run, lines, start, tst
from tst_ext.train import checkpoint
from tst_ext.train.data import INDEX
from tst_ext.train.files import UNFINISHED
from tst_ext.train.loop import train
from tst_ext.train.prepare import JOURNAL

EXPERTS = {"qk_norm": True, "experts": 4, "shared_experts": 1, "balance": "bias"}


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"])
def test_kill_9_at_random_moments(tiny, tmp_path, kills, model):
    tiny = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **model))
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


@pytest.mark.slow
def test_kill_9_of_a_preparation(tmp_path, kills):
    write_corpus(tmp_path / "corpus.jsonl", 3_000_000)
    rng, done, resumed, runs = random.Random(0), 0, 0, 0

    def prepare(out, *options):
        arguments = ["--data", tmp_path / "corpus.jsonl", "--vocabulary", 1000, "--no-progress", *options, "--out", out]
        return tst("prepare", *arguments, output=tmp_path / "output")

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def written(folder):
        path = folder / "train-00000.bin"
        return path.stat().st_size if path.exists() else 0

    assert prepare(tmp_path / "whole").wait() == 0
    given = ["--tokenizer", tmp_path / "whole" / "tokenizer.json"]
    assert prepare(tmp_path / "given", *given).wait() == 0
    expected, size = contents(tmp_path / "given"), written(tmp_path / "given")
    assert contents(tmp_path / "whole")["train-00000.bin"] == expected["train-00000.bin"]
    while done < kills or resumed < kills // 2:
        out = tmp_path / f"out{runs}"
        unfinished = out.with_name(UNFINISHED + out.name)
        runs += 1
        while not out.exists():
            assert done < 10 * kills, f"{resumed} of {done} resumed"
            before, journal = written(unfinished), None
            if (unfinished / JOURNAL).exists() and not (unfinished / INDEX).exists():
                journal = json.loads((unfinished / JOURNAL).read_text())
            process = prepare(out, *given)
            if rng.random() < 0.25:
                time.sleep(rng.uniform(0, 0.5))
            else:
                share = rng.uniform(before, 1.2 * size)  # beyond the end the moments of the held-out split are
                while process.poll() is None and written(unfinished) <= share:
                    time.sleep(0.001)
                if journal:
                    assert f"resumes after {journal['documents']:,} documents" in process.stderr()
                    resumed += journal["documents"] > 0
            process.kill()
            status = process.wait()
            assert status in (0, -signal.SIGKILL), process.stderr()
            done += status != 0
        assert contents(out) == expected
    print(f"{done} kills, {resumed} times resumed, {runs} folders")
