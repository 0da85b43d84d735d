"""What a probe reports: gains with intervals, controls, views, costs; as JSON, as a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Gain", "LaterLook", "LayerChoice", "ProbeReport", "SiteCost"]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What experts of one layer would gain at a site, if this routed them.

    Attributes:
        name: A feature; or the control ``all`` (all features at once), ``random`` (nothing), or
            ``wider`` (hidden units for the FLOPs of the experts).
        site: Name of the site.
        gain: Nats a row, averaged over draws; negative if the step would do harm.
        low: Lower end of its interval over draws and blocks of rows.
        high: Upper end.

    Example:
        >>> Gain(name="hour", site="up", gain=0.005, low=0.004, high=0.006).gain
        0.005
    """

    name: str
    site: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What one expert layer should be routed by.

    Attributes:
        feature: Name of the feature.
        gain: What it adds to the layers before it at the site that gains most, in nats a sample.
        total: What the layers so far gain together.

    Example:
        >>> LayerChoice(feature="hour", gain=0.005, total=0.02).total
        0.02
    """

    feature: str
    gain: float
    total: float


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """What experts at a site would cost, forward, in FLOPs a row.

    Attributes:
        site: Name of the site.
        base: FLOPs of the map as it is.
        experts: FLOPs of its experts; routing, once a sample for all sites, is not among them.
        rows_per_sample: Mean number of rows of a sample, 1 where the site sees no events.

    Example:
        >>> SiteCost(site="up", base=1000, experts=96, rows_per_sample=1.0).experts
        96
    """

    site: str
    base: int
    experts: int
    rows_per_sample: float


@dataclass(frozen=True, kw_only=True)
class LaterLook:
    """What is left to gain when the plain model has learned for longer.

    Attributes:
        steps: Optimizer steps that it was trained for.
        total: What all layers promise together then, in nats a sample.

    Example:
        >>> LaterLook(steps=600, total=0.005).total
        0.005
    """

    steps: int
    total: float


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        features: Every feature at every site, best first.
        controls: The controls by name: ``random``, ``all`` and ``wider``, at every site.
        layers: What to route each expert layer by, whether it pays or not; empty if nothing stands
            out.
        route_by: The same as ``model.hilomoe.route_by`` wants it.
        pays: Whether experts are worth it.
        verdict: The same in words.
        costs: What experts would cost at each site.
        not_judged: Features of which nothing can be said, and why.
        fit_rows: Rows that fit, at the first site; of a paired probe, rows that were heard but are
            not held out.
        held_out_rows: Rows that judged.
        later: What is left later; None where nobody looked again.

    Example:
        >>> report = ProbeReport(
        ...     features=(Gain(name="hour", site="up", gain=0.005, low=0.004, high=0.006),),
        ...     controls={"random": (Gain(name="random", site="up", gain=0.0, low=0.0, high=0.0),)},
        ...     layers=(LayerChoice(feature="hour", gain=0.005, total=0.005),),
        ...     route_by=(("hour",),),
        ...     pays=True,
        ...     verdict="experts should pay",
        ...     costs=(SiteCost(site="up", base=1000, experts=96, rows_per_sample=1.0),),
        ...     not_judged={},
        ...     fit_rows=4096,
        ...     held_out_rows=4096,
        ... )
        >>> print(report.table())
        gain in nats a row    site          gain       low      high  layer
        hour                  up         0.00500   0.00400   0.00600  1
        (random)              up         0.00000   0.00000   0.00000
        experts on up: 96 FLOPs a row beside its own 1,000 (+9.6 %)
        experts should pay
        >>> report.to_json()["route_by"]
        [['hour']]
    """

    features: tuple[Gain, ...]
    controls: Mapping[str, tuple[Gain, ...]]
    layers: tuple[LayerChoice, ...]
    route_by: tuple[tuple[str, ...], ...]
    pays: bool
    verdict: str
    costs: tuple[SiteCost, ...]
    not_judged: Mapping[str, str]
    fit_rows: int
    held_out_rows: int
    later: LaterLook | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes."""
        return json.loads(json.dumps(asdict(self)))

    def table(self) -> str:
        """A line a feature and site, the controls, the costs, and the verdict."""
        gains = [*self.features, *(gain for found in self.controls.values() for gain in found)]
        names = [f"({gain.name})" if gain.name in self.controls else gain.name for gain in gains]
        wide, site = max(20, *map(len, names)), max(8, *(len(gain.site) for gain in gains))
        heads = "  ".join(f"{head:>8}" for head in ("gain", "low", "high"))
        lines = [f"{'gain in nats a row':<{wide}}  {'site':<{site}}  {heads}  layer"]
        for name, gain in zip(names, gains, strict=True):
            chosen = [str(at) for at, layer in enumerate(self.layers, 1) if layer.feature == name]
            values = "  ".join(f"{value:8.5f}" for value in (gain.gain, gain.low, gain.high))
            line = f"{name:<{wide}}  {gain.site:<{site}}  {values}  {', '.join(chosen)}"
            lines.append(line.rstrip())
        lines += [f"{name}: cannot judge: {reason}" for name, reason in self.not_judged.items()]
        lines += [
            f"experts on {cost.site}: {cost.experts:,} FLOPs a row beside its own {cost.base:,} "
            f"(+{cost.experts / cost.base:.1%})".replace("%", " %")
            for cost in self.costs
        ]
        return "\n".join([*lines, self.verdict])
