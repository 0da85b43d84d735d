"""Stages: who computes, who learns, for how long, as data.

A schedule is a list of stages. The trainer reads it; nothing else in the package knows a stage's
name, so that users can write their own.
"""

import math
from dataclasses import dataclass, field

__all__ = ["Stage", "StageSchedule", "StageSpan"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: Shown while it runs and written with every metric.
        steps: Its length in optimizer steps; excludes ``share``.
        share: Its length as a share of the run's steps; with neither, it takes what is left.
        active_layers: Expert layers that compute; None is all of them.
        learning_layers: Expert layers that learn, counted from 1; None is every active one.
        train_backbone: Whether everything learns that is neither table nor expert.
        train_tables: Whether embedding tables learn.
        rate: Factor on the learning rates of tables and backbone.
        expert_rate: Factor on the backbone's learning rate for experts.
        warmup_steps: Steps over which the rates rise linearly from zero.

    Raises:
        ValueError: If a length, a layer or a rate is out of range, or nothing learns.
    """

    name: str
    steps: int | None = None
    share: float | None = None
    active_layers: int | None = None
    learning_layers: tuple[int, ...] | None = None
    train_backbone: bool = True
    train_tables: bool = True
    rate: float = 1.0
    expert_rate: float = 5.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        where = f"Stage {self.name!r}"
        if self.steps is not None and self.share is not None:
            raise ValueError(
                f"{where}: steps = {self.steps} and share = {self.share} are both given; keep one."
            )
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"{where}: steps must be at least 0, got {self.steps}.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"{where}: share must be between 0 and 1, got {self.share}.")
        if self.active_layers is not None and self.active_layers < 0:
            raise ValueError(
                f"{where}: active_layers must be at least 0, got {self.active_layers}."
            )
        for layer in self.learning_layers or ():
            if layer < 1 or (self.active_layers is not None and layer > self.active_layers):
                raise ValueError(
                    f"{where}: learning_layers = {self.learning_layers} names layer {layer}, but "
                    f"layers 1 to {self.active_layers} compute. Raise active_layers or drop it."
                )
        if min(self.rate, self.expert_rate, self.warmup_steps) < 0:
            raise ValueError(
                f"{where}: rate = {self.rate}, expert_rate = {self.expert_rate} and "
                f"warmup_steps = {self.warmup_steps} must not be negative."
            )
        if not (self.train_backbone or self.train_tables or self.experts_learn):
            raise ValueError(
                f"{where} trains nothing: train_backbone and train_tables are false and no expert "
                "layer learns. Switch one of them on or drop the stage."
            )

    @property
    def experts_learn(self) -> bool:
        """Whether an expert layer may learn in this stage."""
        return self.active_layers != 0 and self.learning_layers != ()


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
            if stage.steps is None and stage.share is None:
                raise ValueError(
                    f"StageSchedule: stage {stage.name!r} has neither steps nor share; only the "
                    f"last one, {names[-1]!r}, may take what is left."
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

    def place(self, total_steps: int) -> tuple[StageSpan, ...]:
        """Lay the stages over a run; stages without a step are left out.

        Raises:
            ValueError: If the stages need more steps than the run has, or leave some over.
        """
        # Borders are rounded, not lengths: many small shares then add up to their sum.
        border, exact = 0, 0.0
        spans = []
        for stage in self.stages:
            if stage.steps is not None:
                exact += stage.steps
            elif stage.share is not None:
                exact += stage.share * total_steps
            else:
                exact = max(exact, total_steps)
            start, border = border, math.floor(exact + 0.5)
            if border > start:
                spans.append(StageSpan(stage=stage, start=start, stop=border))
        if border != total_steps:
            raise ValueError(
                f"StageSchedule: the stages cover {border} steps, but the run has {total_steps}. "
                "Let the last stage be open, or change train.max_steps."
            )
        return tuple(spans)
