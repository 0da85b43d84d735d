"""What a sweep searches: options of a run, each with a range or a list of values."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.options import did_you_mean, option_names
from torchrec_hilomoe.runtime.documents import DocumentError, parse_yaml, read_text

__all__ = ["Dimension", "combinations", "read_space"]

SPACE = "It names options and their values, as python -m torchrec_hilomoe sweep --help shows."
KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """An option and its values.

    Attributes:
        option: Dotted name of the option.
        choices: Values to choose from; empty for a range.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range is searched by orders of magnitude.
        step: Distance between neighbouring values; None is 1 for integers, and any for others.

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
        if self.step is not None and self.step <= 0:
            raise ValueError(f"space: {self.option}: step must be above 0, got {self.step}.")
        if self.is_integer and self.step is not None and self.step != int(self.step):
            raise ValueError(
                f"space: {self.option} is searched in whole numbers, which need a whole step, got "
                f"{self.step}. Write low or high with a decimal point for others."
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
        values = parse_yaml(read_text(path), path)
    except (OSError, DocumentError) as error:
        raise ValueError(f"--space: cannot read {path}: {error}. {SPACE}") from error
    if not values:
        raise ValueError(f"--space: {path} names no option. {SPACE}")
    return tuple(_dimension(str(option), entry) for option, entry in values.items())


def combinations(grid: str) -> tuple[tuple[str, ...], ...]:
    """Read ``OPTION=VALUE,VALUE OPTION=...`` and return the arguments of every combination.

    A comma inside brackets belongs to its value.

    Example:
        >>> combinations("seed=0,1 model.head=[64,32]")
        (('--seed=0', '--model.head=[64,32]'), ('--seed=1', '--model.head=[64,32]'))

    Raises:
        ValueError: If the text is no grid, or an option is unknown.
    """
    choices = []
    for words in shlex.split(grid):
        name, is_given, values = words.removeprefix("--").partition("=")
        found = re.findall(r"(?:[^,\[{]|\[[^]]*\]|\{[^}]*\})+", values)
        if not name or not is_given or not found or ",".join(found) != values:
            raise ValueError(
                f"--grid is 'OPTION=VALUE,VALUE OPTION=VALUE,...', got {words!r} in {grid!r}."
            )
        _check_option("--grid", name)
        choices.append([f"--{name}={value}" for value in found])
    if not choices:
        raise ValueError(
            "--grid names no option, as 'train.learning_rate=0.001,0.003 seed=0,1' does."
        )
    return tuple(itertools.product(*choices))


def _check_option(where: str, name: str) -> None:
    names = set(option_names(RunConfig))
    if name not in names:
        raise ValueError(f"{where}: there is no option {name!r}. {did_you_mean(name, names)}")


def _dimension(option: str, entry: Any) -> Dimension:
    _check_option("space", option)
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
