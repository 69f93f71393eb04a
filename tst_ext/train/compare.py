"""Baseline against TST at equal FLOPs: two runs that differ in nothing but the superposition phase.

Both start from the same weights (same seed), take the same number of steps at the same cost a step, and are judged by
the same held-out next-token loss. They run side by side, each in a process with half of the cores.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .config import TrainConfig, UserError, check_out
from .data import prepared_folder
from .launch import available_cores, deferred_signals, failure, on_cpu, start, stop
from .metrics import read_metrics
from .plot import plot_comparison

__all__ = ["compare"]

LOG_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on


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
        together = available_cores() > 1 and on_cpu(config)
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
    try:
        for name, config in arms.items():
            with deferred_signals():
                processes[name] = start(config, folders[name])
        _follow(processes, arms, folders)
        failed = {name: status for name, process in processes.items() if (status := process.poll())}
    finally:
        stop(processes.values())
    for name, status in failed.items():
        raise UserError(f"{name} run {failure(folders[name], status)}")


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
