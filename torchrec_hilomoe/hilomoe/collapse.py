"""Notice routers that have collapsed while the model trains.

A layer collapses when it sends all rows the same way: its other experts get no gradient, so they
do not come back by themselves.

Shape legend:
    L  active expert layers     E  experts
"""

import logging

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.sites import sites_of

__all__ = ["CollapseWatch"]

_log = logging.getLogger(__name__)


class CollapseWatch:
    """Warns once of each layer whose experts die, or whose load is almost that of one expert.

    Call `observe` after each training step. Counts are summed where they lie and looked at once in
    ``steps`` steps, so watching costs one small addition a site and step. They are those that the
    balance loss uses, over all ranks; what has no auxiliary losses is not watched, and that is
    said once. Sites that share a router are one.

    Args:
        model: The model, after injection: sites that join later are not watched.
        steps: Steps over which a layer must be collapsed to be called so.
        min_entropy: The least entropy of a sound load, as a share of the largest possible.
    """

    def __init__(self, model: nn.Module, steps: int = 500, min_entropy: float = 0.2) -> None:
        if steps < 1:
            raise ValueError(f"CollapseWatch.steps must be at least 1, got {steps}. Use 500.")
        if not 0 <= min_entropy <= 1:
            raise ValueError(
                f"CollapseWatch.min_entropy must lie between 0 and 1, got {min_entropy}: it is a "
                "share of the entropy of a balanced load. Use 0.2."
            )
        self._sites = sites_of(model)  # once: to walk all modules takes longer than to count
        self._steps, self._min_entropy = steps, min_entropy
        self._counts: dict[str, Tensor] = {}
        self._seen = 0
        self._warned: set[tuple[str, int]] = set()
        self._unwatched: set[str] = set()

    def observe(self) -> list[str]:
        """Count the last training forward; return the warnings given now."""
        routers: set[nn.Module] = set()
        for name, site in self._sites.items():
            router = site if site.shared_router is None else site.shared_router
            if router in routers:
                continue
            routers.add(router)
            record = site.routing_record
            if record is None:
                self._say_unwatched(name, site)
            else:
                counts_LE, before = record.counts_LE, self._counts.get(name)
                if before is not None and before.shape == counts_LE.shape:  # no layer has joined
                    counts_LE = counts_LE + before
                self._counts[name] = counts_LE
        self._seen += 1
        if self._seen < self._steps:
            return []
        messages = [
            message
            for name, counts in self._counts.items()
            for message in self._judge(name, counts)
        ]
        self._counts, self._seen = {}, 0
        for message in messages:
            _log.warning(message)
        return messages

    def _say_unwatched(self, name: str, site: HiLoMoELinear) -> None:
        config = site.config
        silent = config.balance_weight == config.z_weight == 0 and site.active_layers > 0
        if silent and name not in self._unwatched:
            self._unwatched.add(name)
            _log.warning(
                "Router at %r is not watched for collapse: balance_weight and z_weight are both 0, "
                "so nothing is counted, and most routers collapse then. Set balance_weight=0.01, "
                "or look at routing_report.",
                name,
            )

    def _judge(self, name: str, counts_LE: Tensor) -> list[str]:
        messages = []
        load_LE = (counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)).cpu().double()
        largest = torch.tensor(float(load_LE.shape[1])).double().log()
        for layer, load_E in enumerate(load_LE):
            dead = (load_E == 0).nonzero().flatten().tolist()
            entropy = (torch.special.entr(load_E).sum() / largest).item() if largest > 0 else 1.0
            if (dead or entropy < self._min_entropy) and (name, layer) not in self._warned:
                self._warned.add((name, layer))
                messages.append(
                    f"Router collapse at {name!r}, layer {layer + 1}, over the last {self._steps} "
                    f"steps: dead experts {dead}, load entropy {entropy:.2f} (limit "
                    f"{self._min_entropy}). Raise balance_weight, set query_norm=True, lower the "
                    "experts' learning rate, or use fewer experts."
                )
        return messages
