"""Compare TST with its baseline on the text that this machine holds: a small dense model, equal steps, equal FLOPs.

Everything fits into `--seconds`: collect text, train a tokenizer, write token shards, time a few steps, train both
models. The time that is left decides the number of steps. Both runs have the same initial weights, schedule, steps,
latent tokens per step and held-out tokens. They are the runs of `tst compare`, one after the other in this process. As
processes of their own, each would import torch and compile the model again.

The text is source code and documentation, each content once. Whole files are held out, by a hash of their content.
Files of one package resemble each other, so a leak between them is not ruled out. It is the same for both runs.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, REHEARSE, record

from tst_ext.lab.sweep import make_sweep
from tst_ext.train.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SuperpositionConfig, TrainConfig
from tst_ext.train.corpus import sources
from tst_ext.train.data import Shard
from tst_ext.train.flops import parameters
from tst_ext.train.loop import train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.prepare import prepare
from tst_ext.train.tokens import data_tokens

BEGAN = time.monotonic()
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".cu", ".cuh"}
LARGEST = 1 << 20  # bytes of a file; larger ones are data
FILES = 16  # of collected text
# 23 M parameters: in 100 s an H100 gives them 4 or more tokens each. With fewer than 2 TST has lost (docs/evidence.md).
MODEL = ModelConfig() if REHEARSE else ModelConfig(dim=384, layers=6, heads=6, kv_heads=6, ffn_dim=1024)
VOCABULARY = 512 if REHEARSE else 16384
# Peak rates by width: the default's, and the paper's for a width of 576.
LEARNING_RATE = {96: 3e-3, 384: 2e-3}[MODEL.dim]
BATCH, LATENT = (2, 64) if REHEARSE else (64, 512)
VALIDATIONS = 4 if REHEARSE else 20
TIMED = 3 if REHEARSE else 30  # steps of each kind
RESERVE = 0.93  # of the time left is planned for: runs are slower than the steps that were timed


def left(seconds: float) -> float:
    return seconds - (time.monotonic() - BEGAN)


def roots() -> list[Path]:
    """The folders to search, none of them in another."""
    names = [*sys.path, sysconfig.get_paths()["stdlib"], "/usr/share", "/usr/include", "/usr/local", "/opt"]
    names += [str(path) for path in Path("/usr/lib").glob("python3*")]
    if REHEARSE:
        names = [sysconfig.get_paths()["stdlib"]]
    found = {Path(name).resolve() for name in names if name and Path(name).is_dir()}
    return sorted(path for path in found if not found & set(path.parents))


def walk(folders: list[Path]) -> list[str]:
    """The paths of all files with one of SUFFIXES. The children of each folder are searched at the same time."""

    def chosen(here: str, names: list[str]) -> list[str]:
        return [os.path.join(here, name) for name in names if os.path.splitext(name)[1] in SUFFIXES]

    def below(folder: str) -> list[str]:
        return [path for here, _, names in os.walk(folder) for path in chosen(here, names)]

    tops = [top for folder in folders for top in itertools.islice(os.walk(folder), 1)]  # none of one it may not read
    children = [os.path.join(here, name) for here, names, _ in tops for name in names]
    with ThreadPoolExecutor(16) as pool:
        found = [chosen(here, names) for here, _, names in tops] + list(pool.map(below, children))
    return [path for paths in found for path in paths]


def read(path: str) -> tuple[str, bytes, str] | str:
    """Return suffix, digest and text of a file, or why it is left out."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        text = data.decode()
    except UnicodeDecodeError:
        return "larger" if len(data) > LARGEST else "no UTF-8"
    except OSError:
        return "cannot be read"
    if len(data) > LARGEST or not data or b"\0" in data:
        return "larger" if len(data) > LARGEST else "NUL bytes" if data else "empty"
    return os.path.splitext(path)[1], hashlib.sha256(data).digest(), text


def collect(paths: list[str], folder: Path, most: int, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Write each different text once, as JSON Lines, up to `most` bytes or until time is up. Return counts."""
    paths = sorted(paths)
    random.Random(0).shuffle(paths)  # the files read before the end are a sample of all
    folder.mkdir()
    outs = [open(folder / f"{i:02}.jsonl", "w", encoding="utf-8") for i in range(FILES)]
    seen: set[bytes] = set()
    out_of: Counter[str] = Counter()
    size: Counter[str] = Counter()
    looked = 0
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(paths), 256):
            if until():
                break
            for found in pool.map(read, paths[start : start + 256]):
                if size.total() >= most:
                    break
                looked += 1
                if isinstance(found, str):
                    out_of[found] += 1
                    continue
                suffix, digest, text = found
                if digest in seen:
                    out_of["copies"] += 1
                    continue
                seen.add(digest)
                outs[len(seen) % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size[suffix] += len(text.encode())
    for out in outs:
        out.close()
    return {
        "found": len(paths),
        "read": looked,
        "files": len(seen),
        "bytes": size.total(),
        "left_out": dict(out_of),
        "megabytes": {suffix: round(n / 1e6, 1) for suffix, n in size.most_common()},
    }


def configuration(data: Path, bag_size: int, ratio: float) -> TrainConfig:
    run = RunConfig(device="cpu", threads=1) if REHEARSE else RunConfig(compile=True)
    return TrainConfig(
        model=MODEL,
        data=DataConfig(data=(data,)),
        superposition=SuperpositionConfig(bag_size=bag_size, ratio=ratio),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),  # warm-up and decay over a tenth of the steps each
        run=run,
        batch=BATCH,
        latent_tokens=LATENT,
        dtype="float32" if REHEARSE else "bfloat16",
        eval_tokens=1 << (12 if REHEARSE else 19),
    )


class Enough(Exception):
    """End a run that is only timed."""


def timing(config: TrainConfig, out: Path) -> tuple[float, float, float]:
    """Return the seconds before a run's first step, of a step, and of a validation, without compilation.

    Of the two kinds of steps the slower one counts.
    """
    half = dataclasses.replace(config.superposition, ratio=0.5)
    run = dataclasses.replace(config.run, eval_every=TIMED, log_every=TIMED)
    short = dataclasses.replace(config, steps=4 * TIMED, superposition=half, run=run)
    stops = (0, 1, TIMED - 1, TIMED, 2 * TIMED + 1, 3 * TIMED - 1)  # a validation is in step TIMED - 1
    at: dict[int, float] = {}

    def on_step(step: int) -> None:
        if step in stops:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            at[step] = time.monotonic()
        if step == stops[-1]:
            raise Enough

    began = 0.0
    for part in ("compile", "timing"):  # the first run compiles training and validation
        began = time.monotonic()
        try:
            train(short, out / part, progress=False, on_step=on_step)
        except Enough:
            pass
        record(run=part, took_s=time.monotonic() - began)
    bags, tokens = (at[b] - at[a] for a, b in ((1, TIMED - 1), (2 * TIMED + 1, 3 * TIMED - 1)))
    step = max(bags, tokens) / (TIMED - 2)
    return at[0] - began, step, max(0.0, at[TIMED] - at[TIMED - 1] - step)


def curve(out: Path) -> list[tuple[int, float]]:
    """Steps and held-out losses of a run, also of one that is going."""
    return [(line["step"], line["val_loss"]) for line in read_metrics(out) if "val_loss" in line]


def reached(points: list[tuple[int, float]], loss: float) -> float | None:
    """Return the step at which a curve first is at `loss`, interpolated between validations; None: it never is."""
    before: tuple[int, float] | None = None
    for step, value in points:
        if value <= loss:
            if before is None:
                return float(step)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None


def run_one(name: str, config: TrainConfig, out: Path, distinct: int) -> float:
    """Train, record each validation when it is there, and the run. Return its final held-out loss."""
    began = time.monotonic()
    known = 0

    def report() -> None:
        nonlocal known
        points = curve(out)
        for step, loss in points[known:]:
            record(run=name, at=step, val_loss=loss, at_s=time.monotonic() - began)
        known = len(points)

    def on_step(step: int) -> None:
        if step % config.run.eval_every == 0:
            report()

    result = train(config, out, progress=False, on_step=on_step)
    report()
    phases: dict[str, Any] = {}
    for phase in ("superposition", "recovery"):
        lines = [line for line in read_metrics(out) if line.get("phase") == phase][1:]  # the first holds a warm-up
        for key in ("tokens_per_s", "mfu") if lines else ():
            phases[f"{phase}_{key}"] = float(statistics.median(line[key] for line in lines))
    tokens = result["data_tokens"]
    record(
        run=name,
        val_loss=result["val_loss"],
        steps=config.steps,
        data_tokens=tokens,
        epochs=tokens / distinct,
        **phases,
        train_s=result["seconds"],
        took_s=time.monotonic() - began,
    )
    return result["val_loss"]


def number_of_steps(seconds: float, overhead: float, step: float, validation: float) -> int:
    """The steps of each of two runs in `seconds`, a multiple of VALIDATIONS. A checkpoint and figure end each: 3 s."""
    each = (RESERVE * seconds) / 2 - overhead - 3 - VALIDATIONS * validation
    return max(2, int(each / step) // VALIDATIONS) * VALIDATIONS


def prepared(texts: Path, folder: Path) -> tuple[Shard, Shard]:
    """Write tokens of the collected text, with a tokenizer of its own, and return both splits."""
    config = DataConfig(data=(texts,), vocabulary=VOCABULARY, tokenizer_sample=10_000_000, holdout=0.02)
    prepare(sources(config), config, folder)
    training, held_out = Shard(folder, "train"), Shard(folder, "val")
    record(part="tokens", distinct=len(training), held_out=len(held_out), vocabulary=training.vocabulary)
    return training, held_out


def parts(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Do everything; yield the name of each part at its end."""
    paths = walk(roots())
    yield "walk"
    share = 0.15 * arguments.seconds
    began = time.monotonic()
    most = 1 if REHEARSE else arguments.megabytes
    counts = collect(paths, folder / "text", most * 10**6, lambda: time.monotonic() - began > share)
    held_out = "whole files by a hash of their content; near-identical files may be on both sides"
    record(part="text", held_out=held_out, **counts)
    yield "collect"
    training, _ = prepared(folder / "text", folder / "tokens")
    yield "prepare"

    config = configuration(folder / "tokens", arguments.bag_size, arguments.ratio)
    try:
        times = timing(config, folder)
    except Exception as error:  # of the compiler: a comparison without it is slower and as valid
        record(run="compile", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, compile=False))
        times = timing(config, folder / "eager")
    yield "timing"

    steps = arguments.steps or (5 * VALIDATIONS if REHEARSE else number_of_steps(left(arguments.seconds), *times))
    run = dataclasses.replace(
        config.run, eval_every=steps // VALIDATIONS, checkpoint_every=steps, log_every=max(1, steps // 100)
    )
    config = dataclasses.replace(config, steps=steps, run=run)
    sweep = make_sweep(config, {"compare": ((), [config])})
    tst, baseline = sorted(sweep.runs, key=lambda name: sweep.baselines[name] == name)
    configs = {"baseline": sweep.runs[baseline], "TST": sweep.runs[tst]}
    size, table = parameters(MODEL, training.vocabulary), training.vocabulary * MODEL.dim
    record(
        parameters=size,
        embedding=table,
        head=table,
        others=size - 2 * table,
        dim=MODEL.dim,
        layers=MODEL.layers,
        bag_size=arguments.bag_size,
        ratio=arguments.ratio,
        learning_rate=LEARNING_RATE,
        steps=steps,
        latent_tokens_per_step=BATCH * LATENT,
        tokens_per_parameter=steps * BATCH * LATENT / size,
        compiled=config.run.compile,
        planned_step_ms=1e3 * times[1],
        planned_epochs=" ".join(f"{name} {data_tokens(c) / len(training):.2f}" for name, c in configs.items()),
    )
    final = {}
    for name, c in configs.items():
        final[name] = run_one(name, c, folder / name, len(training))
        yield name
    at = reached(curve(folder / "TST"), final["baseline"])
    record(
        baseline=final["baseline"],
        TST=final["TST"],
        gain=final["baseline"] - final["TST"],
        TST_reaches_baseline_at_step=at,
        of_steps=steps,
        seeds=1,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="for everything after the imports; default: 240")
    parser.add_argument("--megabytes", type=int, default=400, help="of text at most; default: 400")
    parser.add_argument("--bag-size", type=int, default=4, help="s; default: 4, for a model of this size")
    parser.add_argument("--ratio", type=float, default=0.3, help="r; default: 0.3")
    parser.add_argument("--steps", type=int, default=0, help="of each run; default: as many as there is time for")
    arguments = parser.parse_args()
    before = BEGAN
    with tempfile.TemporaryDirectory() as name:
        for part in parts(arguments, Path(name)):
            now = time.monotonic()
            record(part=part, took_s=now - before, left_s=left(arguments.seconds))
            before = now
    return 0


if __name__ == "__main__":
    sys.exit(main())
