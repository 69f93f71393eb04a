"""Draws the figures of docs/evidence.md and writes its tables, from study.json: `python benchmarks/evidence/report.py`.

study.json is the results.json of the sweeps curves.toml and then study.toml in one folder; --results takes a new one,
which becomes study.json when all is drawn. further.json is the results.json of further.toml. With --check nothing is
written: the exit status says whether the page's tables, the summary's figures among them, are those of the results.
"""

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from tst_ext.lab.plots import plot_grid
from tst_ext.lab.sweep import load_sweep

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
PARSER = argparse.ArgumentParser(description=__doc__.split("\n")[0])
PARSER.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the tables differ")
PARSER.add_argument("--results", type=Path, default=HERE / "study.json", help="results.json of a new study")
ARGUMENTS = PARSER.parse_args()
ROWS = json.loads(ARGUMENTS.results.read_text())["runs"]
FURTHER = json.loads((HERE / "further.json").read_text())["runs"]
BASE = next(row["options"] for row in ROWS if row["name"] == "seed=0")
if undone := [row["name"] for row in ROWS if row["status"] != "done"]:
    sys.exit(f"{ARGUMENTS.results}: expected a complete study, got {len(undone)} runs that are not done: {undone}")
if any(len(row["curve"]) < 20 for row in ROWS if "equal-flops" in row["grids"]):
    sys.exit(f"{ARGUMENTS.results}: the runs of equal-flops have too few validations; do curves.toml first")


def runs(**options):
    """The runs of one cell, in the order of their seeds: the base's options but for those given."""
    wanted = BASE | options
    found = [row for row in ROWS if row["options"] == wanted]
    return sorted(found, key=lambda row: row["seed"])


def mean(rows, key="val_loss"):
    return statistics.mean(row[key] for row in rows)


def spread(rows, key="val_loss", sign=""):
    return shown([row[key] for row in rows], sign)


def shown(values, sign="+"):
    text = f"{statistics.mean(values):{sign}.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def less(rows, others):
    """By how much the loss is greater than that of others, for each seed."""
    return [row["val_loss"] - other["val_loss"] for row, other in zip(rows, others, strict=True)]


def clear(values):
    """What makes a difference of three seeds one: all have its sign, and it is above two of its standard errors."""
    same = len({value > 0 for value in values}) == 1
    return same and abs(statistics.mean(values)) > 2 * statistics.stdev(values) / math.sqrt(len(values))


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


def baseline_steps(loss, seed=None):
    """Steps of a baseline of that final loss, of one seed or the mean, interpolated over the logarithm of the steps.

    Beyond the runs 0 or infinity.
    """
    cells = [[row for row in runs(steps=steps, ratio=0.0) if seed in (None, row["seed"])] for steps in STEPS]
    points = [(steps, mean(rows)) for steps, rows in zip(STEPS, cells, strict=True)]
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if low <= loss <= high:
            return a * (b / a) ** ((high - loss) / (high - low))
    return 0 if loss > points[0][1] else math.inf


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
    """The step of the validation from which on a run's held-out loss is below its baseline's; None: not at the end."""
    first = None
    for (step, _, _, loss), (_, _, _, other) in zip(row["curve"], base["curve"], strict=True):
        first = (first or step) if loss < other else None
    return first


def table_equal_flops():
    lines = [("seed", "baseline", "TST", "difference", "at the switch", "ahead from", "reaches its final loss")]
    for base, row in zip(runs(ratio=0.0), runs(), strict=True):
        both = zip(row["curve"], base["curve"], strict=True)
        (switch,) = [tst[3] - plain[3] for tst, plain in both if tst[0] == row["switch_step"]]
        losses = (f"{base['val_loss']:.3f}", f"{row['val_loss']:.3f}", f"{row['difference']:+.3f}", f"{switch:+.3f}")
        first = stays_below(row, base)
        ahead = f"step {first:,}" if first else "never"
        lines.append((row["seed"], *losses, ahead, reaches(row, base["val_loss"])))
    lines.append(("mean", spread(runs(ratio=0.0)), spread(runs()), gain(runs()), "", "", ""))
    return table(*lines)


def table_equal_loss():
    lines = [("steps", "s", "final loss of TST", "steps of a baseline with it", "times as many", "each seed")]
    for steps in STEPS:
        for s in (2, 4):
            if not (rows := runs(steps=steps, bag_size=s)):
                continue
            even = baseline_steps(mean(rows))
            if even in (0, math.inf):
                count = f"fewer than {STEPS[0]:,}" if even == 0 else f"more than {STEPS[-1]:,}"
                lines.append((steps, s, f"{mean(rows):.3f}", count, "below 1" if even == 0 else "above 1", ""))
            else:
                seeds = ", ".join(f"{baseline_steps(row['val_loss'], row['seed']) / steps:.2f}" for row in rows)
                lines.append((steps, s, f"{mean(rows):.3f}", f"{even:,.0f}", f"{even / steps:.2f}", seeds))
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
    lines = [("s", "r", "held-out loss", "difference", "each seed")]
    for s, r in ((4, 0.1), (4, 0.2), (4, 0.4), (4, 0.6), (2, 0.2), (2, 0.4)):
        rows = runs(bag_size=s, ratio=r)
        lines.append((s, r, spread(rows), gain(rows), each(rows)))
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


def table_further():
    lines = [("model", "baseline", "TST", "difference", "each seed")]
    for grid, name in (("dense", "dense"), ("experts", "16 experts"), ("muon", "dense, Muon")):
        rows = sorted((row for row in FURTHER if grid in row["grids"]), key=lambda row: row["seed"])
        if all(row["status"] == "done" for row in rows):
            base, tst = (
                [row for row in rows if (row["baseline"] == row["name"]) is is_base] for is_base in (True, False)
            )
            lines.append((name, spread(base), spread(tst), gain(tst), each(tst)))
    return table(*lines)


def pairs():
    """What the verdicts rest on: name, and the loss of one condition less that of the other for each seed."""
    small, base, large = (runs(**size) for _, size in sizes())
    small_bags = less(runs(bag_size=2, ratio=0.4), runs(bag_size=2))
    return {
        "s = 2 less s = 4": less(runs(bag_size=2), base),
        "s = 8 less s = 4": less(runs(bag_size=8), base),
        "r = 0.1 less r = 0.2": less(runs(ratio=0.1), base),
        "r = 0.4 less r = 0.2": less(runs(ratio=0.4), base),
        "r = 0.6 less r = 0.2": less(runs(ratio=0.6), base),
        "r = 0.4 less r = 0.2, s = 2": small_bags,
        "the same of s = 2, less that of s = 4": [
            a - b for a, b in zip(small_bags, less(runs(ratio=0.4), base), strict=True)
        ],
        "both sides less input alone": less(base, runs(sides="input")),
        "both sides less output alone": less(base, runs(sides="output")),
        "power law less uniform, s = 4": less(runs(position_weights="power_law"), base),
        "power law less uniform, s = 8": less(runs(bag_size=8, position_weights="power_law"), runs(bag_size=8)),
        "mce_alt less mce": less(runs(objective="mce_alt"), base),
        "drawn anew less carried over": less(runs(reinitialise=True), base),
        "gain of 8000 steps less that of 16,000": gains_less(runs(steps=16000), base),
        "gain of 1.12 M less that of 0.45 M parameters": gains_less(small, base),
        "gain of 1.12 M less that of 1.85 M parameters": gains_less(large, base),
    }


def gains_less(rows, base):
    return [row["difference"] - other["difference"] for row, other in zip(rows, base, strict=True)]


def table_pairs():
    lines = [("difference of losses, or of gains", "mean", "each seed", "clear")]
    for name, values in pairs().items():
        seeds = ", ".join(f"{value:+.3f}" for value in values)
        lines.append((name, shown(values), seeds, "yes" if clear(values) else "no"))
    return table(*lines)


def table_summary():
    """The verdicts are ours, by `clear`: to be judged anew when the results change."""

    def by(values):
        sign = math.copysign(1, statistics.mean(values))
        return shown([sign * value for value in values], "")

    of = pairs()
    ahead = [(stays_below(a, b) or math.inf) - a["switch_step"] for a, b in zip(runs(), runs(ratio=0.0), strict=True)]
    lost = [row["difference"] for row in runs(reinitialise=True)]
    ratios = [baseline_steps(mean(runs(bag_size=s))) / 8000 for s in (4, 2)]
    small, base, large = (abs(mean(runs(**size), "difference")) for _, size in sizes())
    long = abs(mean(runs(steps=16000), "difference"))
    sums = [abs(mean(runs(bag_size=s), "difference")) for s in (2, 3, 4, 6, 8)]
    weights = "#weights-of-the-positions-and-the-sum-to-one-objective"
    sides = "#input-alone-output-alone-both"
    return table(
        ("the paper says", "measured here", "verdict"),
        ("TST ends lower than a baseline of equal FLOPs",
         f"by {by([row['difference'] for row in runs()])} after 8000 steps, on every seed", "[agree](#equal-flops)"),
        ("the loss jumps by 1 to 2 nats at the switch and recovers within a few thousand steps",
         f"it falls at the switch; it is below the baseline's {min(ahead)} to {max(ahead)} steps later",
         "[no jump seen; agree on the recovery](#equal-flops)"),
        ("a baseline needs 1.8 times the steps for the loss of TST (3 B)",
         f"{ratios[0]:.2f} (s = 4) and {ratios[1]:.2f} times (s = 2) at 8000 steps; with s = 4 none up to 4000",
         "[agree, with less](#equal-loss)"),
        ("the loss over s is U-shaped, best at s = 6 to 8",
         f"s = 2 to 8 all gain, {min(sums):.3f} to {max(sums):.3f}; which gains most is not clear",
         "[cannot tell](#the-u-over-s)"),
        ("from r = 0.2 to 0.4 it hardly matters (s = 4)",
         f"0.4 is behind 0.2 by {by(of['r = 0.4 less r = 0.2'])}, 0.1 by {by(of['r = 0.1 less r = 0.2'])}",
         "[agree in part](#the-plateau-over-r)"),
        ("small bags want a larger r than large bags",
         f"r = 0.4 less 0.2: {shown(of['r = 0.4 less r = 0.2, s = 2'])} at s = 2, {shown(of['r = 0.4 less r = 0.2'])} "
         "at s = 4; s = 8 (one seed) is best at 0.1", "[agree, barely clear](#the-plateau-over-r)"),
        ("superposing the input alone beats the baseline",
         f"by {by([row['difference'] for row in runs(sides='input')])}", f"[agree]({sides})"),
        ("superposing the output alone beats the baseline",
         f"by {by([row['difference'] for row in runs(sides='output')])}", f"[cannot tell]({sides})"),
        ("both together beat either alone",
         f"both less input alone {shown(of['both sides less input alone'])}, less output alone "
         f"{shown(of['both sides less output alone'])}", f"[cannot tell]({sides})"),
        ("power-law weights are better at s = 8",
         f"by {by(of['power law less uniform, s = 8'])}, on every seed", f"[agree]({weights})"),
        ("uniform weights are better at s = 4", f"by {by(of['power law less uniform, s = 4'])}",
         f"[cannot tell]({weights})"),
        ("the sum-to-one objective ends where the multi-hot loss does",
         f"it is behind by {by(of['mce_alt less mce'])}, on every seed", f"[disagree]({weights})"),
        ("embedding and head drawn anew at the switch destroy the gain",
         f"{abs(statistics.mean(lost)):.3f} of {base:.3f} are left; in the paper less than nothing",
         "[agree](#embedding-and-head-drawn-anew-at-the-switch)"),
        ("a longer training gains less, but gains",
         f"{base:.3f} after 8000 steps, {long:.3f} after 16,000",
         "[agree, but text repeats](#length-of-training)"),
        ("a larger model gains more in as many steps",
         f"{small:.3f} at 0.45 M, {base:.3f} at 1.12 M, {large:.3f} at 1.85 M; the last step is not clear",
         "[agree in part](#size-of-the-model)"),
    )  # fmt: skip


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
        ticks = STEPS if key == "steps" else [million * 10**6 for million in (1, 2, 4, 8)]
        axes.set_xticks(ticks, [f"{tick:,}" if key == "steps" else f"{tick // 10**6} M" for tick in ticks])
        axes.minorticks_off()
    level = mean(runs())
    even = baseline_steps(level)
    if 0 < even < math.inf:
        loss.annotate("", (even, level), (8000, level), arrowprops={"arrowstyle": "<->"})
        loss.text(1.07 * even, level, f"{even / 8000:.2f} x", va="center", fontsize=8)
    loss.set(title="equal loss", xlabel="steps of the run (FLOPs)", ylabel="final held-out loss (nats)")
    data.set(title="equal data", xlabel="data tokens of the run", ylabel="final held-out loss (nats)")
    for axes in (flops, loss, data):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "evidence" / "panels.png", dpi=110)
    plt.close(figure)


def main() -> int:
    page = DOCS / "evidence.md"
    before = after = page.read_text(encoding="utf-8")
    for name, function in TABLES.items():
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if marked.search(after) is None:
            raise LookupError(f"{page}: no place for the table {name}")
        text = function()
        after = marked.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", after)
    if ARGUMENTS.check:
        print("the tables are those of the results" if after == before else f"{page}: tables differ from study.json")
        return after != before
    page.write_text(after, encoding="utf-8")
    (DOCS / "evidence").mkdir(exist_ok=True)
    draw_panels()
    shown = re.findall(r"\(evidence/([\w-]+)\.png\)", after)
    for grid in load_sweep(HERE / "study.toml").grids:
        if grid.name in shown:
            plot_grid(ROWS, grid.name, grid.options, DOCS / "evidence" / f"{grid.name}.png")
    if not (HERE / "study.json").samefile(ARGUMENTS.results):
        shutil.copyfile(ARGUMENTS.results, HERE / "study.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
