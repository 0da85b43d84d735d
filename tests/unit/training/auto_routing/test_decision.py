"""What a run that routes by itself has decided, and says of it."""

import re

from torchrec_hilomoe.command_line import Recorded
from torchrec_hilomoe.training.auto_routing import confirmed, found_and_brought
from torchrec_hilomoe.training.checkpoint import Brought, RoutingDecision

FOUND = RoutingDecision(
    step=300,
    route_by=(("hour",), ("category",), ("hour",)),
    gains=(0.002, 0.001, 0.0005),
    verdict="experts should pay",
)


def test_the_end_says_what_was_found_and_what_it_brought():
    recorded = Recorded(command="python apps/train.py --seed 1", test_auc=0.8756)
    found, brought = found_and_brought(FOUND, 0.8806, recorded, tested=FOUND)
    assert re.search(r"hour, category, .* 0\.0035 nats$", found)
    assert re.search(r"\+0\.0050 .* 0\.8756 on another.*: python apps/train\.py --seed 1$", brought)
    _, brought = found_and_brought(FOUND, 0.8806, None, tested=FOUND)
    assert brought.endswith("--model.hilomoe null")
    _, brought = found_and_brought(FOUND, 0.8806, recorded, tested=None)
    assert brought.endswith("the best validation was before experts began")


def test_it_says_so_where_the_model_stayed_plain():
    nothing = RoutingDecision(step=3, route_by=None, gains=(), verdict="nothing decides.")
    assert list(found_and_brought(nothing, 0.8, None, tested=nothing)) == [
        "found: nothing decides. The model stayed plain."
    ]


def test_experts_that_brought_nothing_are_taken_out():
    def after(low: float, high: float) -> RoutingDecision:
        brought = Brought(step=360, gain=(low + high) / 2, low=low, high=high, rows=5000)
        decided = confirmed(FOUND, brought)
        assert decided.brought == brought
        return decided

    assert after(0.001, 0.002).route_by == after(-0.001, 0.002).route_by == FOUND.route_by
    assert after(0.0, 0.0).route_by is after(-0.002, -0.001).route_by is None
    assert after(0.001, 0.002).verdict.endswith(
        "Experts brought 0.0015 nats a row by the end of their warm-up (0.001 to 0.002, "
        "5,000 rows of the validation split)."
    )
    # Seven frozen steps on trivago told as little, and the experts then gained .0137 of AUC.
    unsure = after(-0.00036, 0.00035)
    assert unsure.route_by == FOUND.route_by
    assert unsure.verdict.endswith("validation split), which tells neither a gain nor a loss.")
    lost = after(-0.002, -0.001)
    assert (lost.route_by, lost.gains) == (None, FOUND.gains)
    assert lost.verdict == (
        "experts were taken out again: routed by hour, category, they brought -0.0015 nats a row "
        "by the end of their warm-up (-0.002 to -0.001, 5,000 rows of the validation split). They "
        "were predicted to gain 0.0035."
    )
    assert list(found_and_brought(lost, 0.8, None, tested=lost)) == [
        f"found: {lost.verdict} The model is plain again."
    ]
    assert confirmed(FOUND, None) == FOUND
