"""Let a run have another number of steps where what it has computed stays as it is, or say how."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import SuperpositionSchedule
from .batches import epoch_order
from .checkpoint import checkpoints
from .config import TrainConfig
from .files import UserError
from .optimizer import learning_rate

LENGTH = ("steps", "optimizer.warmup", "optimizer.decay", "superposition.ratio", "superposition.stages")


def check_past(path: Path, step: int, saved: TrainConfig, now: TrainConfig, tokens: int) -> None:
    """Raise UserError unless the run `now` would have computed the steps before checkpoint `path` as `saved` did.

    Args:
        step: of the checkpoint.
        saved, now: two configurations that differ in options of LENGTH alone.
        tokens: length of the training shard.

    Raises:
        UserError: it says what differs from which step on, and which checkpoint and options keep what was computed.
    """
    values = [(name, _value(saved, name), _value(now, name)) for name in LENGTH]
    changes = ", and ".join(f"{name} = {before!r}, this run {new!r}" for name, before, new in values if before != new)
    if not changes:
        return
    last, what = _last_common(saved, now, tokens, step)
    if last == step:
        return
    message = f"resume: {path} has {changes}; {what}"
    longer = _with_past(saved, now)
    if longer is None:
        raise UserError(f"{message}. A run of {now.steps} steps cannot continue one of {saved.steps}")
    last, _ = _last_common(saved, longer, tokens, step)
    kept = [p.name for p in checkpoints(path.parent.parent) if int(p.name[5:]) <= last]
    if not kept:
        raise UserError(f"{message}. No checkpoint up to step {last} is kept (--keep); begin in another folder")
    options = [f"--{name.rpartition('.')[2]} {_text(_value(longer, name))}"
               for name, before, new in values if not before == new == _value(longer, name)]  # fmt: skip
    advice = f"--resume {kept[-1]} {' '.join(options)}"
    raise UserError(f"{message}. These options, in place of --steps or --tokens, keep what was computed: {advice}")


def _last_common(saved: TrainConfig, now: TrainConfig, tokens: int, step: int) -> tuple[int, str]:
    """Return the last step, at most `step`, at which a run can pass from `saved` to `now`, and what forbids later ones.

    Both have computed the same before it, bit for bit. With another number of steps `now` has some left there, as the
    last step is always validated.
    """
    last = step if now.steps == saved.steps else min(step, now.steps - 1)
    what = f"it would have no steps left at step {step}"
    before, new = _of_step(saved), _of_step(now)
    for i in range(last):
        a, b = before(i), new(i)
        if a != b:
            last, what = i, f"its {next(name for name in a if a[name] != b[name])} differs from step {i} on"
            break
    if saved.order == "epoch":
        first = epoch_order(saved, tokens).first_difference(epoch_order(now, tokens))
        if first < last:
            last, what = int(first), f"its order of the data differs from step {first} on"
    return last, what


def _of_step(config: TrainConfig) -> Callable[[int], dict[str, Any]]:
    """Return the function that gives all that a step has of the schedules, but its place in the data."""
    schedule = _schedule(config)
    return lambda step: {
        "learning rate": learning_rate(config.optimizer, config.steps, step),
        "bag size": schedule.bag_size_at(step),
        "phase": step < schedule.switch_step,
    }


def _with_past(saved: TrainConfig, now: TrainConfig) -> TrainConfig | None:
    """Return `now` with warm-up and stages of as many steps as `saved` has, or None if they do not fit."""
    warmup = saved.optimizer.warmup_steps(saved.steps)
    if now.optimizer.warmup_steps(now.steps) == warmup:
        optimizer = now.optimizer
    else:
        optimizer = replace(now.optimizer, warmup=float(warmup))
    stages = _schedule(saved).stage_ends
    ends = [min(end, now.steps) for end, _ in stages]
    for digits in range(1, 18):  # the shortest shares that give these steps
        shares = [round((end - begin) / now.steps, digits) for begin, end in pairwise((0, *ends))]
        further = tuple((share, s) for share, (_, s) in zip(shares[1:], stages[1:], strict=True))
        with suppress(UserError):
            options = replace(now.superposition, ratio=shares[0], stages=further)
            found = replace(now, optimizer=optimizer, superposition=options)
            if [end for end, _ in _schedule(found).stage_ends] == ends:
                return found
    return None


def _schedule(config: TrainConfig) -> SuperpositionSchedule:
    options = config.superposition
    return SuperpositionSchedule(config.steps, options.ratio, options.bag_size, options.stages)


def _value(config: TrainConfig, name: str) -> Any:
    section, _, option = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, option)


def _text(value: Any) -> str:
    """Write the value of an option as the command line takes it."""
    return " ".join(map(_text, value)) if isinstance(value, tuple) else repr(value).removesuffix(".0")
