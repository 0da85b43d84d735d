"""A run that finds its features: it listens, decides at the boundary, and confirms."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.command_line import parse_saved
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe import CannotJudgeError, ProbeReport, remove_hilomoe, sites_of
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.hilomoe.probe.gathered import ROWS_OF_A_BUCKET
from torchrec_hilomoe.models.build import inject_experts
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.auto_routing.confirming import brought_by_experts
from torchrec_hilomoe.training.auto_routing.decision import (
    confirmed,
    decided_experts,
    decision_of,
    nothing_judged,
)
from torchrec_hilomoe.training.auto_routing.listening import probe_of, run_unchanged
from torchrec_hilomoe.training.auto_routing.window import WANTED_ROWS, Window
from torchrec_hilomoe.training.checkpoint import Checkpoint, RoutingDecision

__all__ = ["AutoRouting"]

# Costs of a step that is heard, against what it says: benchmarks/LOG.md has them.
DRAWS, SKETCH, BLOCKS = 2, 16, 10


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
        """
        shortage = self._window.shortage
        if not shortage and not self._window.held_out:
            shortage = self._judge_by(model, validation)
        report = nothing_judged(shortage) if shortage else self._report()
        self.decision = decision_of(report, step)
        self._probe = None
        if report.pays:
            with torch.random.fork_rng(devices=_gpus(model)):
                torch.manual_seed(self._config.seed)  # the same experts on every rank
                inject_experts(self._task, decided_experts(self._experts, self.decision))
            accumulated = self._config.train.gradient_accumulation_steps
            set_auxiliary_loss_scale(self._task, self._task.loss_scale / accumulated)
        if self._config.train.compile:
            self._task.model.backbone.compile()
        return report

    def confirm(
        self, model: DistributedModelParallel, step: int, validation: Iterable[CTRBatch]
    ) -> RoutingDecision:
        """Ask what experts have brought, and take them out if it is nothing; a collective call.

        Args:
            model: The sharded model, in no pipeline, its experts warmed up and nothing else
                trained meanwhile; to be wrapped anew afterwards if it lost them.
            step: Steps done.
            validation: Rows that judge.
        """
        assert self.decision is not None
        passes = math.ceil(WANTED_ROWS / self._config.train.batch_size)
        brought = brought_by_experts(model, islice(validation, passes), step=step)
        self.decision = confirmed(self.decision, brought)
        if self.decision.route_by is None:
            for site in sites_of(self._task).values():
                site.active_layers = 0
            remove_hilomoe(self._task.model.backbone)
            self._task.model.backbone.include_history_mean = False
        return self.decision

    def _report(self) -> ProbeReport:
        """What the rows that were heard say, if anything."""
        assert self._probe is not None
        try:
            return self._probe.report()
        except CannotJudgeError as error:  # on every rank; no reason to lose the steps before
            return nothing_judged(error)

    def _judge_by(self, model: DistributedModelParallel, rows: Iterable[CTRBatch]) -> str:
        """Let rows judge, and say why they are too few; empty if they are not."""
        assert self._probe is not None
        window, backbone = self._window, self._task.model.backbone
        passes = len(range(window.start, window.stop, window.every))
        backbone.include_history_mean = True
        seen = torch.zeros(1)
        with torch.random.fork_rng(devices=_gpus(model)), self._probe.judge():
            for output in run_unchanged(model, islice(rows, passes)):
                seen += (output.weights > 0).sum().cpu()
        backbone.include_history_mean = False
        torch.distributed.all_reduce(seen)
        experts = self._experts.num_experts
        least = ROWS_OF_A_BUCKET * experts
        if seen >= least:
            return ""
        return (
            f"cannot judge: the validation split has {int(seen):,} rows, and {experts} experts "
            f"need {least:,}. Give it more (data.eval_rows of generated clicks), or name the "
            "features."
        )

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

    def load_state_dict(self, state_dict: Mapping[str, Tensor], saved: Checkpoint) -> None:
        """Go on from what :meth:`state_dict` gave.

        Args:
            state_dict: What was heard.
            saved: The checkpoint that it is of.

        Raises:
            ValueError: If it was heard for other experts, or with another seed.
        """
        if self._probe is not None and state_dict:
            _refuse_changed(self._config, saved)
            self._probe.load_state_dict(state_dict)


def _refuse_changed(config: RunConfig, saved: Checkpoint) -> None:
    """Refuse options that what was heard depends on, if they are others now."""
    if not saved.has("config.yaml"):
        return
    text, where = saved.document("config.yaml"), f"{saved.path}/config.yaml"
    now, before = _heard_for(config), _heard_for(parse_saved(text, where=where).config)
    changed = [name for name, value in now.items() if value != before[name]]
    if changed:
        told = ", ".join(f"{name} is {now[name]} (was {before[name]})" for name in changed)
        raise ValueError(
            f"{told}, but what route_by auto has heard by step {saved.progress.step} is for what "
            "was, and it has not decided yet. Set it back, or give another --out_dir."
        )


def _heard_for(config: RunConfig) -> dict[str, str]:
    experts = config.model.hilomoe
    return {
        "seed": str(config.seed),
        "model.hilomoe.num_experts": str(experts.num_experts),
        "model.hilomoe.rank": str(experts.rank),
        "model.hilomoe.sites": f"[{', '.join(experts.sites)}]",
    }


def _gpus(model: DistributedModelParallel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
