"""What a run will take, before it is paid for: tokens, FLOPs, hours, memory, and when TST is worth it.

Hours follow from one number that any ordinary run shows, its tokens a second. A superposition step has as many latent
positions as an ordinary step, so it takes as long and reads s times more data. What TST saves is not time a step but
steps: those that a baseline needs beyond equal ones for the same loss. How many, only training tells; the paper
(arXiv 2605.06546) measured it at two sizes, and nothing here goes beyond them.
"""

import math
import textwrap
from typing import Any

from .. import SuperpositionSchedule
from ..fallback import cuda_chunk_rows
from ..train.config import TrainConfig
from ..train.files import UserError
from ..train.flops import matrix_parameters, parameters, step_flops
from ..train.presets import PRESETS

__all__ = ["plan", "recommend", "report"]

MULTIPLE = 1.8  # the paper's 3B run: a baseline takes 36,000 steps to the loss of TST's 20,000
SUMMED = ("steps", "latent_tokens", "data_tokens", "flops", "hours")
MEMORY = {
    "states": "weights, gradients and two Adam moments, float32: this GPU's share",
    "buckets": "buckets in which DDP exchanges gradients",
    "weight_copies": "bfloat16 copies of the weights, by autocast",
    "largest_layer": "largest layer, whole, and its gradient",
    "activations": "activations of the sequences that pass at a time",
    "logits": "logits of a chunk",
}


def plan(
    config: TrainConfig, *, gpus: int, tokens_per_second_per_gpu: float, gpu_memory_gib: float | None = None
) -> dict[str, Any]:
    """Resources of the run that `config` describes, as JSON has it.

    Args:
        config: the run; the model's vocabulary is taken to be its `data.vocabulary`.
        gpus: GPUs of the run, one process each.
        tokens_per_second_per_gpu: latent tokens, which are the tokens that a run without superposition counts.
        gpu_memory_gib: memory of a GPU, to hold the estimate against.

    Returns:
        parameters; phases, each with steps, bag_size, latent_tokens, data_tokens, flops and hours; their total; the
        baseline of equal steps; break_even (None without superposition), slowdowns as shares of a baseline step;
        recommended, as `recommend` returns it; memory_gib of a GPU, an estimate, and whether it fits. Hours are of
        training steps alone, without validation and checkpoints; with scale "batch", whose attention is cheaper, they
        are an upper bound.

    Raises:
        UserError: a number outside its range, or a batch that the trainer could not share out.
    """
    share, rest = divmod(config.batch, max(1, gpus))
    micro_batch = config.run.micro_batch or share
    for name, value, valid, wanted in (
        ("gpus", gpus, gpus >= 1, "an integer >= 1"),
        ("tokens_per_second_per_gpu", tokens_per_second_per_gpu, 0 < tokens_per_second_per_gpu < math.inf, "above 0"),
        ("gpu_memory_gib", gpu_memory_gib, gpu_memory_gib is None or gpu_memory_gib > 0, "a number above 0"),
        ("batch", config.batch, rest == 0, f"a multiple of the {gpus} GPUs"),
        ("micro_batch", micro_batch, rest or share % micro_batch == 0, f"a divisor of the {share} sequences of a GPU"),
    ):
        if not valid:
            raise UserError(f"{name}: expected {wanted}, got {value!r}")

    model, vocabulary, options = config.model, config.data.vocabulary, config.superposition

    def phase(name: str, steps: int, s: int) -> dict[str, Any]:
        cut = s if options.scale == "batch" else 1  # s times more sequences, of l / s positions each
        latent = steps * config.batch * config.latent_tokens
        return {
            "phase": name,
            "steps": steps,
            "bag_size": s,
            "latent_tokens": latent,
            "data_tokens": latent if options.sides == "output" else s * latent,
            "flops": steps * step_flops(model, vocabulary, config.batch * cut, config.latent_tokens // cut),
            "hours": latent / (gpus * tokens_per_second_per_gpu) / 3600,
        }

    schedule = SuperpositionSchedule(config.steps, options.ratio, options.bag_size, options.stages)
    stages = [("superposition", *stage) for stage in schedule.stage_ends] + [("recovery", config.steps, 1)]
    starts = (0, *(end for _, end, _ in stages))
    phases = [phase(name, end - start, s) for start, (name, end, s) in zip(starts, stages, strict=False) if end > start]
    total = {"phase": "total", "bag_size": None, **{key: sum(p[key] for p in phases) for key in SUMMED}}
    weights = parameters(model, vocabulary)
    memory = _memory(config, gpus, micro_batch, gpu_memory_gib or 80)  # of which the chunk of logits takes a share
    return {
        "gpus": gpus,
        "tokens_per_second_per_gpu": tokens_per_second_per_gpu,
        "parameters": {"total": weights, "without_embedding_and_head": weights - 2 * vocabulary * model.dim},
        "phases": phases,
        "total": total,
        "baseline": phase("baseline of equal steps", config.steps, 1),
        "break_even": _break_even(config, phases, total),
        "recommended": recommend(config),
        "memory_gib": memory,
        "gpu_memory_gib": gpu_memory_gib,
        "fits": None if gpu_memory_gib is None else sum(memory.values()) <= gpu_memory_gib,
    }


# Latent tokens a parameter. Bags of two lose by 0.015 at 0.9 and gain 0.040 at 1.8, where 1.5 is a choice between: one
# model of 1.1 M parameters (docs/evidence.md), in which steps and tokens a parameter were not varied apart.
GAINS_FROM = 1.5
MEASURED_FROM = 12.5  # the paper's 3B run, the shortest of its runs by this measure
LARGE = 100_000_000  # parameters; the paper's smallest model has 267 M, the largest of docs/evidence.md 1.8 M


def recommend(config: TrainConfig) -> dict[str, Any]:
    """Where to start with s, r and weights, given the size of the model and how long it trains.

    Returns:
        bag_size, ratio (0: train the baseline), position_weights, tokens_per_parameter (positions of the model over
        the whole run), and evidence: what they rest on, in a sentence, with losses in nats.

    Source: docs/evidence.md, and arXiv 2605.06546 for its sizes.
    """
    size = parameters(config.model, config.data.vocabulary)
    length = config.steps * config.batch * config.latent_tokens / size
    if length < GAINS_FROM:
        s, r = 1, 0.0
        evidence = """that is little for TST: at 0.9 a model of 1.1 M parameters loses by 0.015 with s = 2 and by 0.090
            with s = 4 (nats, docs/evidence.md)"""
    elif size < LARGE:
        s, r = 2, 0.3
        evidence = """at 1.8 a model of 1.1 M parameters gains 0.040 with s = 2 and r = 0.2, at 3.7 it gains 0.139, and
            0.153 with r = 0.4; larger bags need longer runs and gain no more (nats,
            docs/evidence.md)"""
    elif length < MEASURED_FROM:
        s, r = 2, 0.3
        evidence = """no run as short was measured at that size, the paper's have 12.6 and more; what did best in small
            models is the careful choice (docs/evidence.md)"""
    else:
        s, r = 6, 0.3
        evidence = """at 12.6 to 785 the paper has these gain 0.04 to 0.13 nats, with 267 M to 3.3 B parameters; at
            600 M s = 4 to 8 and r = 0.2 to 0.4 are within 0.01 of the best. For 10 B with 1 B active it took s = 16 and
            r = 0.25"""
    return {
        "bag_size": s,
        "ratio": r,
        "position_weights": "uniform",
        "tokens_per_parameter": length,
        "evidence": " ".join(evidence.split()),
    }


def _break_even(config: TrainConfig, phases: list[dict[str, Any]], total: dict[str, Any]) -> dict[str, Any] | None:
    """With a share r of the steps superposed, each 1 + x times a baseline step, TST takes steps * (1 + r x), and the
    baseline of m times the steps m * steps: they are even at x = (m - 1) / r."""
    share = sum(p["steps"] for p in phases if p["bag_size"] > 1) / config.steps
    if share == 0:
        return None
    paper = PRESETS["3b"]
    same_size = config.model == paper.model and config.data.vocabulary == paper.data.vocabulary
    recipe = [(c.steps, c.batch * c.latent_tokens, c.superposition) for c in (config, paper)]
    missing = "at this size" if not same_size else None if recipe[0] == recipe[1] else "with these settings"
    return {
        "superposed_share": share,
        "largest_slowdown": [{"multiple": m, "slowdown": (m - 1) / share} for m in (1.1, 1.25, 1.5, MULTIPLE)],
        "paper_multiple": MULTIPLE,
        "not_measured": missing,
        "baseline_hours": MULTIPLE * total["hours"],
        "hours_saved": (MULTIPLE - 1) * total["hours"],
    }


def _memory(config: TrainConfig, gpus: int, micro_batch: int, gpu_memory_gib: float) -> dict[str, float]:
    """GiB of a GPU, by the keys of MEMORY: as if all peaks came at once, which makes it a little too much."""
    model, vocabulary, d, f = config.model, config.data.vocabulary, config.model.dim, config.model.ffn_dim
    weights, half = parameters(model, vocabulary), config.dtype == "bfloat16"
    width = 2 if half else 4
    sharded = gpus > 1 and config.run.parallel == "fsdp"
    largest = max(vocabulary * d, matrix_parameters(model, 0) // model.layers)  # embedding or head; a block
    positions = micro_batch * config.latent_tokens
    # Elements a position that a block keeps for its backward pass, k key-value heads a query head: d each for two
    # normalised inputs, attention's output, the same in the order of positions, and the sum after it; 2 d + 3 k d for
    # queries, keys and values and the rotated ones; 4 f for gate and up, silu(gate) and their product. At its peak, in
    # the feed-forward layer, the backward pass has d + 2 f on top. torch's MemTracker counts the same (and d a norm
    # more on the CPU, where RMSNorm is not fused). No attention scores are stored.
    kept = 7 * d + 3 * d * model.kv_heads / model.heads + 4 * f
    recompute = config.run.activation_checkpointing
    stream = d * (width if sharded else 4)  # a block's input, which autocast leaves in float32
    blocks = model.layers * (stream + (0 if recompute else width * kept)) + width * (recompute * kept + d + 2 * f)
    chunk = min(positions, cuda_chunk_rows(vocabulary, width, int(gpu_memory_gib * 2**30)))
    counted = {
        "states": 16 * weights / (gpus if sharded else 1),
        "buckets": 4 * weights * (gpus > 1 and not sharded),
        "weight_copies": 2 * weights * (half and not sharded),
        # float32: weights and gradient; bfloat16: both, and the float32 sum that the head and FSDP2's exchange need
        "largest_layer": 8 * largest,
        "activations": positions * blocks,
        "logits": width * chunk * vocabulary,
    }
    return {key: size / 2**30 for key, size in counted.items()}


def report(plan: dict[str, Any]) -> str:
    """`plan` as Markdown that reads well in a terminal."""
    gpus, total, even, size = plan["gpus"], plan["total"], plan["break_even"], plan["parameters"]
    speed = total["flops"] / (total["hours"] * 3600 * gpus) / 1e12
    text = [
        "# Plan",
        _paragraph(f"""{_count(size["total"])} parameters, {_count(size["without_embedding_and_head"])} without
            embedding and head. GPUs: {gpus}, at {plan["tokens_per_second_per_gpu"]:,.0f} latent tokens/s each, which
            takes {speed:.3g} TFLOP/s of each. Latent tokens are positions in the model, bags or tokens: what an
            ordinary run, without superposition, shows as its tokens/s."""),
        _table(
            ["phase", "steps", "bag size", "latent tokens", "data tokens", "FLOPs", "hours"],
            *(
                [r["phase"], f"{r['steps']:,}", str(r["bag_size"] or ""), _count(r["latent_tokens"])]
                + [_count(r["data_tokens"]), f"{r['flops']:.2e}", _hours(r["hours"])]
                for r in (*plan["phases"], total, plan["baseline"])
            ),
        ),
    ]
    if even:
        steps, hours, share, m = (
            total["steps"],
            _hours(total["hours"]),
            even["superposed_share"],
            even["paper_multiple"],
        )
        ours = "This is that 3B run. At your rate"
        if even["not_measured"]:
            ours = f"This run: m is not measured by the paper {even['not_measured']}; {m} at 3B. Assuming {m}"
        text += [
            "## How long must a baseline train for TST to be worth it?",
            _paragraph(f"""Longer than {steps:,} steps. A superposition step computes what a baseline step computes, so
                both runs above take {hours} hours: TST pays as soon as its final loss is below that of a baseline of as
                many steps."""),
            _paragraph(f"""Should superposition steps be slower than baseline steps, by a share x, TST takes
                1 + {share:.3g} x times as long. Against a baseline that needs m times the steps for TST's loss it still
                breaks even at x = (m-1)/{share:.3g} (arithmetic):"""),
            _table(
                ["steps of the baseline", "m", "x"],
                *(
                    [f"{steps * b['multiple']:,.0f}", f"{b['multiple']:g}", f"{100 * b['slowdown']:.0f} %"]
                    for b in even["largest_slowdown"]
                ),
            ),
            _paragraph("""The paper measured m at two sizes. 3B, s = 6: 20,000 steps of TST equal a baseline of 36,000,
                1.8 times (247 against 443 B200-hours; by these, x was about 1 %). 10B-A1B, a mixture of experts,
                s = 16: after 12,311 B200-hours a baseline has a higher loss than TST after 4,768, so more than 2.58
                times."""),
            _paragraph(f"""{ours}, a baseline would take {_hours(even["baseline_hours"])} hours to the loss that TST
                reaches in {hours}: {_hours(even["hours_saved"])} hours saved, {_hours(gpus * even["hours_saved"])}
                GPU-hours (arithmetic)."""),
        ]
    text += ["## Where to start with s, r and weights", _start(plan["recommended"])]
    memory = [(MEMORY[key], gib) for key, gib in plan["memory_gib"].items() if gib]
    fits = {None: "", True: "Fits in {:g} GiB. ", False: "Does not fit in {:g} GiB. "}[plan["fits"]]
    text += [
        "## Memory of a GPU, an estimate",
        _table(
            ["what", "GiB"],
            *([what, f"{gib:.2f}"] for what, gib in (*memory, ("sum", sum(plan["memory_gib"].values())))),
        ),
        f"{fits.format(plan['gpu_memory_gib'])}Not counted: CUDA itself, communication buffers, fragmentation.",
    ]
    return "\n\n".join(text) + "\n"


def _start(start: dict[str, Any]) -> str:
    options = f"--bag-size {start['bag_size']} --ratio {start['ratio']} --position-weights {start['position_weights']}"
    advice = options if start["ratio"] else "--ratio 0, without superposition"
    return _paragraph(f"{advice}. The run has {start['tokens_per_parameter']:.3g} latent tokens a parameter; "
                      f"{start['evidence']}.")  # fmt: skip


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100)


def _count(n: float) -> str:
    return f"{n / 1e9:,.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _table(*rows: list[str]) -> str:
    """A Markdown table with aligned columns; the first row is its head, the first column text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    cells = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])
