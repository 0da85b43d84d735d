"""A list of stages, where each lies in a run, and what validations change of it.

What a running schedule knows beyond its stages is small and exact, and is saved with every
checkpoint: a run that is resumed finds the same stages at the same steps.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torchrec_hilomoe.config.stage import Decay, Stage

__all__ = ["StageSchedule", "StageSpan", "StageTimeline", "StageTimelineState"]


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """A stage placed in a run: it trains steps ``start`` to ``stop - 1``, counted from 0."""

    stage: Stage
    start: int
    stop: int

    def warmup(self, step: int) -> float:
        """Factor on the learning rates at ``step``, rising linearly to 1."""
        done = step - self.start + 1
        return min(1.0, done / self.stage.warmup_steps) if self.stage.warmup_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """An ordered list of stages.

    Example:
        >>> schedule = StageSchedule.three_stages(num_layers=2, backbone_share=0.3)
        >>> [(span.stage.name, span.start, span.stop) for span in schedule.place(100)]
        [('backbone_warmup', 0, 30), ('expert_warmup[1]', 30, 33), \
('expert_warmup[2]', 33, 36), ('finetune', 36, 100)]

    Raises:
        ValueError: If there is no stage, names repeat, or an open length is not the last.
    """

    stages: tuple[Stage, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("StageSchedule.stages is empty; give at least one stage.")
        if len(set(names)) < len(names):
            raise ValueError(f"StageSchedule.stages: names must differ, got {names}.")
        for stage in self.stages[:-1]:
            if stage.is_open:
                raise ValueError(
                    f"StageSchedule: stage {stage.name!r} has none of steps, epochs and share; "
                    f"only the last one, {names[-1]!r}, may take what is left."
                )

    @property
    def counts_epochs(self) -> bool:
        """Whether it takes the length of an epoch to place it."""
        return any(stage.epochs is not None for stage in self.stages)

    @classmethod
    def plain(cls, *, warmup_steps: int = 100) -> "StageSchedule":
        """One stage in which everything learns: a model without experts."""
        return cls(stages=(Stage(name="train", warmup_steps=warmup_steps),))

    @classmethod
    def three_stages(
        cls,
        *,
        num_layers: int,
        backbone_share: float = 0.2,
        frozen_share: float = 0.06,
        expert_lr_scale: float = 5.0,
        key_lr_scale: float = 1.0,
        warmup_steps: int = 100,
        probe_steps: int = 0,
    ) -> "StageSchedule":
        """The schedule of design: backbone, then one expert layer after the other, then all.

        Args:
            num_layers: Expert layers, each with a stage of its own while the rest is frozen.
            backbone_share: Share of the run without experts; 0 starts from a trained model.
            frozen_share: Share of the run for all expert stages together. Frozen steps cost
                data, so it is small; 0 lets the experts join while everything learns.
            expert_lr_scale: The experts' factor on the backbone's learning rate.
            key_lr_scale: The keys' factor on the experts' learning rate.
            warmup_steps: Linear warm-up of the first stage and of each expert layer.
            probe_steps: Steps without experts that a run from a trained model begins with, to find
                what should route them; 0 needs none.
        """
        stages = []
        if probe_steps > 0:
            stages.append(
                Stage(name="probe", steps=probe_steps, active_layers=0, warmup_steps=warmup_steps)
            )
        if backbone_share > 0:
            stages.append(
                Stage(
                    name="backbone_warmup",
                    share=backbone_share,
                    active_layers=0,
                    warmup_steps=warmup_steps,
                )
            )
        if frozen_share > 0:
            stages += [
                Stage(
                    name=f"expert_warmup[{layer}]",
                    share=frozen_share / num_layers,
                    active_layers=layer,
                    train_backbone=False,
                    train_tables=False,
                    expert_lr_scale=expert_lr_scale,
                    key_lr_scale=key_lr_scale,
                    warmup_steps=warmup_steps // 10,
                )
                for layer in range(1, num_layers + 1)
            ]
        joined_late = bool(stages)
        finetune = Stage(
            name="finetune",
            expert_lr_scale=expert_lr_scale,
            key_lr_scale=key_lr_scale,
            warmup_steps=0 if joined_late else warmup_steps,
        )
        return cls(stages=(*stages, finetune))

    def _position(self, name: str) -> int:
        return self.stages.index(self.named(name))

    def named(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: If there is none, listing those that there are.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(repr(stage.name) for stage in self.stages)
        raise ValueError(
            f"StageSchedule has no stage {name!r}, only {names}. Use the configuration that the "
            "checkpoint was saved with."
        )

    def place(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int | None = None,
        ended: Mapping[str, int] = MappingProxyType({}),
        begun: Mapping[str, int] = MappingProxyType({}),
        done: int = 0,
    ) -> tuple[StageSpan, ...]:
        """Lay the stages over a run; stages without a step are left out.

        Args:
            total_steps: Length of the run, of which shares are taken.
            steps_per_epoch: Optimizer steps of one pass over the training split.
            ended: Stages that a plateau has ended, and at which step.
            begun: Stages that have begun, and at which step, though it were a run of another
                length: they stay there, those that were passed over had no step, and what is
                left of the run is laid out from the last of them on.
            done: Steps done, the last one in the last stage that has begun.

        Raises:
            ValueError: If the stages need more steps than the run has, or leave some over
                though none has ended early.
        """
        # Borders are rounded, not lengths: many small shares then add up to their sum.
        border, exact, moved = 0, 0.0, False
        current = max((self._position(name) for name in begun), default=-1)
        spans: list[StageSpan] = []
        for at, stage in enumerate(self.stages):
            start = begun.get(stage.name, border)
            if start != border:
                border, exact, moved = start, float(start), True
                spans[-1:] = [replace(span, stop=start) for span in spans[-1:]]
            if stage.steps is not None:
                exact += stage.steps
            elif stage.epochs is not None:
                exact += stage.epochs * _needed(steps_per_epoch, stage)
            elif stage.share is not None:
                exact += stage.share * total_steps
            else:
                exact = max(exact, total_steps)
            if stage.name in ended:
                exact = float(ended[stage.name])
            border = math.floor(exact + 0.5)
            if at == current and border < done:
                border, exact, moved = done, float(done), True
            if moved:
                border = min(border, total_steps)
            if border > start and (at >= current or stage.name in begun):
                spans.append(StageSpan(stage=stage, start=start, stop=border))
        if moved and not ended and border < total_steps:
            border = total_steps
            spans[-1] = replace(spans[-1], stop=border)
        if border > total_steps or (border < total_steps and not ended):
            raise ValueError(
                f"StageSchedule: the stages cover {border} steps, but the run has {total_steps}. "
                "Let the last stage be open, or change train.max_steps."
            )
        return tuple(spans)


def _needed(steps_per_epoch: int | None, stage: Stage) -> int:
    if steps_per_epoch is None:
        raise ValueError(
            f"Stage {stage.name!r}: epochs = {stage.epochs}, but how many steps an epoch has is "
            "not known here. Give steps_per_epoch, or the length in steps."
        )
    return steps_per_epoch


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

        Of stages at the end, to the one before them. Such steps before step ``since`` stay.
        """
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
            replace(span, start=start, stop=stop)
            for span, start, stop in zip(kept, starts, stops, strict=False)
        )


def _trains_more(stage: Stage) -> bool:
    """Whether a stage trains more than experts."""
    return stage.train_backbone or stage.train_tables
