"""When the superposition phase ends."""

from dataclasses import dataclass
from itertools import accumulate

__all__ = ["SuperpositionSchedule"]


@dataclass(frozen=True)
class SuperpositionSchedule:
    """The two phases of a run: steps `[0, switch_step)` read bags, steps `[switch_step, total_steps)` read tokens.

    Args:
        total_steps: steps of the whole run.
        ratio: r, the share of steps in the superposition phase, in `[0, 1]`. The paper's range is 0.2 to 0.4.
        bag_size: s, tokens per bag in the superposition phase. The paper's range is 4 to 8.
        stages: further (ratio, bag size) stages of the superposition phase, in order from coarse to fine.

    Raises:
        ValueError: an argument outside its range.

    Source: arXiv 2605.06546. Weights, optimiser state and learning-rate schedule carry over at the switch.
    """

    total_steps: int
    ratio: float
    bag_size: int
    stages: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.total_steps < 0:
            raise ValueError(f"total_steps: expected an integer >= 0, got {self.total_steps}")
        stages = {f"stages[{i}], ": stage for i, stage in enumerate(self.stages)}
        for name, (ratio, bag_size) in {"": (self.ratio, self.bag_size), **stages}.items():
            if not 0.0 <= ratio <= 1.0:
                raise ValueError(f"{name}ratio: expected 0 <= ratio <= 1, got {ratio}")
            if bag_size < 1:
                raise ValueError(f"{name}bag_size: expected an integer >= 1, got {bag_size}")
        if self.ratio + sum(ratio for ratio, _ in self.stages) > 1 + 1e-9:  # room for the rounding of the sum
            raise ValueError(f"stages: expected ratios that add up to at most 1 with ratio, got {self.stages}")

    @property
    def stage_ends(self) -> tuple[tuple[int, int], ...]:
        """Return `(end, bag size)` of each stage: its steps begin at the end before it and stop before its own."""
        sizes = (self.bag_size, *(s for _, s in self.stages))
        shares = accumulate((self.ratio, *(ratio for ratio, _ in self.stages)))
        return tuple((round(share * self.total_steps), s) for share, s in zip(shares, sizes, strict=True))

    @property
    def switch_step(self) -> int:
        """Return the first step of the recovery phase: the sum of the ratios times `total_steps`, rounded."""
        return self.stage_ends[-1][0]

    def bag_size_at(self, step: int) -> int:
        """Return the bag size at `step` (0-based): that of its stage, or 1 from `switch_step` on."""
        return next((s for end, s in self.stage_ends if step < end), 1)
