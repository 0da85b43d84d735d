"""The stages of a run, driven: in anyone's loop, and in the trainer's."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import ismethod
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipeline
from torchrec.distributed.types import ShardedModule

from torchrec_hilomoe.training.optimizers.host import Factory, HostOptimizers, ParameterGroups
from torchrec_hilomoe.training.optimizers.stage_optimizers import StageOptimizer, StageOptimizers
from torchrec_hilomoe.training.stages import Stage, StageSchedule, StageSpan, StageTimeline
from torchrec_hilomoe.training.stages.driven_pipeline import DrivenPipeline, PipelineFactory
from torchrec_hilomoe.training.stages.staging import (
    activate_layers,
    check_stages,
    enter_stage,
    set_training_mode,
    share_statistics,
)
from torchrec_hilomoe.training.stages.wrapping import (
    check_wrapper,
    process_group_of,
    unwrapped,
    Wrap,
)

__all__ = ["StageDriver"]

STATE = ("step", "stage", "timeline", "spans", "optimizer")

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")


class StageDriver(Generic[Model]):
    """Runs a schedule of stages in a loop of the host's own.

    Inject experts, load what there is, wrap the model, and build the driver in place of the
    optimizer. Before each step :meth:`begin_step` says whether a stage begins. If so it has

    - frozen and unfrozen parameters, and then wrapped the model anew, because which gradients are
      averaged over ranks is decided when a model is wrapped: :attr:`model` is another one;
    - frozen tables by detaching what is looked up, because fused optimizers ignore
      ``requires_grad``;
    - set which expert layers compute and which learn; kept the running statistics of a frozen
      base, and shared the first rank's;
    - forgotten the gradients of the stage before. What is frozen keeps every bit of its optimizer's
      state, too.

    A pipeline holds the model that it was built with and reads batches ahead. So build it anew at
    each boundary, of :attr:`model` and :attr:`optimizer`, and let it read what :meth:`take` gives;
    or give ``pipeline=`` and call :meth:`progress`, which does both.

    Args:
        model: In :class:`~torchrec.distributed.model_parallel.DistributedModelParallel`, in DDP, in
            FSDP's ``fully_shard``, or in no wrapper.
        schedule: The stages; or a :class:`~torchrec_hilomoe.training.stages.StageTimeline`, which
            has placed them in a run with epochs, decay or plateaus.
        optimizer: A function that builds an optimizer, of any kind, of the parameter groups that it
            is given, with the learning rates that stages multiply.
        total_steps: Length of the run, in optimizer steps; a timeline knows it.
        parameter_groups: The host's own, with options of their own; None is one of all that learns.
            Experts are put in groups apart, each layer for itself.
        wrap: Wraps the bare model, where a wrapper like the one that ``model`` is in would not do.
        pipeline: Builds a pipeline of :attr:`model` and :attr:`optimizer`.
        layers_to_come: Expert layers that a model without sites will get later, or has had.

    Attributes:
        model: The model in the wrapper of the stage.
        optimizer: Every optimizer in one, those fused into tables too: as pipelines want it.
        step: Optimizer steps done.

    Raises:
        ValueError: If the model cannot be wrapped anew, cannot follow a stage, or does not fit the
            optimizer; if the stages do not fit the run.

    Example:
        >>> from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2), sites=["0"])
        >>> schedule = StageSchedule.three_stages(num_layers=2, frozen_share=0.2)
        >>> driver = StageDriver(
        ...     model, schedule, lambda groups: torch.optim.Adam(groups, lr=1e-3), total_steps=10
        ... )
        >>> while not driver.is_complete:
        ...     if driver.begin_step():
        ...         print(driver.stage.name, "from step", driver.step)
        ...     driver.model(torch.randn(32, 8)).square().mean().backward()
        ...     driver.optimizer.step()
        ...     driver.optimizer.zero_grad()
        ...     driver.end_step()
        backbone_warmup from step 0
        expert_warmup[1] from step 2
        expert_warmup[2] from step 3
        finetune from step 4
    """

    def __init__(
        self,
        model: Model,
        schedule: StageSchedule | StageTimeline,
        optimizer: Factory | StageOptimizers,
        *,
        total_steps: int | None = None,
        parameter_groups: ParameterGroups | None = None,
        wrap: Wrap | None = None,
        pipeline: PipelineFactory | None = None,
        layers_to_come: int = 0,
    ) -> None:
        check_wrapper(model, wrap)
        self._timeline = _timeline(schedule, total_steps)
        stages = [span.stage for span in self._timeline.spans]
        module = unwrapped(model)
        check_stages(module, stages, later=layers_to_come)
        self._fixed = [p for p in module.parameters() if not p.requires_grad]
        self._optimizers = _optimizers(model, optimizer, parameter_groups, stages)
        self.model = model
        self.step = 0
        self._wrap = wrap
        self._driven = None if pipeline is None else DrivenPipeline(pipeline)
        self._span = self._timeline.spans[0]
        self._entered = self._begun = False
        activate_layers(module, self.stage)

    @property
    def optimizer(self) -> StageOptimizer:
        """Every optimizer in one, those fused into tables too: as pipelines want it."""
        return self._optimizers.stage_optimizer

    @property
    def pipeline(self) -> TrainPipeline[Any, Any] | None:
        """Of the stage, where the driver builds it; None before its first step."""
        return None if self._driven is None else self._driven.pipeline

    @property
    def span(self) -> StageSpan:
        """The stage that was entered last, and where it lies in the run."""
        return self._span

    @property
    def stage(self) -> Stage:
        """The stage that was entered last."""
        return self._span.stage

    @property
    def is_complete(self) -> bool:
        """Whether every step is done."""
        return self.step >= self._timeline.total_steps

    @property
    def at_boundary(self) -> bool:
        """Whether a stage begins with the next step: the pipeline is to be detached before."""
        return not self._entered or self._timeline.at(self.step) != self._span

    @property
    def sure_until(self) -> int:
        """Up to which step the stage surely lasts."""
        return self._timeline.sure_until(self.step)

    def begin_step(self) -> bool:
        """Prepare the next step; a collective call where a stage begins.

        Returns:
            Whether a stage begins: :attr:`model` is in another wrapper, and a pipeline is to be
            built anew.

        Raises:
            ValueError: If the run is complete, the step before was not ended, the model has got
                experts since the driver was built, or a pipeline of the stage before still holds
                the model.
        """
        if self.is_complete:
            raise ValueError(
                f"StageDriver: step = {self.step} and the run has {self._timeline.total_steps} "
                "steps. Ask is_complete, or build the driver for a longer run."
            )
        if self._begun:
            raise ValueError(
                f"StageDriver.begin_step: step {self.step} was begun and not ended. Call "
                "end_step() after the optimizer's step."
            )
        if isinstance(self._optimizers, HostOptimizers):
            self._optimizers.refuse_late_experts()
        crossed = self.at_boundary
        if crossed:
            self._enter(self._timeline.at(self.step))
        self._optimizers.set_rates(self._span, self.step, self._timeline.decay(self.step))
        self._begun = True
        return crossed

    def end_step(self) -> None:
        """Count the step, after the optimizer's; a micro-batch is none."""
        self._begun = False
        self.step += 1

    def take(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """As many batches as surely belong to the stage, one a step.

        A pipeline reads ahead; a batch that it has read past a boundary would be lost.
        """
        return islice(batches, self.sure_until - self.step)

    def progress(self, batches: Iterator[Batch]) -> Any:
        """Train a step with the pipeline of the driver, and return its output.

        Raises:
            ValueError: If the driver was not told how to build one.
            StopIteration: If ``batches`` has ended; another iterator may follow.
        """
        if self._driven is None:
            raise ValueError(
                "StageDriver.progress needs pipeline=, a function that builds one, such as lambda "
                "model, optimizer: TrainPipelineSparseDist(model, optimizer, device); it is None."
            )
        if not self._begun:
            if self.at_boundary:
                self._driven.drop()
            self.begin_step()
        output = self._driven.progress(
            self.model, self.optimizer, batches, step=self.step, sure_until=self.sure_until
        )
        self.end_step()
        return output

    @contextmanager
    def evaluation(self) -> Iterator[Model]:
        """Give the model to score with, in evaluation mode and out of the driver's pipeline.

        Ranks have the first one's running statistics. Afterwards training goes on as if nothing
        had been; call it between two steps. A collective call.
        """
        if self._driven is not None:
            self._driven.detach()
        share_statistics(unwrapped(self.model), process_group_of(self.model))
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.train()
            if self._driven is not None:
                self._driven.attach()

    def train(self) -> None:
        """Switch to training, with the running statistics of a frozen base kept as they are.

        To be called in place of ``model.train()``, which would let these move.
        """
        set_training_mode(self.model, self._span.stage)

    def observe(self, metrics: Mapping[str, float]) -> bool:
        """Take note of a validation after the last step, and return whether its stage ends.

        Args:
            metrics: By name, the same on every rank.
        """
        return self._timeline.observe(self.step, metrics)

    def compute_as_after(self, step: int) -> None:
        """Let those layers compute that did after ``step`` steps, to evaluate such a checkpoint."""
        self.step = step
        self._span = self._timeline.at(step - 1)
        activate_layers(unwrapped(self.model), self._span.stage)

    def go_on_from(self, step: int, timeline: Mapping[str, Any]) -> None:
        """Go on after ``step`` steps; the next one enters its stage again.

        Args:
            step: Optimizer steps done.
            timeline: What validations had changed of the stages, or nothing.

        Raises:
            ValueError: If it is not the state of such a schedule.
        """
        if timeline:
            self._timeline.load_state_dict(timeline)
        self.compute_as_after(step)
        self._entered = self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, and the state of every optimizer: views, not copies.

        Save it between two steps beside the model's own ``state_dict``, by DCP where tables are
        sharded. A host starts its loader again at batch ``step``, since pipelines read ahead.
        """
        return {
            "step": self.step,
            "stage": self._span.stage.name,
            "timeline": json.dumps(self._timeline.state_dict()),
            "spans": json.dumps(self._spans()),
            **self._optimizers.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, in the middle of a stage or between two.

        Raises:
            ValueError: If it is no state of a driver, or that of another schedule, run or model.
        """
        lacks = [name for name in STATE if name not in state_dict]
        if lacks:
            raise ValueError(
                f"StageDriver.load_state_dict: the state lacks {', '.join(lacks)}; it has "
                f"{', '.join(map(str, state_dict)) or 'nothing'}. Give what state_dict() of a "
                "driver of this version returned. To go on from a step without its state, call "
                "go_on_from(step, {}): optimizers then start anew."
            )
        step, stage = state_dict["step"], state_dict["stage"]
        spans = json.loads(state_dict["spans"])
        self._timeline.load_state_dict(json.loads(state_dict["timeline"]))
        steps = self._timeline.total_steps
        here = self._timeline.at(max(0, step - 1)).stage.name
        if step > steps or (stage, spans) != (here, self._spans()):
            raise ValueError(
                f"StageDriver.load_state_dict: the state is of step {step} in stage {stage!r}, but "
                f"this run has {steps} steps and is in stage {here!r} there; it was saved with "
                f"{_listed(spans)}, and this run has {_listed(self._spans())}. Give the schedule "
                "and the total_steps that it was saved with."
            )
        self._optimizers.load_state_dict(state_dict)
        self.go_on_from(step, {})

    def _spans(self) -> list[list[Any]]:
        return [[span.stage.name, span.start, span.stop] for span in self._timeline.spans]

    def _enter(self, span: StageSpan) -> None:
        self._refuse_attached()
        before, self._span = self.model, span
        self.model = enter_stage(before, span.stage, fixed=self._fixed, wrap=self._wrap)
        if self.model is not before and before is not unwrapped(before):
            # A step with it would not be averaged over ranks, or wait for gradients for ever.
            before.forward = partial(_refuse_stale, span.stage.name)
        self._optimizers.enter(span.stage)
        self._entered = True

    def _refuse_attached(self) -> None:
        for name, module in unwrapped(self.model).named_modules():
            if isinstance(module, ShardedModule) and not ismethod(module.forward):
                raise ValueError(
                    f"StageDriver: stage {self._timeline.at(self.step).stage.name!r} begins, but a "
                    f"pipeline of stage {self._span.stage.name!r} still computes {name!r}. Where "
                    "at_boundary is true, call pipeline.detach() before begin_step(), or give "
                    "StageDriver pipeline= and call progress()."
                )


def _timeline(schedule: StageSchedule | StageTimeline, total_steps: int | None) -> StageTimeline:
    if isinstance(schedule, StageTimeline):
        if total_steps is not None:
            raise ValueError(
                f"StageDriver: total_steps = {total_steps}, but the timeline has placed its stages "
                f"in {schedule.total_steps} steps already. Leave total_steps out."
            )
        return schedule
    if total_steps is None or total_steps < 1:
        raise ValueError(
            f"StageDriver: total_steps is {total_steps}, but the stages of a StageSchedule are "
            "placed in a run of a known length. Give it as a number of steps, at least 1."
        )
    return StageTimeline(schedule, total_steps=total_steps)


def _optimizers(
    model: nn.Module,
    optimizer: Factory | StageOptimizers,
    parameter_groups: ParameterGroups | None,
    stages: list[Stage],
) -> StageOptimizers:
    if isinstance(optimizer, StageOptimizers):
        return optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"StageDriver: optimizer is built already ({type(optimizer).__name__}), and in it "
            "experts are not apart. Give a function of parameter groups, such as lambda "
            "groups: torch.optim.Adam(groups, lr=1e-3), and your groups as parameter_groups."
        )
    built = HostOptimizers(model, optimizer, parameter_groups)
    built.check(stages)
    return built


def _listed(spans: list[list[Any]]) -> str:
    return ", ".join(f"{name} (steps {start} to {stop})" for name, start, stop in spans)


def _refuse_stale(stage: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise ValueError(
        f"This wrapper is of the time before stage {stage!r} and would train without the other "
        "ranks. Use StageDriver.model, and build what holds the model anew where begin_step() "
        "returns True."
    )
