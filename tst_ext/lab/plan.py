"""Plan a run before it is paid for: tokens, FLOPs, hours, and when TST is worth it.

A superposition step takes as long as an ordinary step, so hours follow from the tokens per second of an ordinary run.
How many steps TST saves only training tells; docs/evidence.md has the paper's numbers and ours.
"""

import math
import textwrap
from typing import Any

from ..train.config import TrainConfig
from ..train.files import check
from ..train.flops import matrix_parameters, parameters, step_flops
from ..train.tokens import phases, step_tokens

# The paper's baselines take so many times the steps of TST to its loss: 36,000 for 20,000 (3B), and 125,000 for 49,983
# of its mixture of experts, which ends lower still. Their hours, 443 : 247 and 12,311 : 4,768, are 1.79 and 2.58 times.
MULTIPLE, MULTIPLE_OF_EXPERTS = 1.8, 125_000 / 49_983
SUMMED = ("steps", "latent_tokens", "data_tokens", "flops", "hours")


def plan(config: TrainConfig, *, gpus: int, tokens_per_second_per_gpu: float) -> dict[str, Any]:
    """Compute the resources of the run that `config` describes, as JSON has it.

    Args:
        config: the run, whose `data.vocabulary` is taken for the model's.
        gpus: GPUs of the run, one process each.
        tokens_per_second_per_gpu: latent tokens, which are the tokens that a run without superposition counts.

    Returns:
        parameters (active: those that multiply each position); phases, each with steps, bag_size, latent_tokens,
        data_tokens, flops and hours; their total; the baseline of equal steps; break_even (None without superposition):
        the superposed share of the steps, and, for the paper's multiple of a baseline's steps, that baseline, the hours
        saved and the slowdown of a superposition step that undoes it; recommended, by `recommend`. Hours are of
        training steps alone, and an upper bound with scale "batch".

    Raises:
        UserError: a number outside its range, or a batch that the trainer could not share out.
    """
    share, rest = divmod(config.batch, max(1, gpus))
    micro_batch = config.run.micro_batch or share
    speed = tokens_per_second_per_gpu
    check("gpus", gpus, gpus >= 1, "an integer >= 1")
    check("tokens_per_second_per_gpu", speed, 0 < speed < math.inf, "above 0")
    check("batch", config.batch, rest == 0, f"a multiple of the {gpus} GPUs")
    check("micro_batch", micro_batch, share % micro_batch == 0, f"a divisor of the {share} sequences of a GPU")
    model, vocabulary, options = config.model, config.data.vocabulary, config.superposition

    def row(name: str, steps: int, s: int) -> dict[str, Any]:
        cut = s if options.scale == "batch" else 1  # s times more sequences, of l / s positions each
        latent = steps * config.batch * config.latent_tokens
        return {
            "phase": name,
            "steps": steps,
            "bag_size": s,
            "latent_tokens": latent,
            "data_tokens": steps * step_tokens(config, s),
            "flops": steps * step_flops(model, vocabulary, config.batch * cut, config.latent_tokens // cut),
            "hours": latent / (gpus * speed) / 3600,
        }

    rows = [row(*phase) for phase in phases(config)]
    total = {"phase": "total", "bag_size": None, **{key: sum(r[key] for r in rows) for key in SUMMED}}
    weights = parameters(model, vocabulary)
    superposed = sum(r["steps"] for r in rows if r["bag_size"] > 1) / config.steps
    # If superposition steps take 1 + x times as long, TST takes 1 + r x times as long, and a baseline of m times the
    # steps takes m times as long. They are even at x = (m - 1) / r.
    multiple = MULTIPLE_OF_EXPERTS if model.experts else MULTIPLE
    even = superposed and {
        "share": superposed,
        "multiple": multiple,
        "measured": "with experts" if model.experts else "at 3B",
        "baseline": row("baseline of equal loss", round(multiple * config.steps), 1),
        "hours_saved": (multiple - 1) * total["hours"],
        "slowdown": (multiple - 1) / superposed,
    }
    return {
        "gpus": gpus,
        "tokens_per_second_per_gpu": speed,
        "parameters": {
            "total": weights,
            "without_embedding_and_head": weights - 2 * vocabulary * model.dim,
            "active": matrix_parameters(model, vocabulary),
        },
        "phases": rows,
        "total": total,
        "baseline": row("baseline of equal steps", config.steps, 1),
        "break_even": even or None,
        "recommended": recommend(config),
    }


# Latent tokens per parameter, a choice between 0.9, where bags of two lose by 0.015, and 1.8, where they gain 0.040.
# One model of 1.1 M parameters (docs/evidence.md); steps and tokens per parameter were not varied apart.
GAINS_FROM = 1.5
MEASURED_FROM = 12.5  # the paper's 3B run, the shortest of its runs by this measure
LARGE = 100_000_000  # parameters; the paper's smallest model has 267 M, the largest of docs/evidence.md 1.8 M


def recommend(config: TrainConfig) -> dict[str, Any]:
    """Choose s, r (0 for the baseline) and weights to start with, by the size of the model and how long it trains.

    Return also tokens_per_parameter, latent tokens of the run per parameter, and evidence, a sentence with losses in
    nats. Source: docs/evidence.md, and arXiv 2605.06546 for its sizes.
    """
    size, weights = parameters(config.model, config.data.vocabulary), "uniform"
    length = config.steps * config.batch * config.latent_tokens / size
    if length < GAINS_FROM:
        s, r = 1, 0.0
        evidence = """that is little for TST: at 0.9 a model of 1.1 M parameters loses by 0.015 with s = 2 and by 0.090
            with s = 4 (nats, docs/evidence.md)"""
    elif size < LARGE:
        s, r = 2, 0.3
        evidence = """at 1.8 a model of 1.1 M parameters gains 0.040 with s = 2 and r = 0.2, at 3.7 it gains 0.139, and
            0.153 with r = 0.4; larger bags need longer runs and gain no more (nats, docs/evidence.md)"""
    elif length < MEASURED_FROM:
        s, r = 2, 0.3
        evidence = """no run as short was measured at that size, the paper's have 12.6 and more; what did best in small
            models is the careful choice (docs/evidence.md)"""
    elif config.model.experts:
        s, r, weights = 16, 0.25, "power_law"
        evidence = """at 41 the paper's one mixture of experts, 10 B parameters with 1 B active, ends 0.016 below a
            baseline of 2.5 times the steps; the paper does not name its weights, the power law is its choice from
            s = 8 on"""
    else:
        s, r = 6, 0.3
        evidence = """at 12.6 to 785 the paper has these gain 0.04 to 0.13 nats, with 267 M to 3.3 B parameters
            (docs/evidence.md)"""
    return {
        "bag_size": s,
        "ratio": r,
        "position_weights": weights,
        "tokens_per_parameter": length,
        "evidence": " ".join(evidence.split()),
    }


def report(plan: dict[str, Any]) -> str:
    """Write `plan` as Markdown that reads well in a terminal."""
    gpus, total, size, start = plan["gpus"], plan["total"], plan["parameters"], plan["recommended"]
    speed, even = total["flops"] / (total["hours"] * 3600 * gpus) / 1e12, plan["break_even"]
    whole, inner, active = (_count(size[key]) for key in ("total", "without_embedding_and_head", "active"))
    text = [
        "# Plan",
        _paragraph(f"""{whole} parameters, {inner} without embedding and head, {active} active: they multiply each
            position. GPUs: {gpus}, at {plan["tokens_per_second_per_gpu"]:,.0f} latent tokens/s each, which
            takes {speed:.3g} TFLOP/s of each. Latent tokens are positions in the model, bags or tokens: the tokens/s
            that a run without superposition shows."""),
        _table(
            ["phase", "steps", "bag size", "latent tokens", "data tokens", "FLOPs", "hours"],
            *(
                [r["phase"], f"{r['steps']:,}", str(r["bag_size"] or ""), _count(r["latent_tokens"])]
                + [_count(r["data_tokens"]), f"{r['flops']:.2e}", _hours(r["hours"])]
                for r in (*plan["phases"], total, plan["baseline"], *([even["baseline"]] if even else []))
            ),
        ),
    ]
    if even:
        text += [
            "## When is TST worth it?",
            _paragraph(f"""When a baseline needs more than {total["steps"]:,} steps for the final loss of TST. If it
                needs m times as many, TST saves (m - 1) * {_hours(total["hours"])} hours. Nothing is saved if a
                superposition step takes (m - 1) / {even["share"]:.3g} longer than a baseline step. The paper measured
                m = {even["multiple"]:.3g} {even["measured"]}: {_hours(even["hours_saved"])} hours,
                {_hours(gpus * even["hours_saved"])} GPU-hours, {100 * even["slowdown"]:.0f} % longer. docs/evidence.md
                has what we measured."""),
        ]
    options = f"--bag-size {start['bag_size']} --ratio {start['ratio']} --position-weights {start['position_weights']}"
    advice = options if start["ratio"] else "--ratio 0, without superposition"
    length = f"{start['tokens_per_parameter']:.3g} latent tokens per parameter"
    text += ["## Where to start", _paragraph(f"{advice}. The run has {length}; {start['evidence']}.")]
    return "\n\n".join(text) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100)


def _count(n: float) -> str:
    return f"{n / 1e9:,.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _table(*rows: list[str]) -> str:
    """Write rows, the first of them the head, as aligned Markdown; the first column is text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    cells = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])
