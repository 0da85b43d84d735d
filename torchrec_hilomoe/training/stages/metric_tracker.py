"""A validation metric, followed: the best step so far, and whether there is use in going on."""

from collections.abc import Mapping

from torchrec_hilomoe.config.stage import PlateauConfig
from torchrec_hilomoe.training.checkpoint import Best
from torchrec_hilomoe.training.metrics import Metrics

__all__ = ["MetricTracker"]


class MetricTracker:
    """Follows a validation metric.

    Args:
        plateau: The metric, what counts as better, and after how many validations that are not
            better one need not look on; None follows nothing.

    Attributes:
        best: Best validation so far; None before the first.
    """

    def __init__(self, plateau: PlateauConfig | None) -> None:
        self.best: Best | None = None
        self._plateau = plateau

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` validations in a row were not better."""
        if self._plateau is None or self.best is None:
            return False
        return self.best.validations_since >= self._plateau.patience

    def observe(self, step: int, metrics: Metrics) -> bool:
        """Take note of a validation, and return whether it is the best."""
        if self._plateau is None:
            return False
        name, best = self._plateau.metric, self.best
        value = getattr(metrics, name)
        if self._plateau.improves(value, None if best is None else best.value):
            self.best = Best(metric=name, value=value, step=step)
            return True
        if best is not None:
            since = best.validations_since + 1
            self.best = Best(metric=name, value=best.value, step=best.step, validations_since=since)
        return False

    def state_dict(self) -> dict[str, Best | None]:
        """Return the best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Best | None]) -> None:
        """Go on from what :meth:`state_dict` gave; one of another metric is not comparable."""
        best = state_dict["best"]
        if self._plateau is not None and best is not None and best.metric == self._plateau.metric:
            self.best = best
