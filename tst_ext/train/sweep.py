"""A grid of runs, read from a file: which runs it wants, those that are still to do, and one table of what came out.

The file is a configuration, as --config takes it, with tables `[[grid]]`. In these a key that is an option of tst train
has a list of values; the grid is their product. `cases` is a list of tables of options that go together, `seeds` a list
of seeds. Every run's baseline (ratio 0, otherwise the same) belongs to the grid too. Runs that several grids want are
run once.
"""

import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig, UserError, config_dict, config_from_dict, load_config, write_text
from .data import prepared_folder
from .flops import step_flops
from .folder import in_use, lock
from .launch import available_cores, failure, on_cpu, start, stop
from .metrics import read_metrics
from .plot import plot_grid

__all__ = ["Grid", "Sweep", "cells", "load_sweep", "run_sweep", "table"]


def _options() -> dict[str, str]:
    """Option -> the section it stands in, "" for none.

    How a run is carried out (the section `run`) is the same for all runs of a sweep; `seeds` stands for the seed.
    """
    options: dict[str, str] = {}
    for f in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(f.type):
            options |= {option.name: f.name for option in dataclasses.fields(f.type)} if f.name != "run" else {}
        elif f.name != "seed":
            options[f.name] = ""
    return options


OPTIONS = _options()


LONGEST_NAME = 200  # bytes; file systems take 255, and a run's log and options have endings


@dataclass(frozen=True)
class Grid:
    """The runs of one table `[[grid]]`: their names, baselines included, and the options it varies, in its order."""

    name: str
    options: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Every run by its name, the name of each run's baseline, and the grids."""

    runs: dict[str, TrainConfig]
    baselines: dict[str, str]
    grids: tuple[Grid, ...]

    def varied(self) -> list[str]:
        """The options in which runs differ, and those that a grid names."""
        values = {option: {repr(value_of(c, option)) for c in self.runs.values()} for option in OPTIONS}
        named = {option for grid in self.grids for option in grid.options}
        return [option for option, different in values.items() if len(different) > 1 or option in named]


def value_of(config: TrainConfig, option: str) -> Any:
    """The value of an option in `config`, whatever section it stands in, as JSON has it."""
    values = config_dict(config)
    return (values[OPTIONS[option]] if OPTIONS[option] else values)[option]


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep's file.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"sweep {path}: {error}") from error
    grids = values.pop("grid", None)
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"sweep {path}: expected tables [[grid]], got {grids!r}")
    base = config_from_dict(values, str(path))
    if base.run.threads == 0 and on_cpu(base):
        # A core a run: two of the default runs at a time, 32 ms a step each, do what one on both cores does in 16 ms.
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, threads=1))

    runs: dict[str, TrainConfig] = {}
    baselines: dict[str, str] = {}
    read: list[Grid] = []
    for i, grid in enumerate(grids):
        where = f"{path}: grid {grid.get('name', i)}"
        name, seeds, cases = grid.pop("name", f"grid-{i}"), grid.pop("seeds", [base.seed]), grid.pop("cases", [{}])
        if not isinstance(name, str) or re.fullmatch(r"[\w-]+", name) is None or name in [g.name for g in read]:
            raise UserError(f"{where}: name: expected letters, digits and -, each name once, got {name!r}")
        for key, value in {**grid, "seeds": seeds, "cases": cases}.items():
            if not isinstance(value, list) or not value:
                raise UserError(f"{where}: {key}: expected a list of values, got {value!r}")
        if not all(isinstance(case, dict) for case in cases):
            raise UserError(f"{where}: cases: expected a list of tables, got {cases!r}")
        twice = sorted({key for case in cases for key in case if key in (*grid, "seed")})
        if twice:
            raise UserError(
                f"{where}: cases: expected options that the grid does not set itself, got {', '.join(twice)}"
            )
        names: dict[str, None] = {}
        for case, seed, *point in itertools.product(cases, seeds, *grid.values()):
            config = _with_options(base, {"seed": seed, **case, **dict(zip(grid, point, strict=True))}, where)
            baseline = dataclasses.replace(
                config, superposition=dataclasses.replace(base.superposition, ratio=0.0, stages=())
            )
            if not any(s > 1 for s in config.superposition.bag_sizes()):
                config = baseline  # bags of one token are the baseline too
            name_of = {c: _name(base, c) for c in (config, baseline)}
            for c, run in name_of.items():
                if len(run.encode()) > LONGEST_NAME:
                    raise UserError(f"{where}: expected a shorter name of a run, as a folder has it, got {run}")
                if runs.setdefault(run, c) != c:
                    raise UserError(f"{where}: two different runs would have the name {run}")
                names[run] = None
            baselines[name_of[config]] = name_of[baseline]
        options = dict.fromkeys([*grid, *(key for case in cases for key in case)])
        read.append(Grid(name, tuple(options), tuple(names)))
    return Sweep(runs, baselines, tuple(read))


def _with_options(base: TrainConfig, options: dict[str, Any], where: str) -> TrainConfig:
    values = copy.deepcopy(config_dict(base))
    for option, value in options.items():
        if option not in OPTIONS and option != "seed":
            raise UserError(f"{where}: unknown option {option!r}; known: {', '.join(OPTIONS)}, and seeds, cases, name")
        section = OPTIONS.get(option, "")
        (values[section] if section else values)[option] = value
    return config_from_dict(values, where)


def _name(base: TrainConfig, config: TrainConfig) -> str:
    """The options in which a run differs from the file's own, as a folder's name."""
    different = {o: v for o in OPTIONS if (v := value_of(config, o)) != value_of(base, o)}
    parts = [f"{option}={value}" for option, value in different.items()]
    return ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in (*parts, f"seed={config.seed}"))


def run_sweep(
    sweep: Sweep, folder: Path, *, jobs: int = 0, only: tuple[str, ...] = (), progress: bool = True
) -> dict[str, Any]:
    """Does the runs that are not done yet, in `folder`/runs, and keeps results.json, results.csv and the figures.

    A run that was interrupted goes on from its checkpoint. One that fails does not stop the others, and is tried again
    the next time. On CPUs as many run at a time as there are cores for, on GPUs one each.

    Args:
        jobs: runs at a time; 0: as above.
        only: names of runs or grids; no others are run.

    Returns:
        What results.json holds.

    Raises:
        UserError: an unknown name in `only`; `folder` cannot be written to, another sweep uses it, or it holds a run of
            other options by one of these names. Nothing has been run then.
    """
    chosen = _choose(sweep, only)
    for name, config in sweep.runs.items():
        _check_same(folder / "runs" / name, config)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {folder}: {error}") from error
    claim = lock(folder)
    if claim is None:
        raise UserError(f"out {folder}: another sweep runs in this folder")
    try:
        failed = _run(sweep, folder, chosen, jobs, progress)
        results = _write(sweep, folder, failed)
        for grid in sweep.grids:
            plot_grid(results["runs"], grid.name, grid.options, folder / f"{grid.name}.png")
        return results
    finally:
        os.close(claim)


def _choose(sweep: Sweep, only: tuple[str, ...]) -> list[str]:
    """The names of the runs to do, short ones first: what is wrong with a file shows early."""
    grids = {grid.name: grid.runs for grid in sweep.grids}
    for name in only:
        if name not in grids and name not in sweep.runs:
            raise UserError(f"only: expected a grid ({', '.join(grids)}) or the name of a run (--list), got {name!r}")
    wanted = {run for name in only for run in grids.get(name, (name,))} if only else set(sweep.runs)
    return sorted((name for name in sweep.runs if name in wanted), key=lambda name: sweep.runs[name].steps)


def _check_same(folder: Path, config: TrainConfig) -> None:
    if (folder / "config.json").exists():
        saved = load_config(folder / "config.json")
        if dataclasses.replace(saved, run=config.run) != config:
            raise UserError(f"out {folder}: this run was made with other options; choose another --out or remove it")


def _slots(config: TrainConfig, jobs: int) -> list[dict[str, str]]:
    """What each of the runs at a time gets as its environment: on GPUs one of them."""
    if on_cpu(config):
        return [{}] * (jobs or max(1, available_cores() // max(1, config.run.threads)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(jobs or len(devices))]


def _run(sweep: Sweep, folder: Path, chosen: list[str], jobs: int, progress: bool) -> dict[str, str]:
    """Does what is to do; returns what became of the runs that failed."""
    path = {name: folder / "runs" / name for name in chosen}
    waiting = [name for name in chosen if not (path[name] / "result.json").exists()]
    for data in {sweep.runs[name].data for name in waiting}:
        prepared_folder(data)  # before the runs start, so that they find it
    if not waiting:
        return {}
    work = {name: sweep.runs[name].steps * _step_work(sweep.runs[name]) for name in waiting}
    free = _slots(sweep.runs[waiting[0]], jobs)
    running: dict[str, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}
    failed: dict[str, str] = {}
    begin, total, count = time.monotonic(), sum(work.values()), len(waiting)
    try:
        while waiting or running:
            # A run whose sweep was killed goes on without it: its folder is in use, and it is waited for.
            for name in list(waiting):
                if free and not in_use(path[name]):
                    waiting.remove(name)
                    if not (path[name] / "result.json").exists():
                        slot = free.pop()
                        running[name] = start(sweep.runs[name], path[name], slot), slot
            time.sleep(0.2)
            for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                process, slot = running.pop(name)
                free.append(slot)
                if process.returncode:
                    failed[name] = failure(path[name], process.returncode)
                results = _write(sweep, folder, failed)
                if progress:
                    row = next(row for row in results["runs"] if row["name"] == name)
                    done = count - len(waiting) - len(running)
                    left = sum(work[n] for n in (*waiting, *running))
                    seconds = (time.monotonic() - begin) / max(1, total - left) * left
                    loss = failed.get(name) or f"{row['val_loss']:.4f} after {row['seconds']:.0f} s"
                    print(f"{done}/{count} {name}: {loss}; about {seconds / 60:.0f} min left", file=sys.stderr)
    finally:
        stop(process for process, _ in running.values())
    return failed


def _step_work(config: TrainConfig) -> int:
    """FLOPs of a step; those of the default vocabulary where the data brings its own."""
    return step_flops(config.model, config.data.vocabulary, config.batch, config.latent_tokens)


def _write(sweep: Sweep, folder: Path, failed: dict[str, str]) -> dict[str, Any]:
    """results.json and results.csv of what is done by now."""
    varied = sweep.varied()
    rows: dict[str, dict[str, Any]] = {}
    environments: list[dict[str, Any]] = []
    for name, config in sweep.runs.items():
        run = folder / "runs" / name
        row: dict[str, Any] = {
            "name": name,
            "grids": [grid.name for grid in sweep.grids if name in grid.runs],
            "status": "to do",
        }
        row |= {"options": {option: value_of(config, option) for option in varied}, "seed": config.seed}
        row |= {"baseline": sweep.baselines.get(name, name)}
        if (run / "result.json").exists():
            row |= {"status": "done", **json.loads((run / "result.json").read_text(encoding="utf-8"))}
            row |= _history(run)
            facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
            row["parameters"] = facts["parameters"]
            environment = {key: facts[key] for key in ("tst_ext", "torch", "python", "processor", "device", "threads")}
            if environment not in environments:
                environments.append(environment)
        elif name in failed:
            row["status"] = failed[name]
        rows[name] = row
    for row in rows.values():
        baseline = rows[row["baseline"]]
        if row is not baseline and "val_loss" in row and "val_loss" in baseline:
            row["difference"] = row["val_loss"] - baseline["val_loss"]
    results = {"environments": environments, "runs": list(rows.values())}
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    lines = io.StringIO()
    columns = ["name", "grids", *varied, "seed", "status", "parameters", "steps", "switch_step", "data_tokens",
               "seconds", "val_loss", "baseline", "difference"]  # fmt: skip
    writer = csv.DictWriter(lines, dict.fromkeys(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **row["options"], "grids": " ".join(row["grids"])} for row in rows.values())
    write_text(folder / "results.csv", lines.getvalue())
    return results


def _history(run: Path) -> dict[str, Any]:
    """What metrics.jsonl tells of a run.

    curve: step, data tokens, seconds and held-out loss of each validation, None where no line tells; phases: of each
    phase the medians of data tokens a second and of MFU.
    """
    curve: list[list[Any]] = []
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
    """Runs that differ in nothing but the seed, together: their options, seeds, and over these the mean and the spread.

    Returns:
        For each cell options, seeds, val_loss and difference, the last two as (mean, standard deviation) with None for
        the deviation of one run, and for the mean where there is no run or no baseline.
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
    if not values:
        return None, None
    return math.fsum(values) / len(values), statistics.stdev(values) if len(values) > 1 else None


def table(results: dict[str, Any]) -> str:
    """Every cell with its mean loss and its mean difference from the baseline, as Markdown."""

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
