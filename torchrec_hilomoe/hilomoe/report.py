"""What the routers of a model do: recorded during a pass, reported over all ranks.

Nothing is computed in a model that is not being recorded::

    with record_routing(model):
        evaluate(model)
    report = routing_report(model)

``report_plots`` draws a report. What can be said while a model trains, without a second pass, is in
`monitor`.

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

from torchrec_hilomoe.hilomoe.inject import group_of, routers_of, sites_of
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.losses import choice_counts
from torchrec_hilomoe.hilomoe.monitor import share_of_largest
from torchrec_hilomoe.hilomoe.ranks import process_group_of, size_of
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.routing import Routing

__all__ = [
    "LayerReport",
    "RouterReport",
    "RoutingReport",
    "SiteReport",
    "record_routing",
    "routing_report",
]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One expert layer of a router.

    Attributes:
        load: Share of the rows' choices that went to each expert; sums to 1.
        dead_experts: Experts that no row chose.
        entropy: Entropy of the load, as a share of its largest value: 1 when balanced, 0 when
            collapsed.
        score_entropy: Mean entropy of a row's scores, in the same unit: 1 when undecided.
        balance_loss: Unweighted balance loss; 1 when balanced.
        z_loss: Unweighted z loss.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> layer = routing_report(model).routers[0].layers[0]
        >>> len(layer.load), round(sum(layer.load), 6)
        (4, 1.0)
    """

    load: tuple[float, ...]
    dead_experts: tuple[int, ...]
    entropy: float
    score_entropy: float
    balance_loss: float
    z_loss: float


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """One router: a site that routes its own rows, or what several sites share.

    Attributes:
        name: Qualified name of the site, or of the shared router.
        rows: Rows that were routed, over all ranks: samples, where sites share the router.
        layers: Active layers, in order.
        paths_in_use: Distinct sequences of best experts, one a layer, among the rows.
        paths_possible: ``E ** L``.
        transitions: For each pair of neighbouring layers, the share of rows that went from each
            expert (row) to each (column); best experts only.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> router = routing_report(model).routers[0]
        >>> len(router.layers), router.paths_in_use <= router.paths_possible
        (2, True)
    """

    name: str
    rows: int
    layers: tuple[LayerReport, ...]
    paths_in_use: int
    paths_possible: int
    transitions: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One site.

    Attributes:
        name: Qualified name.
        router: Name of the router among the report's routers; the site's own name unless it was
            given one.
        output_ratio: Norm of what the experts add, over the norm of the base map's output.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> routing_report(model).sites[0]
        SiteReport(name='0', router='0', output_ratio=0.0)
    """

    name: str
    router: str
    output_ratio: float


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """All routers and sites that computed with experts, in the model's order.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> report = routing_report(model)
        >>> len(report.routers), len(report.sites)
        (1, 1)
    """

    routers: tuple[RouterReport, ...]
    sites: tuple[SiteReport, ...]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Record the routing of every forward pass inside, starting from nothing.

    Recording repeats the routing of each pass. A compiled model runs eagerly meanwhile.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> routing_report(model).routers[0].rows
        64
    """
    sites, routers = sites_of(model).values(), routers_of(model).values()
    for module in (*sites, *routers):
        _recorded[module] = _Recorded()
    handles = [site.register_forward_hook(_record_site) for site in sites]
    handles += [
        router.register_forward_hook(_record)
        for router in routers
        if isinstance(router, SampleRouter)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def routing_report(model: nn.Module) -> RoutingReport:
    """Report what `record_routing` recorded; with more than one rank, all must call it.

    All are those of the model's process group, if it has one (``set_process_group``).

    Raises:
        ValueError: If nothing was recorded on any rank, or sites are of several process groups.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> with record_routing(model):
        ...     _ = model(torch.randn(64, 8))
        >>> report = routing_report(model)
        >>> [(router.name, router.paths_possible) for router in report.routers]
        [('0', 16)]
        >>> report.sites[0].output_ratio  # up-vectors start at zero
        0.0
    """
    sites, routers = sites_of(model), routers_of(model)
    names: dict[nn.Module | None, str] = {router: name for name, router in routers.items()}
    router_of = {name: names.get(site.router, name) for name, site in sites.items()}
    nothing = _Recorded()
    local = {name: _recorded.get(module, nothing) for name, module in {**sites, **routers}.items()}
    ranks, group = [local], group_of(model)
    if dist.is_available() and dist.is_initialized():
        ranks = [local] * size_of(group)
        dist.all_gather_object(ranks, local, group=process_group_of(group))
    parts = {name: [part for rank in ranks for part in rank[name].parts] for name in routers}
    squares = {name: torch.stack([rank[name].squares for rank in ranks]).sum(0) for name in sites}
    if not any(parts.values()):
        raise ValueError(
            f"routing_report: no rows were recorded at any of the model's {len(sites)} sites. "
            "Run the model inside `with record_routing(model):`, with active_layers > 0."
        )
    ratios = {name: (t[1] / t[0]).sqrt().item() for name, t in squares.items() if t[0]}
    return RoutingReport(
        routers=tuple(
            _router_report(name, router.config.top_k, _merge(parts[name]))
            for name, router in routers.items()
            if parts[name]
        ),
        sites=tuple(
            SiteReport(name=name, router=router, output_ratio=ratios.get(name, 0.0))
            for name, router in router_of.items()
            if parts[router]
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Sums over some rows that a router routed, on the CPU."""

    rows: int
    counts_LE: Tensor
    scores_LE: Tensor
    entropy_L: Tensor
    z_L: Tensor
    paths_PL: Tensor
    path_rows_P: Tensor


class _Recorded:
    """What was recorded at a site or router, merged as it comes.

    Attributes:
        parts: Sums over the rows that it routed.
        squares: Sums over the outputs of a site: of its base map, and of what experts add.
    """

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.squares = _ZEROS

    def add(self, part: _Part) -> None:
        same = [p for p in self.parts if p.counts_LE.shape == part.counts_LE.shape]
        self.parts = [_merge([*same, part])]  # layers switched on since then: start anew


_recorded: WeakKeyDictionary[nn.Module, _Recorded] = WeakKeyDictionary()
_ZEROS = torch.zeros(2, dtype=torch.float64)


@torch.no_grad()
def _record_site(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of a site: add what it adds to its base map, and the routing of its own rows."""
    assert isinstance(module, HiLoMoELinear)
    x_ND = args[0].reshape(-1, module.in_features)
    if module.active_layers == 0 or len(x_ND) == 0:
        return
    base_NO = F.linear(x_ND, module.weight, module.bias)
    squares = [t.double().square().sum() for t in (base_NO, output.view_as(base_NO) - base_NO)]
    _recorded[module].squares = _recorded[module].squares + torch.stack(squares).cpu()
    if module.router is None:
        _record(module, args, module.compute(x_ND).routing)


@torch.no_grad()
def _record(module: nn.Module, args: tuple, routing: Routing) -> None:
    """Forward hook of a shared router: add this pass to the totals."""
    assert isinstance(module, HiLoMoELinear | SampleRouter)
    scores_LEN = routing.scores_LEN.double()
    if scores_LEN.shape[2] == 0:
        return
    # The best experts; of equal scores, the one that was chosen.
    paths_PL, path_rows_P = routing.chosen_LkN[:, 0].t().unique(dim=0, return_counts=True)
    _recorded[module].add(
        _Part(
            rows=scores_LEN.shape[2],
            counts_LE=choice_counts(routing.chosen_LkN, module.config.num_experts).cpu(),
            scores_LE=scores_LEN.sum(dim=2).cpu(),
            entropy_L=torch.special.entr(scores_LEN).sum(dim=(1, 2)).cpu(),
            z_L=routing.logsumexp_LN.double().square().sum(dim=1).cpu(),
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
        paths_PL=paths_PL,
        path_rows_P=path_rows_P,
        **{
            name: torch.stack([getattr(p, name) for p in parts]).sum(dim=0)
            for name in ("counts_LE", "scores_LE", "entropy_L", "z_L")
        },
    )


def _router_report(name: str, top_k: int, part: _Part) -> RouterReport:
    L, E = part.counts_LE.shape
    load_LE = part.counts_LE.double() / (part.rows * top_k)
    entropy_L = share_of_largest(torch.special.entr(load_LE).sum(dim=1), E)
    score_entropy_L = share_of_largest(part.entropy_L / part.rows, E)
    layers = tuple(
        LayerReport(
            load=tuple(load_LE[layer].tolist()),
            dead_experts=tuple((part.counts_LE[layer] == 0).nonzero().flatten().tolist()),
            entropy=entropy_L[layer].item(),
            score_entropy=score_entropy_L[layer].item(),
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
    return RouterReport(
        name=name,
        rows=part.rows,
        layers=layers,
        paths_in_use=len(part.paths_PL),
        paths_possible=E**L,
        transitions=tuple(transitions),
    )
