"""The figures: loss.png of a run and of a comparison, and those of a sweep."""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .metrics import read_metrics  # noqa: E402

__all__ = ["plot_comparison", "plot_grid", "plot_run"]


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


def plot_grid(rows: list[dict[str, Any]], grid: str, options: tuple[str, ...], path: Path) -> None:
    """Draws the final losses of one grid of a sweep to `path`: over its first option, a line for each of the others.

    Points are means over seeds, bars their standard deviations, dashes the baselines: one for all lines where they
    share it, else each in its line's colour. Runs whose baseline is not done are left out, and baselines without a run.
    Nothing is drawn where nothing is left, or where the grid has nothing but seeds.
    """
    all_rows = {row["name"]: row for row in rows}
    mine = [row for row in rows if grid in row["grids"]]
    superposed = [row for row in mine if row["name"] != row["baseline"]]
    drawn = [r for r in superposed or mine if "val_loss" in r and "val_loss" in all_rows[r["baseline"]]]
    if not drawn or not options:
        return
    x, *rest = options
    places = {json.dumps(row["options"][x]): row["options"][x] for row in drawn}
    numbers = all(type(value) in (int, float) for value in places.values())
    at = {key: value if numbers else i for i, (key, value) in enumerate(places.items())}
    # Options that go with the first one, as the width of a model with its depth, say nothing more.
    pairs = {o: {(json.dumps(row["options"][x]), json.dumps(row["options"][o])) for row in drawn} for o in rest}
    rest = [option for option in rest if len(pairs[option]) > len(places)]
    lines: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for row in drawn:
        label = ", ".join(f"{option} {row['options'][option]}" for option in rest)
        lines.setdefault(label, {}).setdefault(at[json.dumps(row["options"][x])], []).append(row)

    figure, axes = plt.subplots(figsize=(8, 4.5))
    below: list[dict[Any, dict[str, dict[str, Any]]]] = []  # of each line, at each place: the baselines by name
    for i, (label, points) in enumerate(lines.items()):
        losses = {place: [row["val_loss"] for row in group] for place, group in sorted(points.items())}
        _points(axes, losses, f"C{i}", "o-", label or ("superposed" if superposed else "baseline"))
        below.append({p: {row["baseline"]: all_rows[row["baseline"]] for row in group} for p, group in points.items()})
    if superposed:
        shared: dict[Any, dict[str, dict[str, Any]]] = {}
        for line in below:
            for place, found in line.items():
                shared[place] = shared.get(place, {}) | found
        if all(len({json.dumps(row["options"]) for row in found.values()}) == 1 for found in shared.values()):
            _baseline(axes, shared, "gray", "")
        else:
            for i, (label, line) in enumerate(zip(lines, below, strict=True)):
                _baseline(axes, line, f"C{i}", label)
    if not numbers:
        axes.set_xticks(list(at.values()), [_plain(str(value)) for value in places.values()])
    axes.set_xlabel(x)
    axes.set_ylabel("final held-out loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _baseline(axes: Any, found: dict[Any, dict[str, dict[str, Any]]], color: str, label: str) -> None:
    """A dashed line: across, where it is the same baseline everywhere."""
    everywhere = {name: row["val_loss"] for rows in found.values() for name, row in rows.items()}
    label = f"baseline {label}".strip()
    if len({json.dumps(row["options"]) for rows in found.values() for row in rows.values()}) == 1:
        look: dict[str, Any] = {"color": color, "linestyle": "--", "linewidth": 1}
        axes.axhline(statistics.mean(everywhere.values()), label=_plain(label), **look)
    else:
        losses = {p: [row["val_loss"] for row in rows.values()] for p, rows in sorted(found.items())}
        _points(axes, losses, color, "s--", label)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: between two dollar signs it takes it for a formula."""
    return text.replace("$", r"\$")


def _points(axes: Any, losses: dict[Any, list[float]], color: str, style: str, label: str) -> None:
    means = [statistics.mean(values) for values in losses.values()]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in losses.values()]
    look: dict[str, Any] = {"color": color, "label": _plain(label), "capsize": 3, "markersize": 4, "linewidth": 1}
    axes.errorbar([*losses], means, deviations, fmt=style, **look)
