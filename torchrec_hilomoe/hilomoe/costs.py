"""What experts cost a model, whoever wrote it: parameters and FLOPs, beside those of its base maps.

FLOPs are those of matrix products in a forward pass, two for each multiply-add; pointwise work and
lookups are not counted. PyTorch's own counter counts them: of a site what it computes, which is all
of a layer's experts or only the chosen ones, as the site decides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn, Tensor
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.hilomoe.inject import routers_of, sites_of
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.operators import EXPERT_FLOPS
from torchrec_hilomoe.hilomoe.random_stream import kept_random_numbers

__all__ = ["Flops", "ModelCosts", "ModuleCosts", "count_flops", "expert_costs"]


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of a forward pass, by what they are for.

    Attributes:
        base: Of the maps without experts.
        experts: Of the products with the experts' vectors.
        routing: Of the products with queries and keys.

    Example:
        >>> Flops(base=8, experts=2, routing=1).total
        11
    """

    base: int
    experts: int
    routing: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.experts + self.routing


@dataclass(frozen=True, kw_only=True)
class ModuleCosts:
    """What a site costs, a shared router, or the whole model.

    Attributes:
        name: Qualified name; empty of the whole model.
        rows_per_sample: Rows of a site for each sample; 1 of a router and of the model.
        base_parameters: Without experts.
        expert_parameters: Of the experts' vectors.
        routing_parameters: Of keys and query projections.
        flops: Of one sample.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=2), sites=["0"])
        >>> found = expert_costs(model, lambda: model(torch.randn(16, 8)), samples=16)
        >>> site = found.modules[0]
        >>> site.base_parameters, site.expert_parameters, site.routing_parameters
        (36, 24, 16)
    """

    name: str
    rows_per_sample: float
    base_parameters: int
    expert_parameters: int
    routing_parameters: int
    flops: Flops


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What a model with experts costs, all in all and site by site.

    Attributes:
        model: The whole model.
        modules: Its sites and shared routers, in the model's order.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=2), sites=["0"])
        >>> print(expert_costs(model, lambda: model(torch.randn(16, 8)), samples=16).table())
        module        rows parameters  +experts  +routing      FLOPs  +experts  +routing
        0                1         36        24        16         64        48        36
        (the model)      1         41        24        16         72        48        36
    """

    model: ModuleCosts
    modules: tuple[ModuleCosts, ...]

    def table(self) -> str:
        """A line a module, then the whole model: the base, and what is added to it.

        Rows and FLOPs are a sample's.
        """
        rows = [*self.modules, self.model]
        names = [row.name or "(the model)" for row in rows]
        wide = max(map(len, names))
        heads = ("parameters", "+experts", "+routing", "FLOPs", "+experts", "+routing")
        widths = (11, 10, 10, 11, 10, 10)
        titles = "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
        lines = [f"{'module':<{wide}}  {'rows':>5}{titles}"]
        for name, row in zip(names, rows, strict=True):
            parameters = (row.base_parameters, row.expert_parameters, row.routing_parameters)
            flops = (row.flops.base, row.flops.experts, row.flops.routing)
            shown = zip((*parameters, *flops), widths, strict=True)
            cells = "".join(f"{value:>{width},}" for value, width in shown)
            lines.append(f"{name:<{wide}}  {row.rows_per_sample:>5,g}{cells}")
        return "\n".join(lines)


def expert_costs(model: nn.Module, run: Callable[[], Any], *, samples: int) -> ModelCosts:
    """Count what the model's experts cost, and its base without them.

    Args:
        model: With sites; wrapped or not. Layers that are not active count as parameters.
        run: A forward pass of it, such as ``lambda: model(dense, features)``; it is run three
            times, in evaluation and without gradients. What is computed once a batch, such as the
            products of keys with keys, is shared by its samples: give a usual batch.
        samples: How many that pass has.

    Raises:
        ValueError: If there are no samples, or the pass computes nothing.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=2), sites=["0"])
        >>> found = expert_costs(model, lambda: model(torch.randn(16, 8)), samples=16)
        >>> found.model.flops.base  # two maps, 8 x 4 and 4 x 1
        72
    """
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(
            f"expert_costs: samples must be a whole number of at least 1, got {samples!r}. Give "
            "the size of the batch that is run."
        )
    if not callable(run):
        raise ValueError(
            f"expert_costs: run must be a function that calls the model, got a "
            f"{type(run).__name__}. Give one such as lambda: model(batch)."
        )
    modules = {**sites_of(model), **routers_of(model)}
    ordered = {name: modules[name] for name, _ in model.named_modules() if name in modules}
    rows: dict[str, int] = dict.fromkeys(ordered, 0)
    with _counting_rows(sites_of(model), rows):
        flops = count_flops(model, run, ordered)
    if not flops[""].total:
        raise ValueError(
            "expert_costs: run computed no product of matrices. Give a function that calls the "
            "model, such as lambda: model(batch)."
        )
    own = {name: _parameters(module) for name, module in ordered.items()}
    sums = [sum(part) for part in zip((0, 0, 0), *own.values(), strict=True)]
    others = sum(p.numel() for p in model.parameters()) - sum(sums)
    sums[0] += others

    def costs(name: str, parameters: Sequence[int], rows_per_sample: float) -> ModuleCosts:
        base, experts, routing = parameters
        found = flops[name]
        return ModuleCosts(
            name=name,
            rows_per_sample=rows_per_sample,
            base_parameters=base,
            expert_parameters=experts,
            routing_parameters=routing,
            flops=Flops(
                base=round(found.base / samples),
                experts=round(found.experts / samples),
                routing=round(found.routing / samples),
            ),
        )

    return ModelCosts(
        model=costs("", sums, 1.0),
        modules=tuple(
            costs(
                name,
                own[name],
                rows[name] / samples / 3 if isinstance(module, HiLoMoELinear) else 1.0,
            )
            for name, module in ordered.items()
        ),
    )


def count_flops(
    model: nn.Module, run: Callable[[], Any], modules: Mapping[str, nn.Module]
) -> dict[str, Flops]:
    """FLOPs of a forward pass in some modules and, under an empty name, in all.

    Args:
        model: Has the sites.
        run: The pass; it is run three times, in evaluation and without gradients.
        modules: By name.
    """
    whole = _count(model, run, modules)
    with _without_experts(model):
        plain = _count(model, run, modules)
    # Counted as the whole, but of a site the experts alone.
    of_experts = _count(model, run, modules, EXPERT_FLOPS)
    found = {}
    for name in ("", *modules):
        base = sum(plain[name].values())
        experts = sum(of_experts[name].get(operator, 0) for operator in EXPERT_FLOPS)
        routing = sum(whole[name].values()) - base - experts
        found[name] = Flops(base=base, experts=experts, routing=routing)
    return found


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    sites = sites_of(model).values()
    layers = [site.active_layers for site in sites]
    for site in sites:
        site.active_layers = 0
    try:
        yield
    finally:
        for site, active in zip(sites, layers, strict=True):
            site.active_layers = active


@contextmanager
def _counting_rows(sites: Mapping[str, HiLoMoELinear], rows: dict[str, int]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def count(site: HiLoMoELinear, args: tuple, output: Tensor) -> None:
            rows[name] += output.numel() // site.out_features

        return count

    handles = [site.register_forward_hook(hook(name)) for name, site in sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parameters(module: HiLoMoELinear | nn.Module) -> tuple[int, int, int]:
    """Of the base map, of experts, and of routing."""
    numbers = {name: p.numel() for name, p in module.named_parameters()}
    if not isinstance(module, HiLoMoELinear):  # a shared router
        return 0, 0, sum(numbers.values())
    routing = sum(numbers[name] for name in module.routing_parameters())
    of_experts = sum(numbers[name] for name in module.expert_parameters())
    return sum(numbers.values()) - of_experts, of_experts - routing, routing


@torch.no_grad()
def _count(
    model: nn.Module,
    run: Callable[[], Any],
    modules: Mapping[str, nn.Module],
    formulas: Mapping[Any, Callable[..., int]] = MappingProxyType({}),
) -> dict[str, dict[Any, int]]:
    """FLOPs by module and operator; ``formulas`` stand in for PyTorch's."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    found: dict[str, dict[Any, int]] = {name: {} for name in modules}
    try:
        model.eval()
        # Opaque to the counter are the fused encoder layer and the CPU's own attention.
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            kept_random_numbers(model),  # each pass draws the same
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=dict(formulas)) as counter,
            _metered(counter, modules, found),
        ):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
    found[""] = _so_far(counter)
    return found


@contextmanager
def _metered(
    counter: FlopCounterMode, modules: Mapping[str, nn.Module], found: dict[str, dict[Any, int]]
) -> Iterator[None]:
    """Add up what is counted between the begin and the end of each module's forwards."""
    begun: dict[str, dict[Any, int]] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[name] = _so_far(counter)

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for operator, flops in _so_far(counter).items():
                more = flops - begun[name].get(operator, 0)
                found[name][operator] = found[name].get(operator, 0) + more

        return hook

    handles = []
    for name, module in modules.items():
        handles += [
            module.register_forward_pre_hook(begin(name)),
            module.register_forward_hook(end(name)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _so_far(counter: FlopCounterMode) -> dict[Any, int]:
    return dict(counter.get_flop_counts().get("Global", {}))
