"""Where the stages of a run lie by what is known so far, and what validations change of it.

What a running schedule knows beyond its stages is small and exact, and is saved with every
checkpoint: a run that is resumed finds the same stages at the same steps.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchrec_hilomoe.config.stage import Decay, Stage
from torchrec_hilomoe.training.stages.schedule import StageSchedule, StageSpan

__all__ = ["StageTimeline", "StageTimelineState"]


@dataclass(frozen=True, kw_only=True)
class StageTimelineState:
    """What a timeline has learned from validations.

    Attributes:
        ended: Stages that a plateau has ended, and at which step.
        stage: The stage that the two others are about.
        best: Best value of its metric.
        waited: Number of validations since that value.
        begun: Stages that had begun when the run was saved, and at which step.
        done: Steps done then.
    """

    ended: Mapping[str, int] = field(default_factory=dict)
    stage: str | None = None
    best: float | None = None
    waited: int = 0
    begun: Mapping[str, int] = field(default_factory=dict)
    done: int = 0


class StageTimeline:
    """Where the stages of a run lie, by what is known so far.

    Args:
        schedule: The stages.
        total_steps: Length of the run.
        steps_per_epoch: Optimizer steps of one pass over the training split.
        decay: How rates fall over the run, for stages that do not say it themselves.
        evaluate_every: Steps between two validations.
        plain_warmup: Warm-up steps of the same run without experts, whose rates it has once they
            are left out; None leaves every stage its own.

    Raises:
        ValueError: If the stages do not fit the run, or one waits for a plateau of a metric that
            is never computed.

    Attributes:
        schedule: The stages, as they were given.
        state: State that validations have changed, as :meth:`state_dict` saves it.
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
        plain_warmup: int | None = None,
    ) -> None:
        for stage in schedule.stages:
            if stage.plateau is not None and evaluate_every is None:
                raise ValueError(
                    f"Stage {stage.name!r} ends with a plateau of {stage.plateau.metric}, but "
                    "train.evaluate_every is null, so that nothing is validated. Give it the steps "
                    "between two validations."
                )
        self.state = StageTimelineState()
        self.schedule = schedule
        self._nominal_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._decay = decay or Decay()
        self._plain_warmup = plain_warmup
        self._leaves_out_experts = False
        self._experts_until = total_steps  # no later step trains experts alone
        self._evaluate_every = evaluate_every
        self.spans = self._place()

    @property
    def total_steps(self) -> int:
        """Length of the run, unless another plateau shortens it."""
        return self.spans[-1].stop

    def at(self, step: int) -> StageSpan:
        """The stage that trains ``step``, counted from 0; after the last step, the last stage."""
        return next((span for span in self.spans if step < span.stop), self.spans[-1])

    def leave_out_experts(self, since: int = 0) -> None:
        """Give the steps of stages that train experts alone to the stage that follows.

        Of stages at the end, to the one before them. Such steps before step ``since`` stay. Where
        the warm-up of the run without experts is known, the others have its rates.
        """
        self._leaves_out_experts = True
        self._experts_until = since
        self.spans = self._place()

    def warms_up_experts(self, step: int) -> bool:
        """Whether ``step`` trains experts alone, and nothing else learned beside them before it."""
        span = self.at(step)
        return not _trains_more(span.stage) and not any(
            _trains_more(earlier.stage) and earlier.stage.active_layers != 0
            for earlier in self.spans
            if earlier.start < span.start
        )

    def ends_expert_warmup(self, step: int) -> bool:
        """Whether ``step`` trains more than experts, after a step that :meth:`warms_up_experts`."""
        return (
            0 < step < self.total_steps
            and _trains_more(self.at(step).stage)
            and self.warms_up_experts(step - 1)
        )

    def decay(self, step: int) -> float:
        """Factor on every rate at ``step``, warm-up apart."""
        span = self.at(step)
        own = span.stage.decay
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
        self.state = replace(state, ended=ended, stage=stage.name, best=best, waited=waited)
        if ends:
            self.spans = self._place()
        return ends

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """The state as JSON; its numbers come back to the bit.

        Args:
            done: Steps done, for a run that may go on with another length; None for one that
                does not.
        """
        if done is None:
            return asdict(self.state)
        begun = {span.stage.name: span.start for span in self.spans if span.start < done}
        return asdict(replace(self.state, begun=begun, done=done))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: If it is not the state of such a schedule.
        """
        state = StageTimelineState(**state_dict)
        for name in state.ended:
            self.schedule.named(name)
        if state.best is not None and not math.isfinite(state.best):
            raise ValueError(f"the schedule's state is damaged: best is {state.best}.")
        if not self._knows_in_order(state.begun):
            state = replace(state, begun={}, done=0)
        self.state = state
        self.spans = self._place()

    def _knows_in_order(self, begun: Mapping[str, int]) -> bool:
        """Whether stages have begun in this schedule, and not in one that was changed since."""
        names = [stage.name for stage in self.schedule.stages]
        order = sorted(begun, key=lambda name: begun[name])
        return order == [name for name in names if name in begun]

    def _place(self) -> tuple[StageSpan, ...]:
        spans = self.schedule.place(
            self._nominal_steps,
            steps_per_epoch=self._steps_per_epoch,
            ended=self.state.ended,
            begun=self.state.begun,
            done=self.state.done,
        )
        until = self._experts_until
        kept = [
            span if _trains_more(span.stage) else replace(span, stop=min(span.stop, until))
            for span in spans
            if _trains_more(span.stage) or span.start < until
        ]
        if not kept:  # in a short run the others may have no step
            others = (stage for stage in self.schedule.stages if _trains_more(stage))
            kept = [replace(spans[-1], stage=next(others, spans[-1].stage))]
        starts = [0, *(span.stop for span in kept)]
        stops = [*(span.stop for span in kept[:-1]), spans[-1].stop]
        return tuple(
            self._warmed_up_as_plain(replace(span, start=start, stop=stop))
            for span, start, stop in zip(kept, starts, stops, strict=False)
        )

    def _warmed_up_as_plain(self, span: StageSpan) -> StageSpan:
        """The span with the warm-up of a run that never was to have experts, if that is known."""
        steps = self._plain_warmup
        if steps is None or not self._leaves_out_experts or not _trains_more(span.stage):
            return span
        # Steps that trained experts alone count, as they do for the decay: every step that trains
        # more has the rate of that step of the plain run, whether experts came and went or not.
        return replace(span, stage=replace(span.stage, warmup_steps=steps), warmup_start=0)


def _trains_more(stage: Stage) -> bool:
    """Whether a stage trains more than experts."""
    return stage.train_backbone or stage.train_tables
