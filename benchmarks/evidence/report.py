"""Draws the figures of docs/evidence.md and writes its tables, from study.json: `python benchmarks/evidence/report.py`.

study.json is the results.json of the sweeps curves.toml and then study.toml in one folder. With --check nothing is
written: the exit status says whether the page's tables are those of the results.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from tst_ext.train.plot import plot_grid
from tst_ext.train.sweep import load_sweep

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
ROWS = json.loads((HERE / "study.json").read_text())["runs"]
BASE = next(row["options"] for row in ROWS if row["name"] == "seed=0")


def runs(**options):
    """The runs of one cell, in the order of their seeds: the base's options but for those given."""
    wanted = BASE | options
    found = [row for row in ROWS if row["options"] == wanted and "val_loss" in row]
    return sorted(found, key=lambda row: row["seed"])


def mean(rows, key="val_loss"):
    return statistics.mean(row[key] for row in rows)


def spread(rows, key="val_loss", sign=""):
    values = [row[key] for row in rows]
    text = f"{statistics.mean(values):{sign}.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def gain(rows):
    return spread(rows, "difference", "+")


def each(rows):
    """The difference of every seed."""
    return ", ".join(f"{row['difference']:+.3f}" for row in rows)


def table(*lines):
    head, *rest = ([str(cell) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


# Equal FLOPs, equal loss, equal data

STEPS = (2000, 4000, 8000, 16000)


def baseline_steps(loss):
    """Steps of a baseline of that final loss, interpolated over the logarithm of the steps; None beyond the runs."""
    points = [(steps, mean(runs(steps=steps, ratio=0.0))) for steps in STEPS]
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if low <= loss <= high:
            return a * (b / a) ** ((high - loss) / (high - low))
    return None


def reaches(row, loss):
    """Where a run's held-out loss comes down to `loss` in its recovery phase: step and share of its time, interpolated
    between validations."""
    curve = [point for point in row["curve"] if point[0] >= row["switch_step"]]
    for (a, _, t, high), (b, _, u, low) in zip(curve, curve[1:], strict=False):
        if low <= loss <= high and low < high:
            share = (high - loss) / (high - low)
            return f"step {a + share * (b - a):,.0f}, {100 * (t + share * (u - t)) / curve[-1][2]:.0f} % of the time"
    return "never"


def stays_below(row, base):
    """The step of the validation from which on a run's held-out loss is below its baseline's."""
    first = None
    for (step, _, _, loss), (_, _, _, other) in zip(row["curve"], base["curve"], strict=True):
        first = (first or step) if loss < other else None
    return f"step {first:,}" if first else "never"


def table_equal_flops():
    lines = [("seed", "baseline", "TST", "difference", "at the switch", "below the baseline from", "at its final loss")]
    for base, row in zip(runs(ratio=0.0), runs(), strict=True):
        both = zip(row["curve"], base["curve"], strict=True)
        (switch,) = [tst[3] - plain[3] for tst, plain in both if tst[0] == row["switch_step"]]
        losses = (f"{base['val_loss']:.3f}", f"{row['val_loss']:.3f}", f"{row['difference']:+.3f}", f"{switch:+.3f}")
        lines.append((row["seed"], *losses, stays_below(row, base), reaches(row, base["val_loss"])))
    lines.append(("mean", spread(runs(ratio=0.0)), spread(runs()), gain(runs()), "", "", ""))
    return table(*lines)


def table_equal_loss():
    lines = [("steps", "s", "final loss of TST", "steps of a baseline with it", "times as many")]
    for steps in STEPS:
        for s in (2, 4):
            if not (rows := runs(steps=steps, bag_size=s)):
                continue
            loss = mean(rows)
            even = baseline_steps(loss)
            shown = ("not within these runs", "") if even is None else (f"{even:,.0f}", f"{even / steps:.2f}")
            lines.append((steps, s, f"{loss:.3f}", *shown))
    return table(*lines)


def table_equal_data():
    """s = 6 for r = 0.2 of the steps reads twice as many tokens a step as a baseline does."""
    lines = [("run", "steps", "data tokens", "FLOPs beside the baseline's", "held-out loss")]
    base = runs(ratio=0.0)
    cells = (("baseline", base), ("TST, s = 6", runs(bag_size=6)), ("baseline, longer", runs(ratio=0.0, steps=16000)))
    for name, rows in cells:
        flops = f"{rows[0]['steps'] / base[0]['steps']:.0f}"
        lines.append((name, rows[0]["steps"], f"{rows[0]['data_tokens'] / 1e6:.2f} M", flops, spread(rows)))
    return table(*lines)


# The other claims


def table_bag_size():
    lines = [("s", "held-out loss", "difference", "each seed")]
    lines.append((1, spread(runs(ratio=0.0)), "", ""))
    lines += [(s, spread(rows), gain(rows), each(rows)) for s in (2, 3, 4, 6, 8) if (rows := runs(bag_size=s))]
    return table(*lines)


def table_ratio():
    lines = [("r", "held-out loss", "difference", "each seed")]
    lines += [(r, spread(rows), gain(rows), each(rows)) for r in (0.1, 0.2, 0.4) if (rows := runs(ratio=r))]
    return table(*lines)


def table_bag_size_and_ratio():
    lines = [("r \\ s", "2", "4", "8")]
    for r in (0.1, 0.2, 0.4, 0.6):
        lines.append((r, *(f"{runs(ratio=r, bag_size=s)[0]['difference']:+.3f}" for s in (2, 4, 8))))
    return table(*lines)


def table_sides():
    lines = [("superposed", "held-out loss", "difference", "each seed")]
    lines += [(sides, spread(rows), gain(rows), each(rows)) for sides in ("both", "input", "output")
              if (rows := runs(sides=sides))]  # fmt: skip
    return table(*lines)


def table_weights():
    lines = [("s", "loss of a bag", "held-out loss", "difference", "each seed")]
    for s, name, options in (
        (4, "uniform weights", {}),
        (4, "power law 1/i", {"position_weights": "power_law"}),
        (4, "sum-to-one objective (mce_alt)", {"objective": "mce_alt"}),
        (8, "uniform weights", {}),
        (8, "power law 1/i", {"position_weights": "power_law"}),
    ):
        rows = runs(bag_size=s, **options)
        lines.append((s, name, spread(rows), gain(rows), each(rows)))
    return table(*lines)


def table_reinitialise():
    lines = [("embedding and head at the switch", "held-out loss", "difference", "each seed")]
    for name, value in (("carry over", False), ("are drawn anew", True)):
        rows = runs(reinitialise=value)
        lines.append((name, spread(rows), gain(rows), each(rows)))
    return table(*lines)


def table_steps():
    lines = [("steps", "tokens a parameter", "baseline", "s = 2", "s = 4", "each seed, s = 4")]
    for steps in STEPS:
        base, two, four = (runs(steps=steps, **cell) for cell in ({"ratio": 0.0}, {"bag_size": 2}, {}))
        length = base[0]["data_tokens"] / base[0]["parameters"]
        lines.append((steps, f"{length:.1f}", spread(base), gain(two) if two else "", gain(four), each(four)))
    return table(*lines)


def sizes():
    grid = [row for row in ROWS if "model-size" in row["grids"] and "val_loss" in row]
    keys = ("dim", "layers", "heads", "kv_heads", "ffn_dim")
    found = {json.dumps({k: row["options"][k] for k in keys}): row["parameters"] for row in grid}
    return [(parameters, json.loads(size)) for size, parameters in sorted(found.items(), key=lambda item: item[1])]


def table_model_size():
    lines = [("parameters", "dim, layers", "tokens a parameter", "baseline", "TST", "difference", "each seed")]
    for parameters, size in sizes():
        rows, base = runs(**size), runs(**size, ratio=0.0)
        length = base[0]["data_tokens"] / parameters
        lines.append((f"{parameters / 1e6:.2f} M", f"{size['dim']}, {size['layers']}", f"{length:.1f}",
                      spread(base), spread(rows), gain(rows), each(rows)))  # fmt: skip
    return table(*lines)


TABLES = {
    name.removeprefix("table_").replace("_", "-"): function
    for name, function in globals().items()
    if name.startswith("table_")
}


def band(axes, rows, color, label):
    """Curves over steps: the mean over seeds, and the least and greatest."""
    steps = [point[0] for point in rows[0]["curve"]]
    losses = [[row["curve"][i][3] for row in rows] for i in range(len(steps))]
    axes.plot(steps, [statistics.mean(values) for values in losses], color=color, label=label)
    axes.fill_between(steps, [min(v) for v in losses], [max(v) for v in losses], color=color, alpha=0.25)


def draw_panels():
    """As the paper's Figure 3: what equal FLOPs, equal loss and equal data show."""
    figure, (flops, loss, data) = plt.subplots(1, 3, figsize=(13, 4))
    band(flops, runs(ratio=0.0), "C0", "baseline")
    band(flops, runs(), "C1", "TST, s = 4, r = 0.2")
    flops.axvline(runs()[0]["switch_step"], color="gray", linestyle="--", linewidth=1, label="phase switch")
    flops.set(title="equal FLOPs", xlabel="step", ylabel="held-out loss (nats)", ylim=(3.2, 6))
    for axes, key in ((loss, "steps"), (data, "data_tokens")):
        for label, color, cells in (
            ("baseline", "C0", [runs(steps=steps, ratio=0.0) for steps in STEPS]),
            ("TST, s = 4, r = 0.2", "C1", [runs(steps=steps) for steps in STEPS]),
        ):
            deviations = [statistics.stdev(row["val_loss"] for row in rows) for rows in cells]
            axes.errorbar([rows[0][key] for rows in cells], [mean(rows) for rows in cells], deviations,
                          fmt="o-", color=color, capsize=3, label=label)  # fmt: skip
        axes.set_xscale("log")
        ticks = [rows[0][key] for rows in cells]
        axes.set_xticks(ticks, [f"{tick:,}" if key == "steps" else f"{tick / 1e6:.1f} M" for tick in ticks])
        axes.minorticks_off()
    level = mean(runs())
    even = baseline_steps(level)
    if even is not None:
        loss.annotate("", (even, level), (8000, level), arrowprops={"arrowstyle": "<->"})
        loss.text(math.sqrt(8000 * even), level, f"{even / 8000:.2f} x", ha="center", va="bottom", fontsize=8)
    loss.set(title="equal loss", xlabel="steps of the run (FLOPs)", ylabel="final held-out loss (nats)")
    data.set(title="equal data", xlabel="data tokens of the run", ylabel="final held-out loss (nats)")
    for axes in (flops, loss, data):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "evidence" / "panels.png", dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the tables differ")
    check = parser.parse_args().check
    page = DOCS / "evidence.md"
    before = after = page.read_text(encoding="utf-8")
    for name, function in TABLES.items():
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if marked.search(after) is None:
            raise LookupError(f"{page}: no place for the table {name}")
        text = function()
        after = marked.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", after)
    if check:
        print("the tables are those of the results" if after == before else f"{page}: tables differ from study.json")
        return after != before
    page.write_text(after, encoding="utf-8")
    (DOCS / "evidence").mkdir(exist_ok=True)
    draw_panels()
    shown = re.findall(r"\(evidence/([\w-]+)\.png\)", after)
    for grid in load_sweep(HERE / "study.toml").grids:
        if grid.name in shown:
            plot_grid(ROWS, grid.name, grid.options, DOCS / "evidence" / f"{grid.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
