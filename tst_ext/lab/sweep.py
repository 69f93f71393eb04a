"""Do a grid of runs that can be interrupted: choose the runs, run those still to do, and write one table of them.

docs/trainer.md, "Sweeps", has the format of a sweep's file.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import statistics
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._cpus import available_cpus
from ..train.config import TrainConfig, config_dict, config_from_dict, load_config
from ..train.data import Shard
from ..train.distributed import choose_device
from ..train.files import UserError, check, check_writable, lock, write_text
from ..train.metrics import read_metrics
from ..train.prepare import prepared_folder
from ..train.signals import deferred_signals
from .plots import plot_grid
from .subprocesses import Progress, failure, is_running, on_cpu, run_flops, start, stop


def _options() -> dict[str, str]:
    """Map each option that a grid can vary to its section, "" for none. `seeds` stands for the seed."""
    options: dict[str, str] = {}
    for f in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(f.type):
            options |= {option.name: f.name for option in dataclasses.fields(f.type)} if f.name != "run" else {}
        elif f.name != "seed":
            options[f.name] = ""
    return options


OPTIONS = _options()
RESULT = ("steps", "switch_step", "data_tokens", "seconds", "val_loss")  # of result.json
LONGEST_NAME = 200  # bytes; file systems take 255, and a run's log and options have endings


@dataclass(frozen=True)
class Grid:
    """Name the runs of one table `[[grid]]`, with baselines, and the options it varies, in its order."""

    name: str
    options: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Hold the runs of all grids, by their names."""

    runs: dict[str, TrainConfig]
    options: dict[str, dict[str, Any]]  # of each run those in which runs differ, and those that a grid names
    baselines: dict[str, str]  # of each run its baseline, of a baseline itself
    grids: tuple[Grid, ...]


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"sweep {path}: {error}") from error
    grids = values.pop("grid", None)
    valid = isinstance(grids, list) and grids != [] and all(isinstance(grid, dict) for grid in grids)
    check(f"sweep {path}", grids, valid, "tables [[grid]]")
    base = config_from_dict(values, f"sweep {path}")
    if base.run.threads == 0 and on_cpu(base):
        # One core per run: two default runs at a time, at 32 ms per step, do what one on both cores does in 16 ms.
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, threads=1))

    read: dict[str, tuple[tuple[str, ...], list[TrainConfig]]] = {}
    for i, grid in enumerate(grids):
        where = f"sweep {path}: grid {grid.get('name', i)}"
        name = grid.pop("name", f"grid-{i}")
        valid = isinstance(name, str) and re.fullmatch(r"[\w-]{1,50}", name) is not None  # up to 4 bytes each
        check(f"{where}: name", name, valid, "up to 50 letters, digits, _ and -")
        if name in read:
            raise UserError(f"{where}: name: expected another one, {name!r} is a grid already")
        options, points = _points(grid, base.seed, where)
        read[name] = options, [_with_options(base, point, where) for point in points]
    return make_sweep(base, read)


def make_sweep(base: TrainConfig, grids: dict[str, tuple[tuple[str, ...], list[TrainConfig]]]) -> Sweep:
    """Name the runs of all grids by the options in which they differ from `base`, and add their baselines.

    `grids` has the options that a grid varies and its runs. Raises UserError if a name is too long, or two different
    runs would have it.
    """
    runs: dict[str, TrainConfig] = {}
    baselines: dict[str, str] = {}
    made: list[Grid] = []
    own, plain = _values(base), dataclasses.replace(base.superposition, ratio=0.0, stages=())
    for grid, (options, configs) in grids.items():
        names: dict[str, None] = {}
        for config in configs:
            baseline = dataclasses.replace(config, superposition=plain)
            sizes = config.superposition.bag_sizes()
            if not sizes or (max(sizes) == 1 and not config.superposition.reinitialise):
                config = baseline  # bags of one token are the baseline too
            of_both = []
            for c in (config, baseline):
                different = [f"{option}={value}" for option, value in _values(c).items() if value != own[option]]
                run = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in (*different, f"seed={c.seed}"))
                if len(run.encode()) > LONGEST_NAME:
                    raise UserError(f"grid {grid}: expected a shorter name of a run, as a folder has it, got {run}")
                if runs.setdefault(run, c) != c:
                    raise UserError(f"grid {grid}: two different runs would have the name {run}")
                of_both.append(run)
            names |= dict.fromkeys(of_both)
            baselines |= {of_both[1]: of_both[1], of_both[0]: of_both[1]}
        made.append(Grid(grid, options, tuple(names)))

    all_values = {run: _values(config) for run, config in runs.items()}
    named = {option for grid in made for option in grid.options}
    varied = [o for o in OPTIONS if o in named or len({repr(values[o]) for values in all_values.values()}) > 1]
    return Sweep(runs, {run: {o: all_values[run][o] for o in varied} for run in runs}, baselines, tuple(made))


def _points(grid: dict[str, Any], seed: int, where: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the options that a grid varies, and for each of its runs their values, the seed among them."""
    seeds, cases = grid.pop("seeds", [seed]), grid.pop("cases", [{}])
    for key, value in {**grid, "seeds": seeds, "cases": cases}.items():
        check(f"{where}: {key}", value, isinstance(value, list) and value != [], "a list of values")
    check(f"{where}: cases", cases, all(isinstance(case, dict) for case in cases), "a list of tables")
    options = dict.fromkeys([*grid, *(key for case in cases for key in case)])
    for option in options:
        if option not in OPTIONS:
            raise UserError(f"{where}: unknown option {option!r}; known: {', '.join(OPTIONS)}, and seeds, cases, name")
    twice = sorted({key for case in cases for key in case if key in grid})
    if twice:
        raise UserError(f"{where}: cases: expected options that the grid does not set itself, got {', '.join(twice)}")
    product = itertools.product(cases, seeds, *grid.values())
    return tuple(options), [
        {"seed": seed, **case, **dict(zip(grid, point, strict=True))} for case, seed, *point in product
    ]


def _values(config: TrainConfig) -> dict[str, Any]:
    """Return the value of each option, whatever section it stands in, as JSON has it."""
    values = config_dict(config)
    return {option: (values[section] if section else values)[option] for option, section in OPTIONS.items()}


def _with_options(base: TrainConfig, options: dict[str, Any], where: str) -> TrainConfig:
    values = config_dict(base)
    for option, value in options.items():
        section = OPTIONS.get(option, "")  # none: the seed
        (values[section] if section else values)[option] = value
    return config_from_dict(values, where)


def run_sweep(
    sweep: Sweep, folder: Path, *, jobs: int = 0, only: tuple[str, ...] | None = None, progress: bool = True
) -> dict[str, Any]:
    """Do the runs that are not done yet, in `folder`/runs, and keep results.json, results.csv and the figures.

    An interrupted run resumes from its checkpoint. One that fails does not stop the others, and is tried again the next
    time. Return the content of results.json.

    Args:
        jobs: runs at a time; 0: as many as there are cores for, or one per GPU.
        only: names of runs or grids; no others are run.
        progress: whether to show steps, losses and the time left.

    Raises:
        UserError: an unknown name in `only`; the device or the data cannot be used; `folder` cannot be written to,
            another sweep uses it, or it holds a damaged run or one of other options or data. Nothing is run then.
    """
    check_writable(folder)
    to_do = [name for name in _choose(sweep, only) if not (folder / "runs" / name / "result.json").exists()]
    for name, config in sweep.runs.items():
        _check_same(folder / "runs" / name, config)
    results = _Results(sweep, folder)
    device = next(iter(sweep.runs.values())).run.device
    if to_do and not (torch.cuda.is_available() and re.fullmatch(r"auto|cuda(:\d+)?", device)):
        choose_device(device)  # which takes memory of a GPU, so the runs do it there
    moved = [name for name in results.data if _saved(folder / "runs" / name).data != sweep.runs[name].data]
    for data in {sweep.runs[name].data for name in (*to_do, *moved)}:
        prepared = prepared_folder(data)  # before the runs start, so that they find it
        now = Shard(prepared, "train", data).sha256, Shard(prepared, "val", data).sha256
        for name, read in results.data.items():
            if sweep.runs[name].data == data and read != now:
                before = f"{folder / 'runs' / name} has read (sha256 {read[0]}, held out {read[1]})"
                remedy = "choose another --out or remove that folder"
                raise UserError(f"data {prepared}: expected what {before}, got {now[0]}, {now[1]}; {remedy}")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    claim = lock(folder)
    if claim is None:
        raise UserError(f"out {folder}: another sweep runs in this folder")
    try:
        results.write()
        _run(sweep, folder, to_do, jobs, results, progress)
        for grid in sweep.grids:
            plot_grid(results.contents["runs"], grid.name, grid.options, folder / f"{grid.name}.png")
        return results.contents
    finally:
        os.close(claim)


def _choose(sweep: Sweep, only: tuple[str, ...] | None) -> list[str]:
    """Return the names of the runs to do, long ones first: few cores are idle at the end."""
    grids = {grid.name: grid.runs for grid in sweep.grids}
    wanted = f"a grid ({', '.join(grids)}) or the name of a run (--list)"
    if only == ():
        raise UserError(f"only: expected {wanted}, got nothing")
    for name in only or ():
        check("only", name, name in grids or name in sweep.runs, wanted)
    chosen = {run for name in only for run in grids.get(name, (name,))} if only else set(sweep.runs)
    return sorted((name for name in sweep.runs if name in chosen), key=lambda name: -run_flops(sweep.runs[name]))


def _saved(folder: Path) -> TrainConfig:
    return load_config(folder / "config.json")


def _check_same(folder: Path, config: TrainConfig) -> None:
    if (folder / "config.json").exists():
        saved = _saved(folder)
        # Data may have moved: checksums tell whether it is the same.
        data = dataclasses.replace(saved.data, data=config.data.data, tokenizer=config.data.tokenizer)
        before, now = ({**_values(c), "seed": c.seed} for c in (dataclasses.replace(saved, data=data), config))
        for option in now:
            if before[option] != now[option]:
                other = f"other options: {option} was {before[option]!r}, is {now[option]!r}"
                raise UserError(f"out {folder}: this run was made with {other}; choose another --out or remove it")
    elif (folder / "result.json").exists():
        raise UserError(f"out {folder}: it has a result.json but no config.json, which would say of what run")


def _slots(config: TrainConfig, jobs: int) -> list[dict[str, str]]:
    """Return the environments of the runs at a time: on GPUs each has one of them."""
    if on_cpu(config):
        return [{}] * (jobs or max(1, available_cpus() // max(1, config.run.threads)))
    if ":" in config.run.device:  # a certain one
        return [{}] * (jobs or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(jobs or len(devices))]


def _run(sweep: Sweep, folder: Path, to_do: list[str], jobs: int, results: "_Results", shown: bool) -> None:
    if not to_do:
        return
    waiting, path = list(to_do), {name: folder / "runs" / name for name in to_do}
    free = _slots(sweep.runs[waiting[0]], jobs)
    running: dict[str, tuple[Any, dict[str, str]]] = {}  # the process and its slot
    progress = Progress({name: sweep.runs[name] for name in to_do}, folder / "runs", shown)
    try:
        while waiting or running:
            # Runs whose sweep was killed go on without it: each takes the place of another until it ends.
            going = {name for name in waiting if is_running(path[name])}
            for name in [name for name in waiting if name not in going]:
                if (path[name] / "result.json").exists():
                    waiting.remove(name)
                    progress.ended(results.ended(name))
                elif len(free) > len(going):
                    waiting.remove(name)
                    with deferred_signals():
                        slot = free.pop()
                        running[name] = start(sweep.runs[name], path[name], slot), slot
            time.sleep(0.2)
            for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                process, slot = running.pop(name)
                free.append(slot)
                failed = failure(path[name], process.returncode) if process.returncode else None
                progress.ended(results.ended(name, failed))
            progress.show([*running, *going])
    finally:
        stop(process for process, _ in running.values())
        progress.close()


class _Results:
    """Keep results.json and results.csv up to date. Raise UserError if a file of a finished run is damaged."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.folder = folder
        self.environments: list[dict[str, Any]] = []
        self.data: dict[str, tuple[str, str]] = {}  # checksums of the texts that a finished run has read
        self.rows: dict[str, dict[str, Any]] = {}
        for name, config in sweep.runs.items():
            self.rows[name] = {
                "name": name,
                "grids": [grid.name for grid in sweep.grids if name in grid.runs],
                "status": "to do",
                "options": sweep.options[name],
                "seed": config.seed,
                "baseline": sweep.baselines[name],
            }
            if (folder / "runs" / name / "result.json").exists():
                self._add(name)

    @property
    def contents(self) -> dict[str, Any]:
        return {"environments": self.environments, "runs": list(self.rows.values())}

    def ended(self, name: str, failed: str | None = None) -> dict[str, Any]:
        """Return the row of a run that ended, with a result or as `failed` says."""
        if failed is None:
            self._add(name)
        else:
            self.rows[name]["status"] = failed
        self.write()
        return self.rows[name]

    def _add(self, name: str) -> None:
        run = self.folder / "runs" / name
        try:
            facts, result = (json.loads((run / f"{file}.json").read_bytes()) for file in ("environment", "result"))
            environment = {key: facts[key] for key in ("tst_ext", "torch", "python", "processor", "device", "threads")}
            row = {"status": "done", "parameters": facts["parameters"], **{key: result[key] for key in RESULT}}
            row |= {"val_loss": float(result["val_loss"]), **_history(run)}
            self.data[name] = facts["data"], facts["held_out"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            files = "environment.json, result.json or metrics.jsonl"
            raise UserError(f"out {run}: {files} is damaged ({error!r}); remove the folder") from error
        self.rows[name] |= row
        if environment not in self.environments:
            self.environments.append(environment)

    def write(self) -> None:
        for row in self.rows.values():
            baseline = self.rows[row["baseline"]]
            if row is not baseline and "val_loss" in row and "val_loss" in baseline:
                if self.data[row["name"]] == self.data[baseline["name"]]:
                    row["difference"] = row["val_loss"] - baseline["val_loss"]
                else:
                    row["status"] = f"is done, but has read other data than {baseline['name']}: no difference"
        write_text(self.folder / "results.json", json.dumps(self.contents, indent=1) + "\n")
        lines = io.StringIO()
        rows = list(self.rows.values())
        columns = ["name", "grids", *rows[0]["options"], "seed", "status", "parameters", *RESULT, "baseline",
                   "difference"]  # fmt: skip
        writer = csv.DictWriter(lines, dict.fromkeys(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **row["options"], "grids": " ".join(row["grids"])} for row in rows)
        write_text(self.folder / "results.csv", lines.getvalue())


def _history(run: Path) -> dict[str, Any]:
    """Sum up the metrics of a run: the curve of validations, and for each phase the medians of tokens_per_s and MFU."""
    curve: list[list[Any]] = []  # step, data tokens, seconds (both None if no line has them) and held-out loss
    phases: dict[str, list[dict[str, Any]]] = {}
    last: dict[str, Any] = {"step": 0}
    for line in read_metrics(run):
        if "val_loss" in line:
            at = last if last["step"] == line["step"] else {}
            curve.append([line["step"], at.get("data_tokens"), at.get("seconds"), line["val_loss"]])
        else:
            last = line
            phases.setdefault(line["phase"], []).append(line)
    medians = {
        phase: {key: statistics.median(line[key] for line in lines) for key in ("tokens_per_s", "mfu")}
        for phase, lines in phases.items()
    }
    return {"curve": curve, "phases": medians}


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put runs together that differ only in the seed: options, seeds, and val_loss and difference over the seeds.

    The last two are (mean, standard deviation). The deviation of one run is None, and so is the mean of none.
    """
    together: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault(json.dumps(row["options"]), []).append(row)
    return [
        {
            "options": group[0]["options"],
            "seeds": [row["seed"] for row in group if "val_loss" in row],
            **{key: _spread([row[key] for row in group if key in row]) for key in ("val_loss", "difference")},
        }
        for group in together.values()
    ]


def _spread(values: list[float]) -> tuple[float | None, float | None]:
    mean = math.fsum(values) / len(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def table(results: dict[str, Any]) -> str:
    """Write every cell with its mean loss and its mean difference from the baseline, as Markdown."""

    def shown(value: tuple[float | None, float | None], sign: str) -> str:
        mean, deviation = value
        text = "" if mean is None else f"{mean:{sign}.4f}"
        return text if deviation is None else f"{text} ± {deviation:.4f}"

    options = list(results["runs"][0]["options"])
    head = [*options, "runs", "held-out loss", "less the baseline's"]
    lines = [head, ["---"] * len(head)]
    for cell in cells(results["runs"]):
        losses = [shown(cell["val_loss"], ""), shown(cell["difference"], "+")]
        lines.append([*(str(cell["options"][option]) for option in options), str(len(cell["seeds"])), *losses])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
