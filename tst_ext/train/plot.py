"""Draw loss.png, the training and held-out losses of a run, or of several, over their steps."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .metrics import read_metrics  # noqa: E402


@contextmanager
def figure(path: Path, x: str, y: str) -> Iterator[Any]:
    """Yield the axes of a new figure, then label them with `x` and `y` and write the figure to `path`."""
    drawn, axes = plt.subplots(figsize=(8, 4.5))
    yield axes
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def plot_losses(runs: dict[str, Path], path: Path) -> None:
    """Draw the losses of the runs in these folders, by their labels, and the last of their phase switches."""
    with figure(path, "step", "loss (nats)") as axes:
        switch = 0
        for i, (label, folder) in enumerate(runs.items()):
            facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
            switch = max(switch, facts["switch_step"])
            metrics = read_metrics(folder)
            training = [m for m in metrics if "loss" in m]
            smooth: list[float] = []
            for before, m in zip([None, *training], training, strict=False):
                # A running mean that starts again at the switch, where the loss changes its meaning.
                fresh = before is None or m["phase"] != before["phase"]
                smooth.append(m["loss"] if fresh else 0.95 * smooth[-1] + 0.05 * m["loss"])
            steps, color = [m["step"] for m in training], f"C{i}"
            axes.plot(steps, smooth, color=color, alpha=0.45, linewidth=1, label=f"{label}, training")
            held_out = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
            look: dict[str, Any] = {"color": color, "markersize": 4, "label": f"{label}, held out (next token)"}
            axes.plot(*zip(*held_out, strict=True), "o-", **look)
        if switch:
            axes.axvline(switch, color="gray", linestyle="--", linewidth=1, label=f"phase switch, step {switch}")
        axes.set_ylim(top=min(axes.get_ylim()[1], 9))
