"""Fixtures of tests/train and tests/lab: small corpora made by fixed rules, a tiny run, a cache of their own."""

import dataclasses
import hashlib
import json
import random
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.runs import Fork, end_forks, speed
from tst_ext.lab import subprocesses
from tst_ext.train import loop
from tst_ext.train.config import DataConfig, ModelConfig, RunConfig, SuperpositionConfig, TrainConfig
from tst_ext.train.corpus import sources
from tst_ext.train.loop import train
from tst_ext.train.prepare import prepare

VOCABULARY = 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session", autouse=True)
def known_speed():
    """Spare each run its five GEMMs: 0.4 s where a core does 30 GFLOP/s, 10 s in bfloat16 without its instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "gemm_flops_per_second", speed)
        yield


@pytest.fixture(autouse=True)
def as_before():
    """Undo what a run does to this process, and end the processes that a failed test has left."""
    terminate, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, terminate)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    end_forks()


@pytest.fixture
def forked_runs(monkeypatch):
    """Let compare and sweep fork their runs."""
    monkeypatch.setattr(subprocesses, "subprocess", SimpleNamespace(Popen=Fork, STDOUT=subprocess.STDOUT))


@pytest.fixture
def documents():
    """200 documents of words drawn with a fixed seed; the number in front makes each unique."""
    rng = random.Random(0)
    words = ["bag", "token", "step", "loss", "head", "row", "mean", "phase", "switch", "label"]
    return [f"{i} " + " ".join(rng.choice(words) for _ in range(60)) for i in range(200)]


def prepare_documents(documents, config, folder):
    """Prepare texts, which are written to a file next to the folder."""
    path = folder.with_name(f"{folder.name}.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = dataclasses.replace(config, data=(path,))
    prepare(sources(config), config, folder)


def write_split(folder, split, tokens):
    tokens = np.asarray(tokens, dtype="<u2")
    (folder / f"{split}.bin").write_bytes(tokens.tobytes())
    header = {
        "format": 1,
        "dtype": "uint16",
        "tokens": len(tokens),
        "vocabulary": VOCABULARY,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    (folder / f"{split}.json").write_text(json.dumps(header))


@pytest.fixture(scope="session")
def shared_shards(tmp_path_factory):
    """A prepared folder with a sequence that can be learnt: each token is the one before it plus 1, 2 or 3."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    steps = np.random.Generator(np.random.Philox(key=1)).choice([1, 1, 1, 2, 3], size=22_000)
    tokens = np.cumsum(steps) % VOCABULARY
    write_split(folder, "train", tokens[:20_000])
    write_split(folder, "val", tokens[20_000:])
    return folder


@pytest.fixture
def shards(shared_shards):
    """Lend the same folder to a test that may spoil it."""
    before = {path: path.read_bytes() for path in shared_shards.iterdir()}
    yield shared_shards
    for path in set(shared_shards.iterdir()) - before.keys():
        path.unlink()
    for path, content in before.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


@pytest.fixture(scope="session")
def tiny(shared_shards):
    """A run of 30 steps that crosses the phase switch at step 12."""
    return TrainConfig(
        model=ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=64),
        data=DataConfig(data=(shared_shards,)),
        superposition=SuperpositionConfig(bag_size=4, ratio=0.4),
        run=RunConfig(device="cpu", threads=1, log_every=1, eval_every=10),
        steps=30,
        batch=4,
        latent_tokens=16,
        eval_tokens=1024,
    )


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """The folder of that run, for tests that only read it."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    train(tiny, folder, progress=False)
    return folder
