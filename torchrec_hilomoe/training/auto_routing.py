"""``model.hilomoe.route_by: auto``: which features decide, found while the plain model trains.

In the last steps before experts begin a probe listens to the steps of training. Every row is heard
before it is trained on, and blocks of rows judge each other (`probe.pairs`), since a run has few
rows to spare. At the boundary the views are chosen and experts are injected; where nothing stands
out the model stays plain, and the stages that would train experts alone are left out.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe import ProbeReport
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.models.build import inject_experts
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.checkpoint import RoutingDecision
from torchrec_hilomoe.training.listening import probe_of, run_unchanged
from torchrec_hilomoe.training.stages import StageTimeline

__all__ = ["AutoRouting", "Window", "chooses_routing", "decided_model", "window_of"]

MOST_STEPS = 2000
# Costs of a step that is heard, against what it says: benchmarks/LOG.md has them.
DRAWS, SKETCH, BLOCKS = 2, 16, 10
WANTED_ROWS = 200_000  # half of them found nothing where something decides
ROWS_OF_A_BUCKET = 32  # as the probe wants


def chooses_routing(config: RunConfig) -> bool:
    """Whether a run is to find by itself what routes its experts."""
    return config.model.hilomoe.enabled and config.model.hilomoe.route_by == "auto"


def decided_model(config: ModelConfig, decision: RoutingDecision | None) -> ModelConfig:
    """The model as it is now: plain until it was decided, then with the views that were chosen."""
    experts = config.hilomoe
    if not experts.enabled or experts.route_by != "auto":
        return config
    return replace(config, hilomoe=_decided(experts, decision))


def _decided(experts: InjectionConfig, decision: RoutingDecision | None) -> InjectionConfig:
    if decision is None or decision.route_by is None:
        return replace(experts, enabled=False)
    return replace(experts, route_by=decision.route_by)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps to which a probe listens, counted from 0.

    Attributes:
        start: The first one.
        stop: Here experts begin.
        every: Steps of which one is heard.
        held_out: Whether nothing was trained on their rows before.
    """

    start: int
    stop: int
    every: int
    held_out: bool

    def hears(self, step: int) -> bool:
        """Whether a step is listened to."""
        return self.start <= step < self.stop and (step - self.start) % self.every == 0


def window_of(config: RunConfig, timeline: StageTimeline, steps_per_epoch: int) -> Window:
    """Say to which steps of a run its probe listens.

    Rows judge only if nothing was trained on them: in the first epoch of a run that begins
    afresh. Otherwise rows of the validation split do, each other and what was heard.

    Raises:
        ValueError: If no step is without experts, too few are, or nobody knows how many.
    """
    experts, where = config.model.hilomoe, "model.hilomoe.route_by is auto"
    plain = []
    for span in timeline.spans:
        if span.stage.active_layers != 0:
            break
        plain.append(span)
    if len(plain) == len(timeline.spans):
        raise ValueError(f"{where}, but experts compute in no stage. Add one, or set hilomoe null.")
    if not plain:
        raise ValueError(
            f"{where}, which needs steps without experts, but the run begins with stage "
            f"{timeline.spans[0].stage.name!r}: train.backbone_share is "
            f"{config.train.backbone_share} and init_from is {config.init_from}. Raise "
            "train.backbone_share, give the checkpoint of a plain model as init_from, or name the "
            "features."
        )
    for span in plain:
        if span.stage.plateau is not None:
            raise ValueError(
                f"{where}, which listens to the last steps before experts begin, but stage "
                f"{span.stage.name!r} ends with a plateau of {span.stage.plateau.metric}, nobody "
                "knows when. Give that stage a length, or name the features."
            )
    stop, fresh = plain[-1].stop, config.init_from is None
    steps = experts.probe_steps or min(MOST_STEPS, math.ceil(stop * 2 / 3) if fresh else stop)
    if steps > stop:
        raise ValueError(
            f"model.hilomoe.probe_steps is {steps}, but experts begin after {stop} steps. Lower "
            "it, or raise train.backbone_share."
        )
    every = max(1, steps * config.train.batch_size // WANTED_ROWS)
    held_out = fresh and stop <= steps_per_epoch
    start = stop - steps
    window = Window(start=start, stop=stop, every=every, held_out=held_out)
    rows = config.train.batch_size * len(range(start, stop, every))
    if rows < (least := ROWS_OF_A_BUCKET * experts.num_experts):
        raise ValueError(
            f"model.hilomoe.probe_steps = {steps} of train.batch_size = {config.train.batch_size} "
            f"give {rows} rows to judge with, but {experts.num_experts} experts need {least}. "
            "Raise train.backbone_share and probe_steps, or lower num_experts."
        )
    return window


class AutoRouting:
    """Listens to a run, and decides at the boundary.

    Args:
        task: The plain model, or the model as it was decided.
        config: The run.
        window: To which steps it listens.
        decision: What was decided before the run was resumed.

    Attributes:
        decision: What was decided; None before the boundary.
    """

    def __init__(
        self,
        task: TrainTask,
        config: RunConfig,
        window: Window,
        decision: RoutingDecision | None = None,
    ) -> None:
        self.decision = decision
        self._task, self._config, self._window = task, config, window
        self._experts = config.model.hilomoe
        self._probe = None
        if decision is None:
            self._probe = probe_of(
                task,
                self._experts,
                draws=DRAWS,
                sketch=SKETCH,
                blocks=BLOCKS,
                thin_events=True,
                paired=True,
                seed=config.seed,
            )

    @property
    def num_layers(self) -> int:
        """Expert layers that the model may get."""
        return self._experts.num_layers

    def is_due(self, step: int) -> bool:
        """Whether it is to be decided before ``step``."""
        return self.decision is None and step >= self._window.stop

    @contextmanager
    def listening(self, step: int) -> Iterator[None]:
        """Let the passes of ``step`` be heard, if it is one of those; a collective call."""
        if self._probe is None or not self._window.hears(step):
            yield
            return
        backbone = self._task.model.backbone
        backbone.include_history_mean = True
        try:
            with self._probe.judge() if self._window.held_out else self._probe.fit():
                yield
        finally:
            backbone.include_history_mean = False

    def decide(
        self, model: DistributedModelParallel, step: int, validation: Iterable[CTRBatch]
    ) -> ProbeReport:
        """Choose the views and inject experts, or none; a collective call.

        Args:
            model: The sharded model, in no pipeline; to be wrapped anew afterwards.
            step: Steps done.
            validation: Judges where the rows of training cannot.

        Raises:
            ValueError: If what was heard is not enough to tell.
        """
        assert self._probe is not None
        if not self._window.held_out:
            self._judge_by(model, validation)
        report = self._probe.report()
        self.decision = RoutingDecision(
            step=step,
            route_by=report.route_by if report.pays else None,
            gains=tuple(layer.gain for layer in report.layers) if report.pays else (),
            verdict=report.verdict,
        )
        self._probe = None
        if report.pays:
            with torch.random.fork_rng(devices=_gpus(model)):
                torch.manual_seed(self._config.seed)  # the same experts on every rank
                inject_experts(self._task, _decided(self._experts, self.decision))
            accumulated = self._config.train.gradient_accumulation_steps
            set_auxiliary_loss_scale(self._task, self._task.loss_scale / accumulated)
        if self._config.train.compile:
            self._task.model.backbone.compile()
        return report

    def _judge_by(self, model: DistributedModelParallel, rows: Iterable[CTRBatch]) -> None:
        assert self._probe is not None
        window, backbone = self._window, self._task.model.backbone
        passes = len(range(window.start, window.stop, window.every))
        backbone.include_history_mean = True
        with torch.random.fork_rng(devices=_gpus(model)), self._probe.judge():
            deque(run_unchanged(model, islice(rows, passes)), maxlen=0)
        backbone.include_history_mean = False

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank has heard so far; what all ranks share only on the first one."""
        if self._probe is None:
            return {}
        first = torch.distributed.get_rank() == 0
        return {
            name: tensor
            for name, tensor in self._probe.state_dict().items()
            if first or not name.startswith("shared.")
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        if self._probe is not None:
            self._probe.load_state_dict(state_dict)


def _gpus(model: DistributedModelParallel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
