"""From sums to a report: gains with intervals, views layer by layer, whether they pay.

Shape legend:
    K  units     F  names     D  draws     S  blocks     B  resamples
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.execution import gathering_pays
from torchrec_hilomoe.hilomoe.probe.advice import (
    advise,
    Findings,
    LASTING_GAIN,
    PAIRED_GAIN,
    PAYING_GAIN,
    PlainModel,
)
from torchrec_hilomoe.hilomoe.probe.buckets import ALL, RANDOM, WIDER
from torchrec_hilomoe.hilomoe.probe.checks import CannotJudgeError
from torchrec_hilomoe.hilomoe.probe.interactions import HeldOutSums, signed_gain, Statistics
from torchrec_hilomoe.hilomoe.probe.pairs import PairSums
from torchrec_hilomoe.hilomoe.probe.report import (
    Gain,
    LaterLook,
    LayerChoice,
    ProbeReport,
    SiteCost,
)
from torchrec_hilomoe.hilomoe.probe.wider import Wider

__all__ = ["Evidence", "conclude", "look_again"]

RESAMPLES = 200
TAIL = 0.025  # of the resamples below, and above, an interval
# Of what another draw of keys for the same feature adds: keys that learn part its values anyway.
REPEATED = 1 / 6


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was gathered at a site, over all ranks."""

    site: str
    in_features: int
    out_features: int
    rows_per_sample: float
    independent_rows: float  # of a sample: as many say something of their own
    held_out: HeldOutSums | PairSums
    wider: Wider | None
    fit_rows: int
    units_of: Mapping[str, Sequence[int]]  # of a name, one for each draw, or one for all
    buckets_in_use: Mapping[str, int]

    def unit(self, name: str, draw: int) -> int:
        """Which unit a draw of a name is."""
        own = self.units_of[name]
        return own[draw % len(own)]


def conclude(
    evidence: Sequence[Evidence],
    names: Sequence[str],
    config: HiLoMoEConfig,
    draws: int,
    seed: int,
    plain: PlainModel,
) -> ProbeReport:
    """Rank the features, choose the layers' views, and judge whether they pay.

    Raises:
        CannotJudgeError: If nothing can be said of any feature.
    """
    not_judged = {
        name: "all rows are in one bucket: it has one value, or its values are so alike that keys "
        "which have not learned do not part them"
        for name in names
        if name not in (ALL, RANDOM) and all(site.buckets_in_use[name] <= 1 for site in evidence)
    }
    judged = [name for name in names if name not in (ALL, RANDOM, *not_judged)]
    if not judged:
        raise CannotJudgeError(
            "InteractionProbe.features",
            f"none of {list(not_judged)} can be judged, because each has 1 value in all rows that "
            "were heard, and 2 are the least",
            "Name features that vary.",
        )
    known = (*names, WIDER) if all(site.wider for site in evidence) else names
    gains: dict[str, list[Gain]] = {name: [] for name in known}
    for site in evidence:
        intervals = _gains(site, names, draws, seed)
        for name, (gain, low, high) in zip(known, intervals, strict=True):
            gains[name].append(Gain(name=name, site=site.site, gain=gain, low=low, high=high))
    standing = [
        name
        for name in judged
        if any(_stands_out(*found) for found in zip(gains[name], gains[RANDOM], strict=True))
    ]
    layers = _choose(evidence, standing, draws, config.num_layers)
    ranked = sorted((g for name in judged for g in gains[name]), key=lambda g: -g.gain)
    by_sample = {
        name: [
            _times(gain, site.independent_rows) for gain, site in zip(found, evidence, strict=True)
        ]
        for name, found in gains.items()
    }
    weight_S = evidence[0].held_out.weight_S
    advice = advise(
        Findings(
            layers=layers,
            best=max((g for name in judged for g in by_sample[name]), key=lambda g: g.gain),
            wider=max(by_sample.get(WIDER, ()), key=lambda gain: gain.gain, default=None),
            random=max(by_sample[RANDOM], key=lambda gain: gain.high - gain.low),
            filled=int((weight_S > 0).sum()),
            blocks=len(weight_S),
            rows=int(evidence[0].held_out.rows),
            plain=plain,
            least=PAYING_GAIN if all(site.wider for site in evidence) else PAIRED_GAIN,
        )
    )
    return ProbeReport(
        features=tuple(ranked),
        controls={name: tuple(gains[name]) for name in (RANDOM, ALL, WIDER) if name in gains},
        layers=layers,
        route_by=tuple((layer.feature,) for layer in layers),
        pays=advice.pays,
        verdict=advice.verdict,
        costs=tuple(_cost(site, config) for site in evidence),
        not_judged=not_judged,
        fit_rows=evidence[0].fit_rows,
        held_out_rows=int(evidence[0].held_out.rows),
    )


def look_again(report: ProbeReport, later: ProbeReport, steps: int) -> ProbeReport:
    """Hold what a probe has advised to another one, of the same model when it has learned more.

    Features rank best early, when much is left to gain; but an early gain may be one that a plain
    model soon learns by itself. So the views are the first report's, and they pay if enough is
    left to gain by whatever the later one finds.

    Args:
        report: Of the young model.
        later: Of the older one.
        steps: Optimizer steps that the older one was trained for.
    """
    total = later.layers[-1].total if later.layers else 0.0
    pays = report.pays and later.pays and total >= LASTING_GAIN
    said, names = report.verdict, _named(report)
    by = f" by {_named(later)}" if later.layers and _named(later) != names else ""
    if pays:
        first = report.layers[-1].total
        said += (
            f" It lasts: probed again after {steps} steps, all layers together promise "
            f"{total:.4f} nats{by}, and {first:.4f} at first."
        )
    elif report.pays:
        said = (
            f"nothing decides for long: {names} promise {report.layers[-1].total:.4f} nats at "
            f"first, and after {steps} steps {total:.4f} are left{by}, of which {LASTING_GAIN:g} "
            "are the least that pays: a plain model learns the rest by itself."
        )
        if not later.pays and not later.verdict.startswith("nothing"):
            said += f" After {steps} steps: {later.verdict}"
    return replace(
        report,
        pays=pays,
        verdict=said,
        later=LaterLook(steps=steps, total=total),
    )


def _named(report: ProbeReport) -> str:
    return ", ".join(dict.fromkeys(layer.feature for layer in report.layers))


def _times(gain: Gain, factor: float) -> Gain:
    return replace(gain, gain=factor * gain.gain, low=factor * gain.low, high=factor * gain.high)


def _stands_out(gain: Gain, random: Gain) -> bool:
    """Whether a gain is above 0, and above the one of random buckets, for all that is known.

    The interval of a difference is as wide as both together, as the sides of a right angle are.
    """
    unsure = math.hypot(gain.gain - gain.low, random.high - random.gain)
    return gain.low > 0 and gain.gain - random.gain > unsure


def _gains(
    site: Evidence, names: Sequence[str], draws: int, seed: int
) -> list[tuple[float, float, float]]:
    """Gain, low and high of each name, then of the wider layer if that is known."""
    weight_S = site.held_out.weight_S
    filled_C = (weight_S > 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    picked_BC = torch.randint(len(filled_C), (RESAMPLES, len(filled_C)), generator=generator)
    times_BS = torch.zeros(RESAMPLES + 1, len(weight_S), dtype=torch.float64)
    times_BS[0] = 1.0
    times_BS[1:].scatter_add_(
        1, filled_C.cpu()[picked_BC], torch.ones(picked_BC.shape, dtype=torch.float64)
    )
    times_BS = times_BS.to(weight_S.device)
    unit_FD = torch.tensor([[site.unit(name, draw) for draw in range(draws)] for name in names])
    gain_BFD = signed_gain(*site.held_out.slopes(times_BS)).cpu()[:, unit_FD]
    drawn_BFD = torch.randint(draws, (RESAMPLES, 1, draws), generator=generator)
    resampled_BF = gain_BFD[1:].gather(2, drawn_BFD.expand(-1, len(names), -1)).mean(dim=2)
    wider_B1 = gain_BFD.new_empty(RESAMPLES + 1, 0)
    if site.wider is not None:
        wider_B1 = signed_gain(*site.wider.slopes(times_BS)).cpu()
    all_F = torch.cat([gain_BFD[0].mean(dim=1), wider_B1[0]])
    spread_BF = torch.cat([resampled_BF, wider_B1[1:]], dim=1)
    low_F, high_F = spread_BF.quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64), dim=0)
    return list(zip(all_F.tolist(), low_F.tolist(), high_F.tolist(), strict=True))


def _choose(
    evidence: Sequence[Evidence],
    standing: Sequence[str],
    draws: int,
    num_layers: int,
) -> tuple[LayerChoice, ...]:
    """Take for each layer what adds most to the layers before it.

    A feature may come again, with other keys, where it is much stronger than the next one.
    Sites that follow each other would mend the same error, so they are not added up: the site that
    gains most counts.
    """
    statistics = [site.held_out.statistics() for site in evidence]

    def together(chosen: Sequence[str]) -> float:
        """The gain of views, averaged over draws; each layer has another draw of keys."""
        of_sites = []
        for site, found in zip(evidence, statistics, strict=True):
            units = [
                [site.unit(name, (draw + at) % draws) for at, name in enumerate(chosen)]
                for draw in range(draws)
            ]
            gains = [_joint(found, of_draw) for of_draw in units]
            of_sites.append(site.independent_rows * sum(gains) / draws)
        return max(of_sites)

    layers: list[LayerChoice] = []
    for _ in range(num_layers if standing else 0):
        before = [layer.feature for layer in layers]
        total, together_before = layers[-1].total if layers else 0.0, together(before)
        adds = {
            name: (together([*before, name]) - together_before)
            * (REPEATED if name in before else 1.0)
            for name in standing
        }
        best = max(adds, key=lambda name: adds[name])
        layers.append(LayerChoice(feature=best, gain=adds[best], total=total + adds[best]))
    return tuple(layers)


def _joint(found: Statistics, units: Sequence[int]) -> float:
    """The most that steps of several units take off the loss together, none of them backwards."""
    left = [unit for unit in dict.fromkeys(units) if found.slope_K[unit] > 0]
    while left:
        slope_U, bend_UU = found.slope_K[left], found.overlap_KK[left][:, left]
        ridge = 1e-9 * bend_UU.diagonal().mean() * torch.eye(len(left)).to(bend_UU)
        step_U = torch.linalg.solve(bend_UU + ridge, slope_U)
        if bool((step_U >= 0).all()):
            return float(slope_U @ step_U) / 2
        left.pop(int(step_U.argmin()))
    return 0.0


def _cost(site: Evidence, config: HiLoMoEConfig) -> SiteCost:
    few = gathering_pays(config.num_experts, config.top_k, site.in_features)
    experts = config.top_k if few else config.num_experts
    vectors = config.num_layers * experts * config.rank
    return SiteCost(
        site=site.site,
        base=2 * site.in_features * site.out_features,
        experts=2 * vectors * (site.in_features + site.out_features),
        rows_per_sample=site.rows_per_sample,
    )
