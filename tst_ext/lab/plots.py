"""Draw the figures of sweeps: the final losses of a grid over one of its options."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ..train.plot import figure


def plot_grid(rows: list[dict[str, Any]], grid: str, options: tuple[str, ...], path: Path) -> None:
    """Draw the final losses of one grid of a sweep to `path`: over its first option, a colour for each of the others.

    Points are means over seeds, bars their standard deviations, dashes the baselines of the same seeds. Only pairs of
    run and baseline are drawn, and nothing if there are none or the grid varies only seeds.
    """
    all_rows = {row["name"]: row for row in rows}
    mine = [row for row in rows if grid in row["grids"]]
    superposed = [row for row in mine if row["name"] != row["baseline"]]
    drawn = [row for row in superposed if "difference" in row] if superposed else [r for r in mine if "val_loss" in r]
    if not drawn or not options:
        return
    x, *rest = options
    places = {json.dumps(row["options"][x]): row["options"][x] for row in drawn}
    numbers = all(type(value) in (int, float) for value in places.values())
    at = {key: value if numbers else i for i, (key, value) in enumerate(places.items())}
    line, dashes = ("o-", "s--") if numbers else ("o", "s")  # between two words there is nothing
    # Options that follow from the first one, as the width of a model from its depth, are not named.
    pairs = {o: {(json.dumps(row["options"][x]), json.dumps(row["options"][o])) for row in drawn} for o in rest}
    rest = [option for option in rest if len(pairs[option]) > len(places)]
    drawn.sort(key=lambda row: [v if type(v := row["options"][o]) in (int, float) else 0 for o in rest])
    lines: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for row in drawn:
        label = ", ".join(f"{option} {row['options'][option]}" for option in rest)
        lines.setdefault(label, {}).setdefault(at[json.dumps(row["options"][x])], []).append(row)

    with figure(path, x, "final held-out loss (nats)") as axes:
        for i, (label, points) in enumerate(lines.items()):
            _points(axes, points, f"C{i}", line, label or ("superposed" if superposed else "baseline"))
        if superposed:
            _baselines(axes, lines, all_rows, rest, dashes)
        if not numbers or len(places) <= 12:
            axes.set_xticks(list(at.values()), [_plain(str(value)) for value in places.values()])


def _baselines(axes: Any, lines: dict[str, Any], all_rows: dict[str, Any], rest: list[str], style: str) -> None:
    """Draw the baselines of all lines, each once, in the first line's colour, and across if the same at all places."""
    kinds: dict[tuple[tuple[Any, tuple[str, ...]], ...], tuple[str, str]] = {}  # names by place -> color, label
    for i, (label, points) in enumerate(lines.items()):
        names = {p: tuple(sorted(row["baseline"] for row in group)) for p, group in sorted(points.items())}
        if len(set(names.values())) == 1:
            names = {None: next(iter(names.values()))}
        kinds.setdefault(tuple(names.items()), (f"C{i}", label))
    options = {kind: all_rows[kind[0][1][0]]["options"] for kind in kinds}
    apart = [option for option in rest if len({json.dumps(o[option]) for o in options.values()}) > 1]
    for kind, (color, label) in kinds.items():
        if len(kinds) == 1:
            color, label = "gray", ""
        elif apart:
            label = ", ".join(f"{option} {options[kind][option]}" for option in apart)
        label = f"baseline {label}".strip()
        points = {place: [all_rows[name] for name in names] for place, names in kind}
        if None in points:
            mean = statistics.mean(row["val_loss"] for row in points[None])
            axes.axhline(mean, color=color, linestyle="--", linewidth=1, label=_plain(label))
        else:
            _points(axes, points, color, style, label)


def _points(axes: Any, rows: dict[Any, list[dict[str, Any]]], color: str, style: str, label: str) -> None:
    losses = {place: [row["val_loss"] for row in group] for place, group in sorted(rows.items())}
    means = [statistics.mean(values) for values in losses.values()]
    # NaN draws no bar; a bar of no length would say that there is no spread.
    deviations = [statistics.stdev(values) if len(values) > 1 else math.nan for values in losses.values()]
    look: dict[str, Any] = {"color": color, "label": _plain(label), "capsize": 3, "markersize": 4, "linewidth": 1}
    axes.errorbar([*losses], means, deviations, fmt=style, **look)


def _plain(text: str) -> str:
    """Escape text for matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")
