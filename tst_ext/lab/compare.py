"""Compare TST with its baseline at equal FLOPs, as a sweep of one grid whose only option is the seed.

Both start from the same weights, take as many steps at the same cost, and are judged by the same held-out loss.
"""

import dataclasses
from pathlib import Path
from typing import Any

from .._cpus import available_cpus
from ..train.config import TrainConfig
from ..train.files import UserError, check
from ..train.plot import plot_losses
from .subprocesses import on_cpu
from .sweep import make_sweep, run_sweep


def compare(config: TrainConfig, folder: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Train TST and its baseline for each seed, by `run_sweep`, and draw loss.png of the first seed in `folder`.

    A folder that holds a part of this comparison is completed. On CPUs, runs at the same time share the cores unless
    `config` has `threads`. Return the content of results.json, with losses and their differences in nats.

    Raises:
        UserError: no superposition, no seeds or one twice, and as `run_sweep`.
    """
    if not any(s > 1 for s in config.superposition.bag_sizes()):
        raise UserError("ratio, bag_size: expected ratio > 0 and bag_size > 1: TST would be the baseline itself")
    check("seeds", seeds, len(seeds) == len(set(seeds)) > 0, "at least one, each once")
    if config.run.threads == 0 and on_cpu(config):
        threads = max(1, available_cpus() // (2 * len(seeds)))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, threads=threads))
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    results = run_sweep(make_sweep(config, {"compare": ((), configs)}), folder)
    rows = {row["name"]: row for row in results["runs"]}
    tst = next(row for row in results["runs"] if row["seed"] == seeds[0] and row["name"] != row["baseline"])
    if tst["status"] == rows[tst["baseline"]]["status"] == "done":
        runs = {"baseline": folder / "runs" / tst["baseline"], "TST": folder / "runs" / tst["name"]}
        plot_losses(runs, folder / "loss.png")
    return results
