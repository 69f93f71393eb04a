"""Throughput of the trainer with the preset 270m on random tokens, and how long its two kinds of steps take.

A superposition step computes what a recovery step computes, on s times more tokens. Their ratio shows what bags cost.
One run of the trainer has a block of steps of each kind, for the readings of its log. Then come both kinds in turns, in
random order, as stages of a single step. Events between the steps of the loop time these. The parts of a step that bags
change are also timed alone: the copy of a batch to the device, the embedding, the loss.

`--eager` does the same without torch.compile, in fewer steps.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, REHEARSE, medians, record
from torch import Tensor

from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy
from tst_ext.train.batches import read_batch
from tst_ext.train.config import ModelConfig, OptimizerConfig, SuperpositionConfig, TrainConfig
from tst_ext.train.data import Shard
from tst_ext.train.loop import loss_options, train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.presets import preset

EVERY = 5  # steps between readings of the log; a block has a multiple of them
KINDS = ("superposition", "recovery")


class Enough(Exception):
    """End a run after its last measured step: its checkpoint of 3 GB and its validation would take as long again."""


def order(block: int, turns: int, bag_size: int) -> list[int]:
    """Return the bag size of each step: `block` steps of each kind, then `turns` of each in random order."""
    mixed = [bag_size, 1] * turns
    random.Random(0).shuffle(mixed)
    return [bag_size] * block + [1] * block + mixed


def superposition(sizes: list[int]) -> SuperpositionConfig:
    """Return stages of a single step with these bag sizes, in a run of one step more."""
    share = 1 / (len(sizes) + 1)
    return SuperpositionConfig(sizes[0], share, tuple((share, s) for s in sizes[1:]))


def configuration(data: Path, sizes: list[int], compiled: bool) -> TrainConfig:
    """The preset, with a batch that one GPU computes in a fraction of a second."""
    config = preset("270m")
    small = dict(batch=2, latent_tokens=64, model=ModelConfig(), dtype="float32") if REHEARSE else dict(batch=8)
    run = dict(micro_batch=1, device="cpu", compile=False, threads=1) if REHEARSE else dict(compile=compiled)
    return dataclasses.replace(
        config,
        **small,
        data=dataclasses.replace(config.data, data=(data,)),
        superposition=superposition(sizes),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        run=dataclasses.replace(config.run, log_every=EVERY, **run),
        steps=len(sizes) + 1,
        order="random",  # an epoch's order goes through all stages before a step's
        eval_tokens=1 << 12,  # never read
    )


def write_shards(folder: Path, vocabulary: int) -> None:
    """Token shards as `tst prepare` writes them, of random ids with the frequencies of text."""
    folder.mkdir()
    cumulative = np.cumsum(1 / np.arange(1, vocabulary + 1))
    generator = np.random.default_rng(0)
    for split, count in (("train", 1 << 22), ("val", 1 << 17)):
        ids = (
            np.searchsorted(cumulative, generator.random(count) * cumulative[-1]).astype("<u4").clip(0, vocabulary - 1)
        )
        (folder / f"{split}.bin").write_bytes(ids.tobytes())
        header = {"format": 1, "dtype": "uint32", "tokens": count, "documents": 1, "vocabulary": vocabulary}
        header |= {"end_of_text": None, "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
        (folder / f"{split}.json").write_text(json.dumps(header))


def stamps() -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """Return a function that marks a place in the device's work, and one that returns the ms between all marks."""
    events: list[torch.cuda.Event] = []
    host: list[float] = []  # of a rehearsal

    def mark() -> None:
        host.append(1e3 * time.perf_counter())
        if DEVICE.type == "cuda":
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

    def passed() -> list[float]:
        if DEVICE.type != "cuda":
            return [b - a for a, b in pairwise(host)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    return mark, passed


def run_in_turns(config: TrainConfig, sizes: list[int], block: int, out: Path) -> dict[str, float]:
    """Train, record both kinds of steps, and return the median ms of each, in turns."""
    mark, passed = stamps()

    def on_step(step: int) -> None:
        mark()
        if step == len(sizes):
            raise Enough

    try:
        train(config, out, progress=False, on_step=on_step)
    except Enough:
        pass
    finally:
        lines = [line for line in read_metrics(out) if "phase" in line and line["step"] <= 2 * block]
        for line in lines:
            line["phase"] = KINDS[line["step"] > block]  # the trainer calls all of its stages superposition
            record(at=line["step"], **{key: line[key] for key in ("phase", "loss", "tokens_per_s", "mfu")})

    times = passed()
    found: dict[str, float] = {}
    for i, (kind, bag_size) in enumerate(zip(KINDS, (max(sizes), 1), strict=True)):
        # A reading of the log waits for the device, which makes its step longer. In the next one the host is no longer
        # ahead.
        chosen = [s for s in range(2 * block, len(sizes)) if sizes[s] == bag_size and s % EVERY not in (0, EVERY - 1)]
        low, middle, high = statistics.quantiles([times[s] for s in chosen], n=4)
        # The first reading of a block holds its warm-up, and that of the first block the compilation.
        readings = [line for line in lines if line["phase"] == kind and line["step"] - i * block > EVERY]
        logged = {key: float(statistics.median(line[key] for line in readings)) for key in ("tokens_per_s", "mfu")}
        record(kind=kind, ms=middle, quartiles=f"{low:.2f} {high:.2f}", steps=len(chosen), **logged)
        found[kind] = middle
    return found


def parts(config: TrainConfig, data: Path, bag_size: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the parts of a step that bags change, each with its ms in a step of both kinds."""
    shard = Shard(data, "train", config.data)
    size = config.run.micro_batch or config.batch
    dim = config.model.dim
    batches = {kind: read_batch(shard, config, s, 0) for kind, s in zip(KINDS, (bag_size, 1), strict=True)}
    pin = Tensor.pin_memory if DEVICE.type == "cuda" else Tensor.contiguous
    read = {kind: [pin(t[:size]) for t in (batch.ids, batch.labels)] for kind, batch in batches.items()}
    there = {kind: [t.to(DEVICE) for t in tensors] for kind, tensors in read.items()}
    options = {kind: loss_options(config.superposition, tuple(b.counts), 1, DEVICE) for kind, b in batches.items()}
    # Under autocast the model's residual stream, and so the input of the head, is float32.
    autocast = nullcontext() if config.dtype == "float32" else torch.autocast(DEVICE.type, torch.bfloat16)
    embedding = BagEmbedding(shard.vocabulary, dim, device=DEVICE)
    head = LinearMultiHotCrossEntropy(dim, shard.vocabulary, device=DEVICE)
    upstream = torch.randn(size, config.latent_tokens, dim, device=DEVICE)
    hidden = torch.randn_like(upstream, requires_grad=True)

    def copy(kind: str) -> None:
        for tensor in read[kind]:
            tensor.to(DEVICE, non_blocking=True)

    def embed(kind: str) -> None:
        with autocast:
            out = embedding(there[kind][0])
        out.backward(upstream)

    def loss(kind: str) -> None:
        with autocast:
            out = head(hidden, there[kind][1], **options[kind])
        out.backward()

    def forget() -> None:
        for tensor in (embedding.weight, head.weight, hidden):
            tensor.grad = None

    for function in (copy, embed, loss):
        found = medians({kind: partial(function, kind) for kind in KINDS}, 20, forget)
        yield function.__name__, {kind: 1e3 * t * (config.batch // size) for kind, t in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, in fewer steps")
    eager = parser.parse_args().eager
    block, turns = (10, 10) if REHEARSE else (15, 12) if eager else (15, 30)
    sizes = order(block, turns, preset("270m").superposition.bag_size)
    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name) / "data", Path(name) / "run"
        config = configuration(data, sizes, not eager)
        write_shards(data, 1000 if REHEARSE else config.data.vocabulary)
        step = run_in_turns(config, sizes, block, out)
        record(
            compiled=config.run.compile,
            superposition_over_recovery=step["superposition"] / step["recovery"],
            difference_ms=step["superposition"] - step["recovery"],
            latent_tokens_per_s=config.batch * config.latent_tokens / step["recovery"] * 1e3,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0,
        )
        for part, ms in parts(config, data, max(sizes)):
            values = {f"{kind}_ms": value for kind, value in ms.items()}
            record(part=part, **values, difference_ms=ms["superposition"] - ms["recovery"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
