"""Whether the auxiliary losses are as strong as they are meant to be, as far as that can be seen.

Each backward pass adds them once, whatever the host's loss was divided or multiplied by. So where
several run before an optimizer's step, or a `GradScaler` multiplies the loss, the host must say so
(`inject.set_auxiliary_loss_scale`); one that has not is told.
"""

import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from torchrec_hilomoe.hilomoe.dispatch import in_a_transform
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.passes import backward_number, in_a_backward, nodes_of

__all__ = ["StrengthWatch"]

STEPS = 2  # that agree: one may be the last of an odd number of micro-batches


class StrengthWatch:
    """Counts the backward passes before each of an optimizer's first steps.

    Args:
        sites: Those that are watched, by name.

    Attributes:
        judged: Whether it has seen what it must.
    """

    def __init__(self, sites: Mapping[str, HiLoMoELinear]) -> None:
        self._sites = dict(sites)
        self._backwards: set[int] = set()
        self._counts: list[int] = []
        self.judged = False

    def __getstate__(self) -> dict:
        """Copies and pickles count their own."""
        return {**vars(self), "_backwards": set(), "_counts": []}

    def before(self) -> None:
        """A training forward begins."""
        if self.judged or self._is_told():
            return
        kinds = {site.weight.device.type for site in self._losing().values()}
        if any(_scales(kind) for kind in kinds):
            self.judged = True
            warnings.warn(
                "A model with HiLoMoE sites trains under autocast to float16, whose loss a "
                "GradScaler multiplies; the auxiliary losses are not multiplied, and so are as "
                "good as absent. Call set_auxiliary_loss_scale(model, scaler.get_scale()) before "
                "each step, or set_auxiliary_loss_scale(model, 1.0) if nothing multiplies the "
                "loss.",
                stacklevel=5,
            )

    def after(self, output: Any) -> None:
        """A training forward is over; a backward will reach its output."""
        if self.judged or in_a_backward() or in_a_transform() or not self._losing():
            return
        for node in {*nodes_of(output)}:
            node.register_prehook(partial(_reached, weakref.ref(self)))

    def stepped(self) -> None:
        """An optimizer has moved parameters of the sites."""
        passes, self._backwards = len(self._backwards), set()
        if self.judged or not passes:  # the second optimizer of a step
            return
        self._counts.append(passes)
        if len(self._counts) < STEPS:
            return
        self.judged = True
        if min(self._counts) > 1 and len(set(self._counts)) == 1 and not self._is_told():
            warnings.warn(
                f"{passes} backward passes run through the HiLoMoE sites before each optimizer "
                "step, and each adds the auxiliary losses at full strength. If the loss is divided "
                f"by {passes}, as for accumulated micro-batches, or if each is of one task of the "
                f"same rows, call set_auxiliary_loss_scale(model, 1 / {passes}). If the losses are "
                "meant to add up, say so: set_auxiliary_loss_scale(model, 1.0).",
                stacklevel=5,
            )

    def reached(self) -> None:
        """A backward has reached the output of a forward."""
        self._backwards.add(backward_number())

    def _losing(self) -> dict[str, HiLoMoELinear]:
        """Sites that compute auxiliary losses."""
        return {
            name: site
            for name, site in self._sites.items()
            if site.active_layers > 0 and (site.config.balance_weight or site.config.z_weight)
        }

    def _is_told(self) -> bool:
        """Whether the host has said by what it multiplies its loss; then all is said."""
        told = any(site.scale_is_told for site in self._sites.values())
        self.judged = self.judged or told
        return told


def _scales(device: str) -> bool:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return torch.get_autocast_dtype(device) == torch.float16


def _reached(watch: weakref.ref[StrengthWatch], grads: tuple) -> None:
    if (found := watch()) is not None:
        found.reached()
