"""``model.hilomoe.route_by: auto``: which features decide, found while the plain model trains.

In the last steps before experts begin a probe listens to the steps of training. Every row is heard
before it is trained on, and blocks of rows judge each other (`probe.pairs`), since a run has few
rows to spare. At the boundary the views are chosen and experts are injected; where nothing stands
out, and in a run that is too short to tell, the model stays plain, and the stages that would train
experts alone are left out.

Once the experts have warmed up, rows of the validation split say what they have brought
(`training.confirming`); where it is a loss, they are taken out again.

A run whose warm-up is too short for that, but which is long enough itself, trains and probes a
plain model aside first (`training.probing`), and then begins with what was found.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.command_line import Recorded
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe import ProbeReport, remove_hilomoe, sites_of
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.models.build import inject_experts
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.checkpoint import Brought, RoutingDecision
from torchrec_hilomoe.training.confirming import brought_by_experts
from torchrec_hilomoe.training.listening import probe_of, run_unchanged
from torchrec_hilomoe.training.stages import Stage, StageTimeline

__all__ = [
    "AutoRouting",
    "Window",
    "chooses_routing",
    "confirmed",
    "decided_model",
    "decision_of",
    "found_and_brought",
    "window_of",
]

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


def decision_of(report: ProbeReport, step: int) -> RoutingDecision:
    """What a report makes of a run that has done ``step`` steps."""
    return RoutingDecision(
        step=step,
        route_by=report.route_by if report.pays else None,
        gains=tuple(layer.gain for layer in report.layers) if report.pays else (),
        verdict=report.verdict,
    )


def confirmed(decision: RoutingDecision, brought: Brought | None) -> RoutingDecision:
    """A decision once it is known what experts brought: a loss takes them out again."""
    if brought is None:
        return decision
    assert decision.route_by is not None
    measured = (
        f"brought {brought.gain:.3g} nats a row by the end of their warm-up ({brought.low:.3g} to "
        f"{brought.high:.3g}, {brought.rows:,} rows of the validation split)"
    )
    if brought.high >= 0:
        verdict = f"{decision.verdict} Experts {measured}."
        return replace(decision, verdict=verdict, brought=brought)
    features = ", ".join(dict.fromkeys(name for layer in decision.route_by for name in layer))
    verdict = (
        f"experts were taken out again: routed by {features}, they {measured}. They were predicted "
        f"to gain {sum(decision.gains):.3g}."
    )
    return replace(decision, route_by=None, verdict=verdict, brought=brought)


def found_and_brought(
    decision: RoutingDecision, test_auc: float, plain: Recorded | None
) -> Iterator[str]:
    """Say at the end of a run what was found, and what experts brought.

    Args:
        decision: What was found.
        test_auc: Of the run.
        plain: What is known of the same run without experts.
    """
    if decision.route_by is None:
        yield f"found: {decision.verdict} The model {stays_plain(decision)}."
        return
    features = ", ".join(dict.fromkeys(name for layer in decision.route_by for name in layer))
    yield f"found: experts routed by {features}, predicted to gain {sum(decision.gains):.4f} nats"
    if plain is None:
        yield "brought: train the same without experts, and compare: --model.hilomoe null"
    else:
        yield (
            f"brought: {test_auc - plain.test_auc:+.4f} test AUC; without experts it was "
            f"{plain.test_auc:.4f}, as recorded of: {plain.command}"
        )


def stays_plain(decision: RoutingDecision) -> str:
    """What has become of a model for which none was chosen."""
    return "stayed plain" if decision.brought is None else "is plain again"


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps to which a probe listens, counted from 0.

    Attributes:
        start: The first one.
        stop: Here experts begin.
        every: Steps of which one is heard.
        held_out: Whether nothing was trained on their rows before.
        aside: Whether nothing is heard, since a plain model is trained and probed aside, first.
        shortage: Why too little is heard to judge by; empty where it is enough.
    """

    start: int
    stop: int
    every: int
    held_out: bool
    aside: bool = False
    shortage: str = ""

    def hears(self, step: int) -> bool:
        """Whether a step is listened to."""
        return self.start <= step < self.stop and (step - self.start) % self.every == 0


def window_of(config: RunConfig, timeline: StageTimeline, steps_per_epoch: int) -> Window:
    """Say to which steps of a run its probe listens.

    Rows judge only if nothing was trained on them: in the first epoch of a run that begins
    afresh. Otherwise rows of the validation split do, each other and what was heard.

    Raises:
        ValueError: If the schedule leaves no step without experts, or none with them, if nobody
            knows when they begin, or more steps are to be listened to than there are.
    """
    experts, where = config.model.hilomoe, "model.hilomoe.route_by is auto"
    stages = timeline.schedule.stages
    plain = tuple(takewhile(lambda stage: stage.active_layers == 0, stages))
    if len(plain) == len(stages):
        raise ValueError(f"{where}, but experts compute in no stage. Add one, or set hilomoe null.")
    if _probes_first(config, timeline, plain):
        return Window(start=0, stop=0, every=1, held_out=False, aside=True)
    if not plain:
        raise ValueError(
            f"{where}, which needs steps without experts, but the run begins with stage "
            f"{stages[0].name!r}: train.backbone_share is {config.train.backbone_share} and "
            f"init_from is {config.init_from}. Raise train.backbone_share, give the checkpoint of "
            "a plain model as init_from, set model.hilomoe.probe_first, or name the features."
        )
    for stage in plain:
        if stage.plateau is not None:
            raise ValueError(
                f"{where}, which listens to the last steps before experts begin, but stage "
                f"{stage.name!r} ends with a plateau of {stage.plateau.metric}, nobody "
                "knows when. Give that stage a length, set model.hilomoe.probe_first, or name the "
                "features."
            )
    stop = _steps_of(plain, timeline)
    fresh, asked = config.init_from is None, experts.probe_steps
    if asked is not None and asked > stop:
        raise ValueError(
            f"model.hilomoe.probe_steps is {asked}, but experts begin after {stop} steps. Lower "
            "it, or raise train.backbone_share."
        )
    steps = asked or (_listened(stop) if fresh else min(MOST_STEPS, stop))
    every = max(1, steps * config.train.batch_size // WANTED_ROWS)
    heard = range(stop - steps, stop, every)
    return Window(
        start=heard.start,
        stop=stop,
        every=every,
        held_out=fresh and stop <= steps_per_epoch,
        shortage=_shortage(config, config.train.batch_size * len(heard), timeline, stop)
        or _doubt(config, config.train.batch_size * len(heard)),
    )


def _probes_first(config: RunConfig, timeline: StageTimeline, plain: Sequence[Stage]) -> bool:
    """Whether a plain model is probed aside: as asked, or where only that has rows to tell from."""
    experts, batch = config.model.hilomoe, config.train.batch_size
    if experts.probe_first is not None:
        return experts.probe_first
    if experts.probe_steps is not None or config.init_from is not None:
        return False
    ends = all(stage.plateau is None for stage in plain)
    heard = _listened(_steps_of(plain, timeline)) if ends else 0
    return heard * batch < WANTED_ROWS <= timeline.total_steps * batch


def _steps_of(plain: Sequence[Stage], timeline: StageTimeline) -> int:
    return max((span.stop for span in timeline.spans if span.stage in plain), default=0)


def _listened(plain_steps: int) -> int:
    """To how many of the steps without experts a run listens, if nothing else is asked for."""
    return min(MOST_STEPS, math.ceil(plain_steps * 2 / 3))


def _shortage(config: RunConfig, rows: int, timeline: StageTimeline, stop: int) -> str:
    """Say why a run that hears so many rows cannot judge; empty if it can."""
    least = ROWS_OF_A_BUCKET * config.model.hilomoe.num_experts
    if rows < least:
        return (
            f"cannot judge: {rows:,} rows of the {least:,} that "
            f"{config.model.hilomoe.num_experts} experts need are heard before experts would "
            "begin. Train for more steps, or raise train.backbone_share or probe_steps."
        )
    if stop >= timeline.total_steps:
        return (
            f"cannot judge: the run ends after {timeline.total_steps} steps, before experts would "
            "begin. Train for more steps."
        )
    return ""


def _doubt(config: RunConfig, rows: int) -> str:
    """Say why nothing is believed of so few rows, in a run that nobody asked to listen to them.

    Its model is young then, too, and promises what it will soon learn by itself.
    """
    experts = config.model.hilomoe
    asked = experts.probe_steps is not None or experts.probe_first is not None
    if asked or config.init_from is not None or rows >= WANTED_ROWS:
        return ""
    return (
        f"cannot judge: {rows:,} rows would be heard before experts begin, and the whole run has "
        f"fewer than the {WANTED_ROWS:,} that tell what decides from chance. Train for more steps, "
        "listen to fewer with probe_steps, or name the features."
    )


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
        if decision is None and not window.shortage:
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
    def absent_layers(self) -> int:
        """Expert layers that the model may get, or has had."""
        there = self.decision is not None and self.decision.route_by is not None
        return 0 if there else self._experts.num_layers

    @property
    def may_confirm(self) -> bool:
        """Whether experts are there of which it is not known what they bring."""
        decision = self.decision
        if decision is None or decision.route_by is None or not self._experts.confirm:
            return False
        return decision.brought is None

    def is_due(self, step: int) -> bool:
        """Whether it is to be decided before ``step``; at once, where nothing can be judged."""
        late = step >= self._window.stop
        return self.decision is None and (late or bool(self._window.shortage))

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
            ValueError: If no feature varies.
        """
        if self._window.shortage:
            report = _no_report(self._window.shortage)
        else:
            assert self._probe is not None
            if not self._window.held_out:
                self._judge_by(model, validation)
            report = self._probe.report()
        self.decision = decision_of(report, step)
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

    def confirm(
        self, model: DistributedModelParallel, step: int, validation: Iterable[CTRBatch]
    ) -> RoutingDecision:
        """Ask what experts have brought, and take them out if it is a loss; a collective call.

        Args:
            model: The sharded model, in no pipeline, its experts warmed up and nothing else
                trained meanwhile; to be wrapped anew afterwards if it lost them.
            step: Steps done.
            validation: Rows that judge.
        """
        assert self.decision is not None
        world = torch.distributed.get_world_size()
        passes = math.ceil(WANTED_ROWS / (self._config.train.batch_size * world))
        brought = brought_by_experts(model, islice(validation, passes), step=step)
        self.decision = confirmed(self.decision, brought)
        if self.decision.route_by is None:
            for site in sites_of(self._task).values():
                site.active_layers = 0
            remove_hilomoe(self._task.model.backbone)
            self._task.model.backbone.include_history_mean = False
        return self.decision

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


def _no_report(verdict: str) -> ProbeReport:
    """The report of a probe that has heard nothing."""
    return ProbeReport(
        features=(),
        controls={},
        layers=(),
        route_by=(),
        pays=False,
        verdict=verdict,
        costs=(),
        not_judged={},
        fit_rows=0,
        held_out_rows=0,
    )


def _gpus(model: DistributedModelParallel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
