"""The figures: loss.png of a run and of a comparison."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .metrics import read_metrics  # noqa: E402

__all__ = ["plot_comparison", "plot_run"]


def _draw(axes: Any, folder: Path, label: str, color: str) -> None:
    metrics = read_metrics(folder)
    training = [m for m in metrics if "loss" in m]
    smooth: list[float] = []
    for i, m in enumerate(training):
        # A running mean that starts anew at the switch, where the loss changes its meaning.
        fresh = i == 0 or m["phase"] != training[i - 1]["phase"]
        smooth.append(m["loss"] if fresh else 0.95 * smooth[-1] + 0.05 * m["loss"])
    axes.plot([m["step"] for m in training], smooth, color=color, alpha=0.45, linewidth=1, label=f"{label}, training")
    held_out = [m for m in metrics if "val_loss" in m]
    axes.plot(
        [m["step"] for m in held_out],
        [m["val_loss"] for m in held_out],
        "o-",
        color=color,
        markersize=4,
        label=f"{label}, held out (next token)",
    )


def _finish(figure: Any, axes: Any, switch: int, path: Path) -> None:
    if switch:
        axes.axvline(switch, color="gray", linestyle="--", linewidth=1, label=f"phase switch, step {switch}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 9))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _switch_step(folder: Path) -> int:
    return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["switch_step"]


def plot_run(folder: Path) -> None:
    """Draws a run's training and held-out loss over its steps to `folder`/loss.png."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    _draw(axes, folder, "run", "C0")
    _finish(figure, axes, _switch_step(folder), folder / "loss.png")


def plot_comparison(baseline: Path, tst: Path, path: Path) -> None:
    """Draws both runs' losses over their steps, the phase switch marked, to `path`."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    _draw(axes, baseline, "baseline", "C0")
    _draw(axes, tst, "TST", "C1")
    _finish(figure, axes, _switch_step(tst), path)
