"""What the routers of a model do: recorded during a pass, reported over all ranks.

Nothing is computed in a model that is not being recorded::

    with record_routing(model):
        evaluate(model)
    report = routing_report(model)

Shape legend:
    N  rows     L  active expert layers     E  experts     P  distinct paths
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.losses import choice_counts
from torchrec_hilomoe.hilomoe.sites import sites_of

__all__ = ["LayerReport", "RoutingReport", "SiteReport", "record_routing", "routing_report"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One expert layer of a site.

    Attributes:
        load: Share of the rows' choices that went to each expert; sums to 1.
        dead_experts: Experts that no row chose.
        entropy: Of the load, as a share of its largest value: 1 when balanced, 0 when collapsed.
        score_entropy: Mean entropy of a row's scores, in the same unit: 1 when undecided.
        balance_loss: Unweighted; 1 when balanced.
        z_loss: Unweighted.
    """

    load: tuple[float, ...]
    dead_experts: tuple[int, ...]
    entropy: float
    score_entropy: float
    balance_loss: float
    z_loss: float


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One site.

    Attributes:
        name: Its qualified name.
        rows: Rows that were routed, over all ranks: samples, where sites share a router.
        layers: Its active layers, in order.
        paths_in_use: Distinct sequences of best experts, one a layer, among the rows.
        paths_possible: ``E ** L``.
        transitions: For each pair of neighbouring layers, the share of rows that went from each
            expert (row) to each (column); best experts only.
        output_ratio: Norm of what the experts add, over the norm of the base map's output.
    """

    name: str
    rows: int
    layers: tuple[LayerReport, ...]
    paths_in_use: int
    paths_possible: int
    transitions: tuple[tuple[tuple[float, ...], ...], ...]
    output_ratio: float


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """All sites that computed with experts, in the model's order."""

    sites: tuple[SiteReport, ...]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Record the routing of every forward pass inside, starting from nothing.

    Recording repeats the routing of each pass. A compiled model runs eagerly meanwhile.
    """
    sites = sites_of(model).values()
    for site in sites:
        _recorded[site] = _Totals()
    handles = [site.register_forward_hook(_record) for site in sites]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def routing_report(model: nn.Module) -> RoutingReport:
    """Report what `record_routing` recorded; with more than one rank, all must call it.

    Raises:
        ValueError: If nothing was recorded on any rank.
    """
    local = [
        _recorded[site].parts if site in _recorded else [] for site in sites_of(model).values()
    ]
    ranks = [local]
    if dist.is_available() and dist.is_initialized():
        ranks = [local] * dist.get_world_size()
        dist.all_gather_object(ranks, local)
    reports = []
    for index, (name, site) in enumerate(sites_of(model).items()):
        parts = [part for rank in ranks for part in rank[index]]
        if parts:
            reports.append(_site_report(name, site, _merge(parts)))
    if not reports:
        raise ValueError(
            f"routing_report: no rows were recorded at any of the model's {len(local)} sites. "
            "Run the model inside `with record_routing(model):`, with active_layers > 0."
        )
    return RoutingReport(sites=tuple(reports))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Sums over some rows, on the CPU."""

    rows: int
    counts_LE: Tensor
    scores_LE: Tensor
    entropy_L: Tensor
    z_L: Tensor
    base_square: float
    added_square: float
    paths_PL: Tensor
    path_rows_P: Tensor


class _Totals:
    """The parts recorded at one site, merged as they come."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def add(self, part: _Part) -> None:
        same = [p for p in self.parts if p.counts_LE.shape == part.counts_LE.shape]
        self.parts = [_merge([*same, part])]  # layers switched on since then: start anew


_recorded: WeakKeyDictionary[HiLoMoELinear, _Totals] = WeakKeyDictionary()


@torch.no_grad()
def _record(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook: add this pass to the site's totals."""
    site = module
    assert isinstance(site, HiLoMoELinear)
    x_ND, router = args[0].reshape(-1, site.in_features), site.shared_router
    if site.active_layers == 0 or len(x_ND) == 0:
        return
    routing = site.compute(x_ND).routing if router is None else router.routing
    scores_LEN = routing.scores_LEN.double()
    base_NO = F.linear(x_ND, site.weight, site.bias)
    # The best experts; of equal scores, the one that was chosen.
    paths_PL, path_rows_P = routing.chosen_LkN[:, 0].t().unique(dim=0, return_counts=True)
    _recorded[site].add(
        _Part(
            rows=scores_LEN.shape[2],
            counts_LE=choice_counts(routing.chosen_LkN, site.config.num_experts).cpu(),
            scores_LE=scores_LEN.sum(dim=2).cpu(),
            entropy_L=torch.special.entr(scores_LEN).sum(dim=(1, 2)).cpu(),
            z_L=routing.logsumexp_LN.double().square().sum(dim=1).cpu(),
            base_square=base_NO.double().square().sum().item(),
            added_square=(output.view_as(base_NO) - base_NO).double().square().sum().item(),
            paths_PL=paths_PL.cpu(),
            path_rows_P=path_rows_P.cpu(),
        )
    )


def _merge(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    paths_PL, where_P = torch.cat([p.paths_PL for p in parts]).unique(dim=0, return_inverse=True)
    path_rows_P = torch.zeros(len(paths_PL), dtype=torch.int64)
    path_rows_P.index_add_(0, where_P, torch.cat([p.path_rows_P for p in parts]))
    return _Part(
        rows=sum(p.rows for p in parts),
        counts_LE=torch.stack([p.counts_LE for p in parts]).sum(dim=0),
        scores_LE=torch.stack([p.scores_LE for p in parts]).sum(dim=0),
        entropy_L=torch.stack([p.entropy_L for p in parts]).sum(dim=0),
        z_L=torch.stack([p.z_L for p in parts]).sum(dim=0),
        base_square=sum(p.base_square for p in parts),
        added_square=sum(p.added_square for p in parts),
        paths_PL=paths_PL,
        path_rows_P=path_rows_P,
    )


def _site_report(name: str, site: HiLoMoELinear, part: _Part) -> SiteReport:
    L, E = part.counts_LE.shape
    load_LE = part.counts_LE.double() / (part.rows * site.config.top_k)
    largest = torch.tensor(float(E)).double().log()

    def share(entropy: Tensor) -> float:
        return (entropy / largest).item() if E > 1 else 1.0  # one expert is always balanced

    layers = tuple(
        LayerReport(
            load=tuple(load_LE[layer].tolist()),
            dead_experts=tuple((part.counts_LE[layer] == 0).nonzero().flatten().tolist()),
            entropy=share(torch.special.entr(load_LE[layer]).sum()),
            score_entropy=share(part.entropy_L[layer] / part.rows),
            balance_loss=(load_LE[layer] @ part.scores_LE[layer]).item() * E / part.rows,
            z_loss=part.z_L[layer].item() / part.rows,
        )
        for layer in range(L)
    )
    transitions = []
    for layer in range(L - 1):
        flow_S = torch.zeros(E * E, dtype=torch.int64)
        step_P = part.paths_PL[:, layer] * E + part.paths_PL[:, layer + 1]
        flow_S.index_add_(0, step_P, part.path_rows_P)
        flow_EE = (flow_S.double() / part.rows).view(E, E)
        transitions.append(tuple(tuple(row) for row in flow_EE.tolist()))
    return SiteReport(
        name=name,
        rows=part.rows,
        layers=layers,
        paths_in_use=len(part.paths_PL),
        paths_possible=E**L,
        transitions=tuple(transitions),
        output_ratio=(part.added_square / part.base_square) ** 0.5 if part.base_square else 0.0,
    )
