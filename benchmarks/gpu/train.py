"""Throughput of `tst train` with the preset 270m on synthetic tokens: 30 steps in each phase.

A superposition step computes what a recovery step computes, on s times more tokens. Their ratio shows what bags cost.
"""

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, REHEARSE, record

from tst_ext.train.config import ModelConfig, OptimizerConfig, TrainConfig, save_config
from tst_ext.train.metrics import read_metrics
from tst_ext.train.presets import preset

STEPS, EVERY = (12, 2) if REHEARSE else (60, 10)


def configuration(data: Path) -> TrainConfig:
    """The preset, with a batch that one GPU computes in a fraction of a second."""
    config = preset("270m")
    small = dict(batch=2, latent_tokens=64, model=ModelConfig(), dtype="float32") if REHEARSE else dict(batch=8)
    run = dict(micro_batch=0, compile=False, device="cpu") if REHEARSE else {}
    return dataclasses.replace(
        config,
        **small,
        data=dataclasses.replace(config.data, data=(data,)),
        superposition=dataclasses.replace(config.superposition, ratio=0.5),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        run=dataclasses.replace(config.run, log_every=EVERY, eval_every=STEPS, checkpoint_every=STEPS, **run),
        steps=STEPS,
        eval_tokens=1 << (10 if REHEARSE else 16),
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


def train(config: TrainConfig, out: Path) -> str:
    """Train by the command where its parser is installed, else by the function that the command calls."""
    try:
        import tyro  # noqa: F401
    except ModuleNotFoundError as error:
        from tst_ext.train.loop import train as function

        function(config, out, progress=False)
        return f"the function behind tst train, because {error.name} is missing"
    from tst_ext.__main__ import main as command

    path = out.parent / "config.json"
    save_config(config, path)
    if status := command(["train", "--config", str(path), "--out", str(out), "--no-progress"]):
        raise RuntimeError(f"tst train ended with status {status}")
    return "tst train"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name) / "data", Path(name) / "run"
        config = configuration(data)
        write_shards(data, 1000 if REHEARSE else config.data.vocabulary)
        try:
            how = train(config, out)
        finally:
            lines = [line for line in read_metrics(out) if "phase" in line]
            for line in lines:
                record(at=line["step"], **{key: line[key] for key in ("phase", "loss", "tokens_per_s", "mfu")})
    latent = config.batch * config.latent_tokens
    milliseconds = {}
    for phase, s in (("superposition", config.superposition.bag_size), ("recovery", 1)):
        # The first report of a phase holds its warm-up, and in the first phase the compilation.
        rates = [line["tokens_per_s"] for line in lines if line["phase"] == phase][1:]
        milliseconds[phase] = latent * s / statistics.median(rates) * 1e3 if rates else math.nan
    record(
        how=how,
        **{f"{phase}_ms": ms for phase, ms in milliseconds.items()},
        superposition_over_recovery=milliseconds["superposition"] / milliseconds["recovery"],
        latent_tokens_per_s=latent / milliseconds["recovery"] * 1e3,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
