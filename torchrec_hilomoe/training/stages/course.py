"""A schedule while it runs: which stage a step belongs to, and when a plateau ends one.

What it knows beyond the schedule is small and exact, and is saved with every checkpoint: a run
that is resumed finds the same stages at the same steps.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchrec_hilomoe.config.rates import Decay
from torchrec_hilomoe.training.stages.schedule import StageSchedule, StageSpan

__all__ = ["Course", "CourseState"]


@dataclass(frozen=True, kw_only=True)
class CourseState:
    """What a course has learned from validations.

    Attributes:
        ended: Stages that a plateau has ended, and at which step.
        stage: The stage that the two others are about.
        best: Its best metric.
        waited: Its validations since.
    """

    ended: Mapping[str, int] = field(default_factory=dict)
    stage: str | None = None
    best: float | None = None
    waited: int = 0


class Course:
    """Where the stages of a run lie, by what is known so far.

    Args:
        schedule: The stages.
        total_steps: Length of the run.
        steps_per_epoch: Optimizer steps of one pass over the training split.
        decay: How rates fall over the run, for stages that do not say it themselves.
        evaluate_every: Steps between two validations.

    Raises:
        ValueError: If the stages do not fit the run, or one waits for a plateau of a metric that
            is never computed.

    Attributes:
        state: To be saved, and given back to :meth:`restore`.
        spans: The stages, placed; a stage that may end early at its longest.
    """

    def __init__(
        self,
        schedule: StageSchedule,
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        decay: Decay | None = None,
        evaluate_every: int | None = None,
    ) -> None:
        for stage in schedule.stages:
            if stage.plateau is not None and evaluate_every is None:
                raise ValueError(
                    f"Stage {stage.name!r} ends with a plateau of {stage.plateau.metric}, but "
                    "train.evaluate_every is null, so that nothing is validated. Give it the steps "
                    "between two validations."
                )
        self.state = CourseState()
        self._schedule = schedule
        self._nominal_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._decay = decay or Decay()
        self._evaluate_every = evaluate_every
        self.spans = self._place()

    @property
    def total_steps(self) -> int:
        """Length of the run, unless another plateau shortens it."""
        return self.spans[-1].stop

    def at(self, step: int) -> StageSpan:
        """The stage that trains ``step``, counted from 0; after the last step, the last stage."""
        return next((span for span in self.spans if step < span.stop), self.spans[-1])

    def decay(self, step: int) -> float:
        """Factor on every rate at ``step``, warm-up apart."""
        span = self.at(step)
        own = span.stage.own_decay
        if own is not None:
            return own.at(step - span.start, span.stop - span.start)
        return self._decay.at(step, self._nominal_steps)

    def sure_until(self, step: int) -> int:
        """Up to which step the stage of ``step`` surely lasts: how far one may read ahead."""
        span = self.at(step)
        if span.stage.plateau is None:
            return span.stop
        assert self._evaluate_every is not None
        return min(span.stop, (step // self._evaluate_every + 1) * self._evaluate_every)

    def observe(self, step: int, values: Mapping[str, float]) -> bool:
        """Take note of a validation after ``step`` steps.

        Args:
            step: Steps done; the stage that is judged is that of the last of them.
            values: Metrics by name, the same on every rank.

        Returns:
            Whether the stage ends here.
        """
        span = self.at(step - 1)
        stage, plateau, state = span.stage, span.stage.plateau, self.state
        if plateau is None or stage.name in state.ended:
            return False
        own = state.stage == stage.name
        best, waited = (state.best, state.waited) if own else (None, 0)
        value = values[plateau.metric]
        if plateau.improves(value, best):
            best, waited = value, 0
        else:
            waited += 1
        ends = waited >= plateau.patience
        ended = {**state.ended, stage.name: step} if ends else state.ended
        self.state = CourseState(ended=ended, stage=stage.name, best=best, waited=waited)
        if ends:
            self.spans = self._place()
        return ends

    def saved(self) -> dict[str, Any]:
        """The state as JSON; its numbers come back to the bit."""
        return asdict(self.state)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`saved` gave.

        Raises:
            ValueError: If it is not the state of such a schedule.
        """
        state = CourseState(**saved)
        for name in state.ended:
            self._schedule.named(name)
        if state.best is not None and not math.isfinite(state.best):
            raise ValueError(f"the schedule's state is damaged: best is {state.best}.")
        self.state = state
        self.spans = self._place()

    def _place(self) -> tuple[StageSpan, ...]:
        return self._schedule.place(
            self._nominal_steps, steps_per_epoch=self._steps_per_epoch, ended=self.state.ended
        )
