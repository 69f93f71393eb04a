"""When the superposition phase ends."""

from dataclasses import dataclass

__all__ = ["SuperpositionSchedule"]


@dataclass(frozen=True)
class SuperpositionSchedule:
    """The two phases of a run: steps `[0, switch_step)` read bags, steps `[switch_step, total_steps)` read tokens.

    Args:
        total_steps: steps of the whole run, after every override: the switch is a share of what really runs.
        ratio: r, the share of steps in the superposition phase, 0 <= r <= 1. The paper's range is 0.2 to 0.4;
            0 is an ordinary run.
        bag_size: s, tokens a bag in the superposition phase. The paper's range is 4 to 8.

    Raises:
        ValueError: an argument outside its range.

    Source: arXiv 2605.06546. Weights, optimiser state and learning-rate schedule carry over at the switch.
    """

    total_steps: int
    ratio: float
    bag_size: int

    def __post_init__(self) -> None:
        if self.total_steps < 0:
            raise ValueError(f"total_steps: expected an integer >= 0, got {self.total_steps}")
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"ratio: expected 0 <= ratio <= 1, got {self.ratio}")
        if self.bag_size < 1:
            raise ValueError(f"bag_size: expected an integer >= 1, got {self.bag_size}")

    @property
    def switch_step(self) -> int:
        """First step of the recovery phase: `ratio * total_steps`, rounded."""
        return round(self.ratio * self.total_steps)

    def bag_size_at(self, step: int) -> int:
        """Bag size at `step` (0-based): s before `switch_step`, 1 from it on."""
        return self.bag_size if step < self.switch_step else 1
