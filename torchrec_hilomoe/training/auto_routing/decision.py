"""What a run that finds its features has decided, what it makes of the model, and its words."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torchrec_hilomoe.command_line import Recorded
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig
from torchrec_hilomoe.hilomoe import CannotJudgeError, ProbeReport
from torchrec_hilomoe.training.checkpoint import Brought, RoutingDecision

__all__ = [
    "chooses_routing",
    "confirmed",
    "decided_experts",
    "decided_model",
    "decision_of",
    "found_and_brought",
    "nothing_judged",
    "was_judged",
]


CANNOT_JUDGE = "cannot judge"  # so begins what is said where rows tell too little


def chooses_routing(config: RunConfig) -> bool:
    """Whether a run is to find by itself what routes its experts."""
    return config.model.hilomoe.enabled and config.model.hilomoe.route_by == "auto"


def decided_model(config: ModelConfig, decision: RoutingDecision | None) -> ModelConfig:
    """The model as it is now: plain until it was decided, then with the views that were chosen."""
    experts = config.hilomoe
    if not experts.enabled or experts.route_by != "auto":
        return config
    return replace(config, hilomoe=decided_experts(experts, decision))


def decided_experts(experts: InjectionConfig, decision: RoutingDecision | None) -> InjectionConfig:
    """The experts as they are now: none until it was decided."""
    if decision is None or decision.route_by is None:
        return replace(experts, enabled=False)
    return replace(experts, route_by=decision.route_by)


def nothing_judged(why: str | CannotJudgeError) -> ProbeReport:
    """The report where rows tell too little: no feature, and ``why`` in words."""
    if isinstance(why, CannotJudgeError):
        why = f"{CANNOT_JUDGE}: {why.reason}. Choose other sites, or name the features."
    return ProbeReport(
        features=(),
        controls={},
        layers=(),
        route_by=(),
        pays=False,
        verdict=why,
        costs=(),
        not_judged={},
        fit_rows=0,
        held_out_rows=0,
    )


def was_judged(decision: RoutingDecision) -> bool:
    """Whether a decision was made by what rows tell, and not for want of rows."""
    return not decision.verdict.startswith(CANNOT_JUDGE)


def decision_of(report: ProbeReport, step: int) -> RoutingDecision:
    """What a report makes of a run that has done ``step`` steps."""
    return RoutingDecision(
        step=step,
        route_by=report.route_by if report.pays else None,
        gains=tuple(layer.gain for layer in report.layers) if report.pays else (),
        verdict=report.verdict,
    )


def confirmed(decision: RoutingDecision, brought: Brought | None) -> RoutingDecision:
    """A decision once it is known what experts brought: none stay that surely brought no gain.

    Where the interval holds a gain they stay: after few frozen steps its middle is chance, and
    experts have hardly begun to learn.
    """
    if brought is None:
        return decision
    assert decision.route_by is not None
    measured = (
        f"brought {brought.gain:.3g} nats a row by the end of their warm-up ({brought.low:.3g} to "
        f"{brought.high:.3g}, {brought.rows:,} rows of the validation split)"
    )
    if brought.high > 0:
        unsure = "" if brought.low > 0 else ", which tells neither a gain nor a loss"
        verdict = f"{decision.verdict} Experts {measured}{unsure}."
        return replace(decision, verdict=verdict, brought=brought)
    features = _named(decision.route_by)
    verdict = (
        f"experts were taken out again: routed by {features}, they {measured}. They were predicted "
        f"to gain {sum(decision.gains):.3g}."
    )
    return replace(decision, route_by=None, verdict=verdict, brought=brought)


def found_and_brought(
    decision: RoutingDecision,
    test_auc: float,
    plain: Recorded | None,
    *,
    tested: RoutingDecision | None,
) -> Iterator[str]:
    """Say at the end of a run what was found, and what experts brought.

    Args:
        decision: What was found.
        test_auc: Of the run.
        plain: What is known of the same run without experts.
        tested: What had been found when the model that was tested was saved.
    """
    if decision.route_by is None:
        yield f"found: {decision.verdict} The model {_stays_plain(decision)}."
        return
    features = _named(decision.route_by)
    yield f"found: experts routed by {features}, predicted to gain {sum(decision.gains):.4f} nats"
    if tested is None or tested.route_by is None:
        yield "brought: nothing to the test, since the best validation was before experts began"
    elif plain is None:
        yield "brought: train the same without experts, and compare: --model.hilomoe null"
    else:
        yield (
            f"brought: {test_auc - plain.test_auc:+.4f} test AUC; without experts it was "
            f"{plain.test_auc:.4f} on another processor; for this one's: {plain.command}"
        )


def _stays_plain(decision: RoutingDecision) -> str:
    """What has become of a model for which none was chosen."""
    return "stayed plain" if decision.brought is None else "is plain again"


def _named(route_by: Iterable[Iterable[str]]) -> str:
    """Every feature that routes a layer, once."""
    return ", ".join(dict.fromkeys(name for layer in route_by for name in layer))
