"""What routers do as numbers over steps, for TensorBoard or whatever takes named numbers."""

from collections.abc import Iterable
from typing import Protocol

from torchrec_hilomoe.hilomoe.monitor import LayerLoad
from torchrec_hilomoe.hilomoe.report import LayerReport, RoutingReport

__all__ = ["ScalarWriter", "routing_scalars", "write_routing"]

DRAWN_EXPERTS = 16  # more curves than that nobody can tell apart


class ScalarWriter(Protocol):
    """What is asked of a ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Draw a number over steps."""


def routing_scalars(found: RoutingReport | Iterable[LayerLoad]) -> dict[str, float]:
    """Numbers of a report, or of what `RoutingLog.flush` gives, by tag.

    A layer has ``router/NAME/layerL/`` with ``entropy``, ``largest_load``, ``dead_experts``, a
    ``load/E`` for each of at most 16 experts and, from a report, ``score_entropy`` and both losses;
    a router has ``router/NAME/paths_in_use``, a site ``site/NAME/output_ratio``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe, RoutingLog
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=2), sites=["0"])
        >>> log = RoutingLog(model)
        >>> _ = model(torch.randn(64, 8))
        >>> log.observe()
        >>> sorted(routing_scalars(log.flush()))[:3]
        ['router/0/layer1/dead_experts', 'router/0/layer1/entropy', 'router/0/layer1/largest_load']
    """
    if not isinstance(found, RoutingReport):
        return {
            f"router/{load.router}/layer{load.layer}/{name}": value
            for load in found
            for name, value in _of_layer(load).items()
        }
    scalars = {}
    for router in found.routers:
        for at, layer in enumerate(router.layers, start=1):
            more = ("score_entropy", "balance_loss", "z_loss")
            values = {**_of_layer(layer), **{name: getattr(layer, name) for name in more}}
            place = f"router/{router.name}/layer{at}"
            scalars |= {f"{place}/{name}": value for name, value in values.items()}
        scalars[f"router/{router.name}/paths_in_use"] = float(router.paths_in_use)
    return scalars | {f"site/{site.name}/output_ratio": site.output_ratio for site in found.sites}


def write_routing(
    writer: ScalarWriter, found: RoutingReport | Iterable[LayerLoad], step: int
) -> None:
    """Draw what routers do, with any ``SummaryWriter``; the tags are `routing_scalars`' own.

    Args:
        writer: Has TensorBoard's ``add_scalar``; on one rank only, for all find the same.
        found: A report, or what ``RoutingLog.flush`` gives.
        step: Optimizer steps done.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe, RoutingLog
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=2), sites=["0"])
        >>> log = RoutingLog(model)
        >>> _ = model(torch.randn(64, 8))
        >>> log.observe()
        >>> class Print:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         if tag.endswith("dead_experts"):
        ...             print(tag, scalar_value, global_step)
        >>> write_routing(Print(), log.flush(), step=1)
        router/0/layer1/dead_experts 0.0 1
    """
    for tag, value in routing_scalars(found).items():
        writer.add_scalar(tag, value, step)


def _of_layer(layer: LayerLoad | LayerReport) -> dict[str, float]:
    each = enumerate(layer.load) if len(layer.load) <= DRAWN_EXPERTS else ()
    return {
        "entropy": layer.entropy,
        "largest_load": max(layer.load),
        "dead_experts": float(sum(share == 0 for share in layer.load)),
        **{f"load/{expert}": share for expert, share in each},
    }
