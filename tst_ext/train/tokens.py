"""Count the data tokens of a run, and choose its steps by them (`--tokens`)."""

import dataclasses
from decimal import Decimal

from .. import SuperpositionSchedule
from .config import TrainConfig
from .files import UserError, check

MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MOST = 10**15  # the rounding of a schedule's stages is exact up to 2**53 steps


def phases(config: TrainConfig, steps: int | None = None) -> list[tuple[str, int, int]]:
    """Return (name, steps, bag size) of each stage of superposition and of the recovery, but of those without a step.

    Args:
        steps: of the whole run, by default the configuration's.
    """
    steps, options = config.steps if steps is None else steps, config.superposition
    schedule = SuperpositionSchedule(steps, options.ratio, options.bag_size, options.stages)
    ends = [("superposition", *stage) for stage in schedule.stage_ends] + [("recovery", steps, 1)]
    starts = (0, *(end for _, end, _ in ends))
    return [(name, end - start, s) for start, (name, end, s) in zip(starts, ends, strict=False) if end > start]


def step_tokens(config: TrainConfig, bag_size: int) -> int:
    """Return the data tokens of a step: s for each position in the model, unless the model reads tokens (sides output).

    Where bags end with their documents (no straddle), a step reads fewer.
    """
    times = 1 if config.superposition.sides == "output" else bag_size
    return times * config.batch * config.latent_tokens


def data_tokens(config: TrainConfig, steps: int | None = None) -> int:
    """Return the data tokens of the whole run."""
    return sum(count * step_tokens(config, s) for _, count, s in phases(config, steps))


def parse_tokens(text: str) -> int:
    """Return a number of tokens such as 2B, 500M, 10k, 1.5e9 or 2_000_000. Raise UserError if it is none."""
    multiple = MULTIPLES.get(text[-1:].lower())
    try:
        number = Decimal(text[:-1] if multiple else text) * (multiple or 1)
        valid = 1 <= number <= MOST
    except ArithmeticError:  # Decimal's own error for what is no number
        valid = False
    check("tokens", text, valid, "a number of tokens such as 2B, 500M, 10k or 1.5e9, at most 1000T")
    return int(number)


def with_tokens(config: TrainConfig, text: str | None) -> TrainConfig:
    """Return `config` with as many steps as read at most the data tokens of `text`, or as it is for None.

    Raises:
        UserError: `text` is no number of tokens, or too few for one step.
    """
    if text is None:
        return config
    wanted = parse_tokens(text)
    sizes = (1, config.superposition.bag_size, *(s for _, s in config.superposition.stages))
    # One more step lengthens no stage by more than one step, so it reads at most `most`, and a run that reads too much
    # is at least excess / most steps too long. A longer run can read less, where a stage of larger bags comes later.
    most = sum(step_tokens(config, s) for s in sizes)
    steps = wanted // step_tokens(config, 1)
    while (excess := data_tokens(config, steps) - wanted) > 0:
        steps -= -(-excess // most)
    if steps == 0:
        got = f"got {text!r}: one step reads that many"
        raise UserError(f"tokens: expected at least {data_tokens(config, 1):,}, {got}")
    return dataclasses.replace(config, steps=steps)
