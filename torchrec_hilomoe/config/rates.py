"""Learning rates over a run or a stage: a factor on the configured rate, by step."""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Decay", "DecayKind"]

DecayKind = Literal["constant", "linear", "cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How rates fall.

    Attributes:
        kind: ``constant``; ``linear`` or ``cosine`` to ``floor`` over all steps; ``step`` by
            ``factor`` after every ``every`` steps.
        every: Steps between two falls of ``step``.
        factor: What a fall of ``step`` multiplies the rate by.
        floor: The least that is left of the rate.

    Raises:
        ValueError: If an option is out of range, or ``step`` has no ``every``.

    Example:
        >>> [round(Decay(kind="cosine").at(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [Decay(kind="step", every=2, factor=0.5).at(step, 6) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    kind: DecayKind = "constant"
    every: int | None = None
    factor: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "step" and self.every is None:
            raise ValueError(
                "decay is 'step' and decay_every is null; say after how many steps rates fall, "
                "or take 'cosine'."
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"decay_every must be at least 1 step, got {self.every}.")
        if not (0 < self.factor <= 1 and 0 <= self.floor <= 1):
            raise ValueError(
                f"decay_factor = {self.factor} must lie above 0 and up to 1, and decay_floor = "
                f"{self.floor} between 0 and 1: rates fall."
            )

    def at(self, step: int, steps: int) -> float:
        """Return the factor at ``step``, counted from 0, of ``steps``."""
        if self.kind == "step":
            assert self.every is not None
            return max(self.floor, self.factor ** (step // self.every))
        progress = min(step / steps, 1.0)
        left = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.kind]
        return self.floor + (1.0 - self.floor) * left
