"""A list of stages, and where each lies in a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torchrec_hilomoe.config.stage import Stage

__all__ = ["StageSchedule", "StageSpan"]


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """A stage placed in a run: it trains steps ``start`` to ``stop - 1``, counted from 0.

    Attributes:
        stage: The stage.
        start: Its first step.
        stop: The step after its last one.
        warmup_start: Step from which its warm-up counts; None is ``start``.
    """

    stage: Stage
    start: int
    stop: int
    warmup_start: int | None = None

    def warmup(self, step: int) -> float:
        """Factor on the learning rates at ``step``, rising linearly to 1."""
        start = self.start if self.warmup_start is None else self.warmup_start
        done = step - start + 1
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
