"""Prints the results of a run as one table, and draws them: `python benchmarks/report.py RESULTS.json [--markdown]`.

The figure goes beside the results, RESULTS.png.
"""

import argparse
import json
from pathlib import Path

OURS, BEST = "tst_ext", "3 best GEMMs"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def lines(case: dict) -> list[list[str]]:
    """name, ms, our time over its, MiB beyond inputs and gradients, rounds; the fastest first."""
    rows = sorted(case["contenders"].items(), key=lambda item: item[1].get("ms", float("inf")))
    out = []
    for name, row in rows:
        label = f"{name} (floor)" if row.get("floor") else name
        if "unavailable" in row:
            out.append([label, row["unavailable"], "", "", ""])
            continue
        ours_over = row["ours_over_this"]
        memory = "" if row.get("floor") else number(row.get("extra_mib"), 0)
        out.append([label, number(row["ms"]), number(ours_over), memory, str(row["rounds"])])
    return out


def title(case: dict) -> str:
    rates = "".join(f", {case[unit]:.1f} {unit}" for unit in ("GFLOP/s", "GB/s", "M tokens/s") if unit in case)
    chosen = f"; GEMMs: {case['gemms']}" if "gemms" in case else ""
    return f"{case['op']}: {case['shape']}, s = {case['s']}, {case['dtype']}{rates}{chosen}"


HEADER = ["", "ms", "ours / it", "extra MiB", "rounds"]


def table(cases: list[dict]) -> str:
    out = []
    for case in cases:
        out.append("\n" + title(case))
        out += [f"  {r[0]:44}{r[1]:>12}{r[2]:>12}{r[3]:>12}{r[4]:>8}" for r in (HEADER, *lines(case))]
    return "\n".join(out)


def markdown(cases: list[dict]) -> str:
    """A table an op, a row a case; of the others our time over theirs, and their extra MiB."""
    out = []
    for op in dict.fromkeys(case["op"] for case in cases):
        group = [case for case in cases if case["op"] == op]
        rows_of = [case["contenders"] for case in group]
        names = list(dict.fromkeys(name for rows in rows_of for name in rows if name != OURS))
        names = [name for name in names if any("ms" in rows.get(name, {}) for rows in rows_of)]
        floors = [name for name in names if any(rows.get(name, {}).get("floor") for rows in rows_of)]
        names = floors + [name for name in names if name not in floors]
        out += [f"\n**{op}**\n", "| " + " | ".join(["", "ms", "MiB", *names]) + " |"]
        out.append("|---|" + "---:|" * (len(names) + 2))
        for case, rows in zip(group, rows_of, strict=True):
            cells = [f"{case['shape']}, s = {case['s']}, {case['dtype']}"]
            cells += [number(rows[OURS]["ms"], 1), number(rows[OURS].get("extra_mib"), 0)]
            for name in names:
                row = rows.get(name, {})
                memory = f" ({number(row['extra_mib'], 0)})" if name not in floors and row.get("extra_mib") else ""
                once = "*" if row.get("rounds") == 1 else ""
                cells.append(f"{number(row['ours_over_this'])}{once}{memory}" if "ms" in row else "-")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def draw(cases: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scaling = [case for case in cases if case["op"] == "scaling"]
    figure, grid = plt.subplots(2, 3, figsize=(15, 8))
    panels = iter(grid.flat)
    axes = next(panels)
    loss = [c for c in cases if c["op"].startswith("loss, forward and") and c["dtype"] == "float32"]
    loss = [c for c in loss if c["shape"] == loss[0]["shape"]] if loss else []
    names = dict.fromkeys(n for c in loss for n, row in c["contenders"].items() if "ms" in row and n != BEST)
    for name in names:
        rows = [(c["s"], c["contenders"].get(name, {}).get("ms"), c["contenders"][BEST]["ms"]) for c in loss]
        points = [(s, ms / floor) for s, ms, floor in rows if ms]
        width = 2.5 if name == OURS else 1
        axes.plot(*zip(*points, strict=True), "o-", label=name, linewidth=width, markersize=3)
    axes.set(xlabel="tokens in a bag, s", ylabel="time / three best GEMMs", yscale="log")
    axes.set_title(f"loss, forward and backward, {loss[0]['shape']}, float32" if loss else "")
    if loss:
        axes.legend(fontsize=7)
    labels = {"rows": "rows", "vocabulary": "vocabulary", "s": "tokens in a bag, s", "threads": "threads"}
    for axis, label in {**labels, "chunk_size": "chunk_size, rows"}.items():
        axes = next(panels)
        points = [(c["value"], c["contenders"][OURS]) for c in scaling if c["axis"] == axis]
        if not points:
            axes.set_axis_off()
            continue
        x = [value for value, _ in points]
        axes.plot(x, [row["ms"] for _, row in points], "o-", color="tab:blue")
        axes.set(xlabel=label, xscale="log", ylim=(0, None))
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set_ylabel("ms", color="tab:blue")
        right = axes.twinx()
        right.plot(x, [row["extra_mib"] for _, row in points], "s--", color="tab:orange", markersize=4)
        right.set_ylabel("MiB beyond inputs and gradients", color="tab:orange")
        right.set_ylim(0)
        shape = next(c["shape"] for c in scaling if c["axis"] == axis)
        axes.set_title(f"{label} (others: {shape})" if axis in ("s", "threads", "chunk_size") else label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of one run, or of runs of different cases")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.results]
    cases = [benchmark["extra_info"] for run in runs for benchmark in run["benchmarks"]]
    cases = [case for case in cases if "contenders" in case]  # without those that failed
    machine = runs[0]["machine_info"]
    facts = ("device", "threads", "capability", "gemm", "torch", "tst_ext")
    print(", ".join(f"{name} {machine[name]}" for name in facts))
    compared = [case for case in cases if case["op"] != "scaling"]
    print(markdown(compared) if arguments.markdown else table(compared))
    path = arguments.results[0].with_suffix(".png")
    draw(cases, path)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
