"""Baseline against TST at equal FLOPs: two runs that differ in nothing but the superposition phase.

Both start from the same weights (same seed), take the same number of steps at the same cost a step, and are judged by
the same held-out next-token loss. They run side by side, each in a process with half of the cores.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .config import TrainConfig, UserError, check_out, save_config
from .data import prepared_folder
from .metrics import read_metrics
from .plot import plot_comparison

__all__ = ["compare"]

LOG_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on


def available_cores() -> int:
    """Cores this process may use, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compare(config: TrainConfig, folder: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Trains both arms for each seed and writes compare.json, compare.md and loss.png (first seed) to `folder`.

    Returns:
        What compare.json holds: for each seed the result of both arms and the difference of their final validation
        losses in nats, TST minus baseline.

    Raises:
        UserError: the folder is not empty, the ratio is 0, no or repeated seeds, or a run failed; names its log file.
    """
    check_out(folder)
    if not any(s > 1 for s in config.superposition.bag_sizes()):
        raise UserError("ratio, bag_size: expected ratio > 0 and bag_size > 1: TST would be the baseline itself")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: expected at least one, each once, got {seeds}")
    prepared_folder(config.data)  # before the runs start, so that they find it
    folder.mkdir(parents=True, exist_ok=True)

    rows = []
    for seed in seeds:
        threads = config.run.threads or max(1, available_cores() // 2)
        tst = dataclasses.replace(config, seed=seed, run=dataclasses.replace(config.run, threads=threads))
        arms = {
            "baseline": dataclasses.replace(
                tst, superposition=dataclasses.replace(tst.superposition, ratio=0.0, stages=())
            ),
            "tst": tst,
        }
        folders = {name: folder / f"{name}-seed{seed}" for name in arms}
        # One process at a time on a single core, and on a GPU, where two would share its memory.
        on_cpu = config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available())
        together = available_cores() > 1 and on_cpu
        for group in [list(arms)] if together else [[name] for name in arms]:
            _run({name: arms[name] for name in group}, folders)
        results = {name: json.loads((folders[name] / "result.json").read_text()) for name in arms}
        difference = results["tst"]["val_loss"] - results["baseline"]["val_loss"]
        rows.append({"seed": seed, **results, "difference": difference})
    plot_comparison(folder / f"baseline-seed{seeds[0]}", folder / f"tst-seed{seeds[0]}", folder / "loss.png")
    summary = {"seeds": rows, "mean_difference": statistics.mean(row["difference"] for row in rows)}
    (folder / "compare.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(table(summary), encoding="utf-8")
    return summary


def table(summary: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| seed | run | steps | data tokens | time | final validation loss | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary["seeds"]:
        for name, difference in (("baseline", ""), ("tst", f"{row['difference']:+.3f}")):
            r = row[name]
            lines.append(
                f"| {row['seed']} | {name} | {r['steps']} | {r['data_tokens']:,} | {r['seconds']:.0f} s "
                f"| {r['val_loss']:.3f} | {difference} |"
            )
    if len(summary["seeds"]) > 1:
        lines.append(f"| mean | tst - baseline | | | | | {summary['mean_difference']:+.3f} |")
    return "\n".join(lines) + "\n"


def _run(arms: dict[str, TrainConfig], folders: dict[str, Path]) -> None:
    """Runs the arms at the same time and returns when all have succeeded; stops all as soon as one fails."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    logs = {name: folders[name].with_suffix(".log") for name in arms}
    try:
        for name, config in arms.items():
            path = folders[name].with_suffix(".config.json")
            save_config(config, path)
            command = [sys.executable, "-m", "tst_ext", "train", "--config", str(path), "--out", str(folders[name])]
            # OMP_NUM_THREADS: threads that spin for work would take the other run's cores.
            environment = {**os.environ, "OMP_NUM_THREADS": str(config.run.threads)}
            with open(logs[name], "wb") as log:
                processes[name] = subprocess.Popen(
                    [*command, "--no-progress"], stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        _follow(processes, arms, folders)
        failed = {name: status for name, process in processes.items() if (status := process.poll())}
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        for process in processes.values():
            process.wait()
    for name, status in failed.items():
        if status < 0:
            raise UserError(f"{name} run was killed by signal {-status} (log {logs[name]})")
        last = logs[name].read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{name} run failed with status {status} (log {logs[name]}): {' '.join(last)}")


def _follow(
    processes: dict[str, subprocess.Popen[bytes]], arms: dict[str, TrainConfig], folders: dict[str, Path]
) -> None:
    """Shows the progress of the runs, a bar each or lines in a log, until all have ended or one has failed."""
    terminal = sys.stderr.isatty()
    bars = {
        name: tqdm(total=config.steps, desc=f"{name:8} seed {config.seed}", position=i, disable=not terminal)
        for i, (name, config) in enumerate(arms.items())
    }
    next_line = time.monotonic() + LOG_SECONDS
    try:
        while any(process.poll() is None for process in processes.values()):
            if any(process.poll() for process in processes.values()):
                return
            time.sleep(0.5)
            if not terminal and time.monotonic() < next_line:
                continue
            next_line = time.monotonic() + LOG_SECONDS
            for name, bar in bars.items():
                metrics = [m for m in read_metrics(folders[name]) if "loss" in m]
                if not metrics:
                    continue
                last = metrics[-1]
                text = f"{last['phase']} loss {last['loss']:.3f} lr {last['lr']:.1e} {last['tokens_per_s']:,} tokens/s"
                bar.set_postfix_str(text, refresh=False)
                bar.update(last["step"] - bar.n)
                if not terminal:
                    left = (arms[name].steps - last["step"]) * last["seconds"] / last["step"]
                    steps = f"step {last['step']}/{arms[name].steps}"
                    print(f"{name} seed {arms[name].seed}: {steps}, {text}, {left:.0f} s left", file=sys.stderr)
    finally:
        for bar in bars.values():
            bar.close()
