"""What the trainer's loop adds to the steps of its model and optimiser: data, schedule, exchange, metrics."""

import hashlib
import json
import statistics
import time

import numpy as np
import pytest
import torch
from results_file import summary
from steps import LARGER

from conftest import DEVICE, OURS, clock, zipf_ids
from tst_ext.train import loop
from tst_ext.train.batches import read_batch
from tst_ext.train.config import DataConfig, ModelConfig, RunConfig, SuperpositionConfig, TrainConfig
from tst_ext.train.data import Shard
from tst_ext.train.loop import loss_options, train

VOCABULARY, STEPS = 4096, 50  # steps a round


@pytest.fixture
def shards(tmp_path):
    for split, count in (("train", 1_000_000), ("val", 20_000)):
        tokens = zipf_ids((count,), VOCABULARY).cpu().numpy().astype("<u2").tobytes()
        (tmp_path / f"{split}.bin").write_bytes(tokens)
        header = {"format": 1, "dtype": "uint16", "tokens": count, "vocabulary": VOCABULARY}
        header["sha256"] = hashlib.sha256(np.frombuffer(tokens, np.uint8)).hexdigest()
        (tmp_path / f"{split}.json").write_text(json.dumps(header))
    return tmp_path


SMALLEST = ModelConfig()  # the default, whose steps are the shortest anyone runs


def pytest_generate_tests(metafunc):
    cases = [(4, SMALLEST, 20), (1, SMALLEST, 20), (4, LARGER, 10)]
    cases = cases[:1] if metafunc.config.getoption("quick") else cases
    metafunc.parametrize(("s", "size", "rounds"), cases, ids=["smallest-s4", "smallest-s1", "larger-s4"][: len(cases)])


def test_overhead_of_the_loop(benchmark, request, monkeypatch, shards, s, size, rounds):
    rounds = 2 if request.config.getoption("quick") else rounds
    config = TrainConfig(
        model=size,
        data=DataConfig(data=(shards,)),
        superposition=SuperpositionConfig(bag_size=s, ratio=1.0),
        run=RunConfig(device=DEVICE.type),
        steps=(rounds + 1) * STEPS + 1,
        eval_tokens=4096,
    )
    # The bare steps take the trainer's own model and optimiser: steps of others differ by their weights and moments.
    made = []

    class Model(loop.Transformer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(loop, "Transformer", Model)
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    batches = [read_batch(Shard(shards, "train"), config, s, step) for step in range(STEPS)]
    batches = [(batch.ids.to(DEVICE), batch.labels.to(DEVICE), tuple(batch.counts)) for batch in batches]

    def bare_steps():
        model, optimizer = made
        for ids, labels, counts in batches:
            model(ids, labels, **loss_options(config.superposition, counts, 1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

    times = {OURS: [], "model and optimiser": []}
    began = time.perf_counter()

    def synchronised():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def between_rounds(step):
        """Called by the loop before each step: ends a round of it and runs one of bare steps, in the same thread."""
        nonlocal began
        if step % STEPS == 0 and step:
            times[OURS].append(synchronised() - began)
            start = time.perf_counter()
            bare_steps()
            times["model and optimiser"].append(synchronised() - start)
            began = time.perf_counter()

    train(config, shards / "run", progress=False, on_step=between_rounds)
    rows = {
        name: [t / STEPS for t in values[1:]] for name, values in times.items()
    }  # without the first, which warms up
    measured = iter(rows[OURS])

    def replay():
        clock.now += next(measured)

    benchmark.pedantic(replay, rounds=rounds)
    mine = statistics.median(rows[OURS])
    contenders = {name: {"floor": name != OURS, **summary(values, mine)} for name, values in rows.items()}
    parameters = sum(p.numel() for p in made[0].parameters()) / 1e6
    shape = f"{parameters:.1f} M parameters, {config.batch}x{config.latent_tokens} latent tokens, V {VOCABULARY}"
    benchmark.extra_info.update(
        op="step of the trainer's loop", shape=shape, s=s, dtype="float32", contenders=contenders
    )
