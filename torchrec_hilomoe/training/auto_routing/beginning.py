"""What routes experts, as far as it is known when a run begins or goes on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_hilomoe.command_line import parse_saved
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.hilomoe import ProbeReport
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.auto_routing.decision import decided_model, decision_of, was_judged
from torchrec_hilomoe.training.auto_routing.probing import probe_aside
from torchrec_hilomoe.training.auto_routing.window import Window
from torchrec_hilomoe.training.checkpoint import Checkpoint, Progress, RoutingDecision
from torchrec_hilomoe.training.inputs import schedule_of

__all__ = ["Found", "find_before", "refuse_other_views"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known.

    Attributes:
        decision: What was decided; None before.
        report: What it was decided by, where that was now.
        stopped: Whether a signal came before anything was found.
    """

    decision: RoutingDecision | None = None
    report: ProbeReport | None = None
    stopped: bool = False


def find_before(
    config: RunConfig, window: Window, progress: Progress | None, context: DistributedContext
) -> Found:
    """Find what routes experts, if that is to be known before the next step; a collective call.

    Args:
        config: The run, which is to find it by itself.
        window: To which steps it listens.
        progress: Where it goes on; None if it begins.
        context: This process among the ranks.

    Raises:
        ValueError: If the run has gone beyond the step at which it should have been found, or was
            found for another number of layers.
    """
    decision = None
    if progress is not None:
        decision = _still_stands(progress, window)
        if decision is None:
            _refuse_undecided(progress, window)
        else:
            _refuse_other_layers(decision, config.model.hilomoe.num_layers)
    if decision is not None or not window.aside:
        return Found(decision=decision)
    aside = "trained aside" if config.init_from is None else f"taken from {config.init_from}"
    logger.info("route_by auto: a plain model is %s and probed first", aside)
    report = probe_aside(config, context)
    if report is None:
        return Found(stopped=True)
    return Found(decision=decision_of(report, step=0), report=report)


def refuse_other_views(config: RunConfig, saved: Checkpoint) -> None:
    """Refuse to go on with experts whose keys have learned to be routed by other features.

    Raises:
        ValueError: If the run names features, and experts that have begun read others.
    """
    now = config.model.hilomoe
    if now.route_by == "auto" or not now.enabled or not saved.has("config.yaml"):
        return
    where = f"{saved.path}/config.yaml"
    own = parse_saved(saved.document("config.yaml"), [], where=where).config
    before = decided_model(own.model, saved.progress.decision).hilomoe
    begun = schedule_of(own).named(saved.progress.stage).active_layers != 0
    if before.enabled and begun and before.route_by != now.route_by:
        back = own.model.hilomoe.route_by
        raise ValueError(
            f"model.hilomoe.route_by is {_shown_views(now.route_by)}, but the experts of the "
            f"checkpoint of step {saved.progress.step} have learned to be routed by "
            f"{_shown_views(before.route_by)}. Set it back to "
            f"{back if back == 'auto' else 'these'}, or give another --out_dir."
        )


def _shown_views(views: Sequence[Sequence[str]] | str | None) -> str:
    """Views as an option has them."""
    if views is None or isinstance(views, str):
        return str(views or "null")
    return f"[{', '.join('[' + ', '.join(names) + ']' for names in views)}]"


def _still_stands(progress: Progress, window: Window) -> RoutingDecision | None:
    """What was decided, unless it was that the run is too short, and it no longer is."""
    decision = progress.decision
    if decision is None or was_judged(decision) or window.shortage:
        return decision
    if not window.aside and progress.step <= window.start:
        return None
    logger.warning(
        "route_by auto: the model stays plain, as was decided of the shorter run (%s) Give another "
        "--out_dir, and a run of this length finds what routes experts.",
        decision.verdict,
    )
    return decision


def _refuse_other_layers(decision: RoutingDecision, layers: int) -> None:
    """Refuse to go on with other expert layers than views were chosen for."""
    if decision.route_by is not None and len(decision.route_by) != layers:
        chosen = len(decision.route_by)
        raise ValueError(
            f"model.hilomoe.num_layers is {layers}, but the run has chosen the views of {chosen} "
            f"expert layers at step {decision.step}, by route_by auto. Set it back to {chosen}, or "
            "give another --out_dir."
        )


def _refuse_undecided(progress: Progress, window: Window) -> None:
    """Refuse to go on with a run in which experts were there before anything was found."""
    if window.aside and progress.step > 0:
        raise ValueError(
            f"model.hilomoe.route_by is auto, but the checkpoint of step {progress.step} is of a "
            "run that has not found its features before its first step, as this one would. Go on "
            "with --model.hilomoe.probe_first false, as it began, or give another --out_dir."
        )
    if progress.step > window.stop:
        raise ValueError(
            f"model.hilomoe.route_by is auto, but the checkpoint is of step {progress.step}, after "
            f"experts began at step {window.stop}, and says of no features that were found. Give "
            "the route_by that it was trained with, or another --out_dir."
        )
