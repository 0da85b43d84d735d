"""What a probe advises, in words: experts, none, or that it cannot tell yet, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_hilomoe.hilomoe.probe.report import Gain, LayerChoice

__all__ = [
    "LASTING_GAIN",
    "PAIRED_GAIN",
    "PAYING_GAIN",
    "Advice",
    "Findings",
    "PlainModel",
    "advise",
]

# The least that views must promise, in nats a sample. Fixed on the generated worlds, DIN of head
# 64-32 after 300 steps, seeds 0, 1, 2: `benchmarks/LOG.md` has them beside what experts brought.
PAYING_GAIN = 2e-3
# The least that must be left of it after 600 steps. Fixed on seeds 0, 71, 72, DIN and BST of 64-32:
# between the most of `smooth`, where nothing decides, and the least of the other worlds.
LASTING_GAIN = 5e-3
# The same where blocks of rows are compared in pairs, on seeds 0, 71 and 72, DIN and BST of 128-64.
PAIRED_GAIN = 3.3e-3
FIXED_AT_STEPS = 300
LONGER = (
    "Probe one of more steps (apps/probe.py: --steps, and its run must have as many: "
    "train.epochs, train.max_steps; or --checkpoint of a longer run)."
)
MORE_ROWS = (
    "Judge by more rows (apps/probe.py: --judge_batches): prepare more for validation "
    "(--valid_percent), or generate more (data.eval_rows)."
)
LISTEN = "Listen to more rows (in a run: model.hilomoe.probe_steps, train.backbone_share)."
CONFIRM = (
    "Confirm it with a pair of runs that differ in the experts alone, of the same seed: compare "
    "their test AUC."
)


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """What is known of the model that is probed, each None where it is not.

    Attributes:
        loss: Mean loss of the rows that judged, in nats a sample.
        constant_loss: The same of a model that predicts their mean for all.
        steps: Optimizer steps that it was trained for.
    """

    loss: float | None = None
    constant_loss: float | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the advice rests on.

    Attributes:
        layers: What each expert layer should be routed by; empty if nothing stands out.
        best: The largest gain of a feature, a sample, as the next two are.
        wider: The largest gain of hidden units for the FLOPs of the experts; None is not known.
        random: The widest interval of random buckets.
        filled: Blocks that have held-out rows.
        blocks: Blocks there are.
        rows: Held-out rows.
        plain: The model.
        least: What views must promise together to pay, in nats a sample.
    """

    layers: Sequence["LayerChoice"]
    best: "Gain"
    wider: "Gain | None"
    random: "Gain"
    filled: int
    blocks: int
    rows: int
    plain: PlainModel
    least: float

    @property
    def total(self) -> float:
        """What all layers promise together, in nats a sample."""
        return self.layers[-1].total if self.layers else 0.0


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether experts are worth it, and the same in words."""

    pays: bool
    verdict: str


def advise(found: Findings) -> Advice:
    """Weigh what was found; what is too uncertain is neither a yes nor a no."""
    pays = found.total >= found.least
    doubts = _doubts(found, pays)
    if doubts:
        text = " ".join(["cannot tell yet:", " And ".join(doubts)])
        return Advice(pays=False, verdict=text)
    said = [_promise(found) if pays else _no_promise(found), _of_width(found, pays)]
    steps = found.plain.steps
    if steps is not None and steps < FIXED_AT_STEPS:
        said.append(
            f"The plain model was trained for {steps} steps only, and gains shrink as a model "
            f"learns: believe it after {FIXED_AT_STEPS} or more steps (apps/probe.py: --steps; "
            "its run must have as many: train.epochs, train.max_steps)."
        )
    said.append(CONFIRM if pays else "")
    return Advice(pays=pays, verdict=" ".join(filter(None, said)))


def _doubts(found: Findings, pays: bool) -> list[str]:
    """Why nothing can be said yet, each with what to do."""
    doubts, loss, constant = [], found.plain.loss, found.plain.constant_loss
    more = MORE_ROWS if found.wider else LISTEN
    if loss is not None and found.total >= loss:
        doubts.append(
            f"all layers together promise {found.total:.3f} nats, and the whole loss of the plain "
            f"model is {loss:.3f}, so it has not learned what it can by itself. {LONGER}"
        )
    elif loss is not None and constant is not None and loss >= constant:
        doubts.append(
            f"the plain model's loss is {loss:.3f}, and that of the click rate alone "
            f"{constant:.3f}, so it has not learned what it can by itself. {LONGER}"
        )
    if found.filled < max(2, found.blocks / 2):
        doubts.append(
            f"the {found.rows:,} held-out rows are too few: they fill {found.filled} of "
            f"{found.blocks} blocks, and no interval can be trusted. {more}"
        )
    elif not pays and found.random.high - found.random.low > found.least:
        doubts.append(
            f"the {found.rows:,} held-out rows are too few: random buckets are between "
            f"{found.random.low:.4f} and {found.random.high:.4f} nats, which is wider than the "
            f"{found.least:g} that pay. {more}"
        )
    return doubts


def _promise(found: Findings) -> str:
    features = list(dict.fromkeys(layer.feature for layer in found.layers))
    adds = {it: sum(at.gain for at in found.layers if at.feature == it) for it in features}
    shown = ", ".join(f"{gain:.3f}" for gain in adds.values())
    return f"experts should pay: route by {', '.join(features)} (predicted {shown} nats)."


def _no_promise(found: Findings) -> str:
    if not found.layers:
        return (
            "nothing decides: no feature stands out against random buckets (the best is "
            f"{found.best.name}, {found.best.gain:.4f} nats)."
        )
    return (
        f"nothing decides: {found.layers[0].feature} stands out, but all layers together promise "
        f"{found.total:.4f} nats, and {found.least:g} are the least that pays."
    )


def _of_width(found: Findings, pays: bool) -> str:
    """What hidden units for the same FLOPs promise, where that is something, and more."""
    wider = found.wider
    if wider is None:
        return ""
    if wider.low <= 0 or wider.gain <= found.best.gain:
        return "" if pays or wider.gain > 0 else "A wider head promises nothing either."
    than = f"{found.best.name} {found.best.gain:.4f}"
    return (
        f"A wider head promises more: hidden units for the same FLOPs {wider.gain:.4f} nats, "
        f"{than}."
    )
