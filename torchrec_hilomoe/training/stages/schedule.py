"""A list of stages, and where each lies in a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torchrec_hilomoe.config.stage import Stage

__all__ = ["StageSchedule", "StageSpan"]


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
        expert_rate: float = 5.0,
        warmup_steps: int = 100,
    ) -> "StageSchedule":
        """The schedule of design: backbone, then one expert layer after the other, then all.

        Args:
            num_layers: Expert layers, each with a stage of its own while the rest is frozen.
            backbone_share: Share of the run without experts; 0 starts from a trained model.
            frozen_share: Share of the run for all expert stages together. Frozen steps cost
                data, so it is small; 0 lets the experts join while everything learns.
            expert_rate: The experts' factor on the backbone's learning rate.
            warmup_steps: Linear warm-up of the first stage and of each expert layer.
        """
        stages = []
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
                    expert_rate=expert_rate,
                    warmup_steps=warmup_steps // 10,
                )
                for layer in range(1, num_layers + 1)
            ]
        joined_late = bool(stages)
        finetune = Stage(
            name="finetune",
            expert_rate=expert_rate,
            warmup_steps=0 if joined_late else warmup_steps,
        )
        return cls(stages=(*stages, finetune))

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
    ) -> tuple[StageSpan, ...]:
        """Lay the stages over a run; stages without a step are left out.

        Args:
            total_steps: Length of the run, of which shares are taken.
            steps_per_epoch: Optimizer steps of one pass over the training split.
            ended: Stages that a plateau has ended, and at which step.

        Raises:
            ValueError: If the stages need more steps than the run has, or leave some over
                though none has ended early.
        """
        # Borders are rounded, not lengths: many small shares then add up to their sum.
        border, exact = 0, 0.0
        spans = []
        for stage in self.stages:
            if stage.steps is not None:
                exact += stage.steps
            elif stage.epochs is not None:
                exact += stage.epochs * _needed(steps_per_epoch, stage)
            elif stage.share is not None:
                exact += stage.share * total_steps
            else:
                exact = max(exact, total_steps)
            start = border
            if stage.name in ended:
                exact = float(ended[stage.name])
            border = math.floor(exact + 0.5)
            if border > start:
                spans.append(StageSpan(stage=stage, start=start, stop=border))
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
