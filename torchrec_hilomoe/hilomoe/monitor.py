"""How loaded experts are while a model trains, from the counts that its balance loss makes anyway.

`RoutingLog` adds them up for a log, `CollapseWatch` warns.

Shape legend:
    L  active expert layers     E  experts
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.inject import routers_of

__all__ = ["CollapseWatch", "LayerLoad", "RoutingLog", "share_of_largest"]

_log = logging.getLogger(__name__)


def share_of_largest(entropy: Tensor, num_experts: int) -> Tensor:
    """An entropy in units of a uniform choice's; one expert is always balanced."""
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What a router's expert layer did since the last line of the log.

    Attributes:
        router: Qualified name of the site, or of the router that sites share.
        layer: Expert layer, counted from 1.
        load: Share of the choices that went to each expert.
        entropy: Entropy of the load, as a share of its largest value: 1 when balanced.

    Example:
        >>> LayerLoad(router="0", layer=1, load=(0.5, 0.5), entropy=1.0).load
        (0.5, 0.5)
    """

    router: str
    layer: int
    load: tuple[float, ...]
    entropy: float


class RoutingLog:
    """Adds up the choices of all ranks while a model trains, from counts of the balance loss.

    Counts are summed where they lie, so it costs one small addition a router and step. Without
    auxiliary losses there are none to be seen.

    Args:
        model: The model, after injection: sites that join later are not seen.

    Attributes:
        routers: Those of the model, by name.
        counts: The choices since the last flush, by router.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> log = RoutingLog(model)
        >>> _ = model(torch.randn(64, 8))
        >>> log.observe()
        >>> [(load.router, load.layer) for load in log.flush()]
        [('0', 1), ('0', 2)]
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers_of(model)  # once: to walk all modules takes longer than to count
        self.counts: dict[str, Tensor] = {}

    def observe(self) -> None:
        """Count the last training forward."""
        for name, router in self.routers.items():
            record = router.routing_record
            if record is None:
                continue
            counts_LE, before = record.counts_LE, self.counts.get(name)
            if before is not None and before.shape == counts_LE.shape:  # no layer has joined
                counts_LE = counts_LE + before.to(counts_LE.device)
            self.counts[name] = counts_LE

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the counts: those of one step alone may still be on their way."""
        return {"choices": {name: found.clone() for name, found in self.counts.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what :meth:`state_dict` gave, for the routers that are still there."""
        counts = state_dict["choices"]
        self.counts = {name: found for name, found in counts.items() if name in self.routers}

    def flush(self) -> Iterator[LayerLoad]:
        """Yield every layer's load since the last time, and start anew."""
        counts, self.counts = self.counts, {}
        for name, counts_LE in counts.items():
            load_LE = counts_LE.double().cpu()
            load_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
            entropy_L = torch.special.entr(load_LE).sum(dim=1)
            entropies = share_of_largest(entropy_L, load_LE.shape[1]).tolist()
            found = zip(load_LE.tolist(), entropies, strict=True)
            for layer, (load, entropy) in enumerate(found, start=1):
                yield LayerLoad(router=name, layer=layer, load=tuple(load), entropy=entropy)


class CollapseWatch:
    """Warns once of each layer whose experts die, or whose load is almost that of one expert.

    A layer collapses when it sends all rows the same way: its other experts get no gradient, so
    they do not come back by themselves. Call `observe` after each training step; counts are looked
    at once in ``steps`` steps. They are those that the balance loss uses, over all ranks; what has
    no auxiliary losses is not watched, and that is said once. Sites that share a router are one.

    Args:
        model: The model, after injection: sites that join later are not watched.
        steps: Steps over which a layer must be collapsed to be called so.
        min_entropy: The least entropy of a sound load, as a share of the largest possible.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4), sites=["0"])
        >>> watch = CollapseWatch(model, steps=1)
        >>> with torch.no_grad():
        ...     _ = model[0].expert_keys.zero_()  # nothing to decide by: the first expert takes all
        >>> _ = model(torch.randn(64, 8))
        >>> len(watch.observe())  # a warning for each layer
        2
    """

    def __init__(self, model: nn.Module, steps: int = 500, min_entropy: float = 0.2) -> None:
        if steps < 1:
            raise ValueError(f"CollapseWatch.steps must be at least 1, got {steps}. Use 500.")
        if not 0 <= min_entropy <= 1:
            raise ValueError(
                f"CollapseWatch.min_entropy must lie between 0 and 1, got {min_entropy}: it is a "
                "share of the entropy of a balanced load. Use 0.2."
            )
        self._log = RoutingLog(model)
        self._steps, self._min_entropy = steps, min_entropy
        self._seen = 0
        self._warned: set[tuple[str, int]] = set()
        self._unwatched: set[str] = set()

    def observe(self) -> list[str]:
        """Count the last training forward; return the warnings given now."""
        self._log.observe()
        for name, router in self._log.routers.items():
            silent = router.config.balance_weight == router.config.z_weight == 0
            if silent and router.active_layers > 0 and name not in self._unwatched:
                self._unwatched.add(name)
                _log.warning(
                    "Router at %r is not watched for collapse: balance_weight and z_weight are "
                    "both 0, so nothing is counted, and most routers collapse then. Set "
                    "balance_weight=0.01, or look at routing_report.",
                    name,
                )
        self._seen += 1
        if self._seen < self._steps:
            return []
        self._seen = 0
        messages = [message for load in self._log.flush() for message in self._judge(load)]
        for message in messages:
            _log.warning(message)
        return messages

    def _judge(self, found: LayerLoad) -> list[str]:
        dead = [expert for expert, share in enumerate(found.load) if share == 0]
        place = (found.router, found.layer)
        if place in self._warned or not (dead or found.entropy < self._min_entropy):
            return []
        self._warned.add(place)
        return [
            f"Router collapse at {found.router!r}, layer {found.layer}, over the last "
            f"{self._steps} steps: dead experts {dead}, load entropy {found.entropy:.2f} (limit "
            f"{self._min_entropy}). Raise balance_weight, set query_norm=True, lower the "
            "experts' learning rate, or use fewer experts."
        ]
