"""The load of every expert while a model trains, from counts that the balance loss makes anyway.

Shape legend:
    L  active expert layers     E  experts
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.sites import sites_of

__all__ = ["LayerLoad", "RoutingLog"]


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What an expert layer did since the last line of the log.

    Attributes:
        site: Its qualified name.
        layer: Counted from 1.
        load: Share of the choices that went to each expert.
        entropy: Of the load, as a share of its largest value: 1 when balanced.
    """

    site: str
    layer: int
    load: tuple[float, ...]
    entropy: float


class RoutingLog:
    """Adds up the choices of all ranks; without auxiliary losses there are none to be seen.

    Args:
        model: The model, after injection.

    Attributes:
        counts: The choices since the last flush, by site.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sites = sites_of(model)
        self.counts: dict[str, Tensor] = {}

    def observe(self) -> None:
        """Count the last training forward: one small addition a site."""
        for name, site in self._sites.items():
            record = site.routing_record
            if record is None:
                continue
            counts_LE, before = record.counts_LE, self.counts.get(name)
            if before is not None and before.shape == counts_LE.shape:  # no layer has joined
                counts_LE = counts_LE + before.to(counts_LE.device)
            self.counts[name] = counts_LE

    def restore(self, counts: Mapping[str, Tensor]) -> None:
        """Go on from the :attr:`counts` of a run that was stopped."""
        self.counts = {name: found for name, found in counts.items() if name in self._sites}

    def flush(self) -> Iterator[LayerLoad]:
        """Yield every layer's load since the last time, and start anew."""
        counts, self.counts = self.counts, {}
        for name, counts_LE in counts.items():
            load_LE = counts_LE.double().cpu()
            load_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
            largest = torch.tensor(float(load_LE.shape[1])).double().log()
            for layer, load_E in enumerate(load_LE, start=1):
                entropy = torch.special.entr(load_E).sum() / largest if largest > 0 else largest + 1
                yield LayerLoad(
                    site=name, layer=layer, load=tuple(load_E.tolist()), entropy=entropy.item()
                )
