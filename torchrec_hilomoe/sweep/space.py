"""What a sweep searches: options of a run, each with a range or a list of values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.option_names import did_you_mean, option_names

__all__ = ["Dimension", "read_space"]

KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """An option and its values.

    Attributes:
        option: Its dotted name.
        choices: Values of a list; empty for a range.
        low: The least value of a range.
        high: The largest.
        log: Whether the range is searched by orders of magnitude.
        step: Distance of neighbouring values; None is 1 for integers, and any for others.

    Raises:
        ValueError: If the range is none.
    """

    option: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if self.choices:
            return
        if not self.low < self.high:
            raise ValueError(
                f"space: {self.option} wants low below high, got {self.low} and {self.high}."
            )
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(
                f"space: {self.option} is searched by orders of magnitude, so low must be above 0 "
                f"and there is no step, got low {self.low} and step {self.step}."
            )

    @property
    def is_integer(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def read_space(path: Path) -> tuple[Dimension, ...]:
    """Read a YAML file of options: a list of values, or ``low``, ``high``, ``log``, ``step``.

    Raises:
        ValueError: If the file, an option or a range is wrong.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--space: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"--space: {path} is not a mapping of options to their values.")
    return tuple(_dimension(str(option), entry) for option, entry in values.items())


def _dimension(option: str, entry: Any) -> Dimension:
    names = set(option_names(RunConfig))
    if option not in names:
        raise ValueError(f"space: there is no option {option!r}. {did_you_mean(option, names)}")
    if isinstance(entry, list) and entry:
        return Dimension(option=option, choices=tuple(entry))
    given = entry if isinstance(entry, dict) else {}
    known = {"low", "high"} <= given.keys() <= KEYS
    if not known or any(isinstance(given[end], str) for end in ("low", "high")):
        raise ValueError(
            f"space: {option} must be a list of values, or numbers low and high, with log or step "
            f"beside them; got {entry!r}. (YAML reads 1e-3 as a text; write 1.0e-3.)"
        )
    return Dimension(option=option, **given)
