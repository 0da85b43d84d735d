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
from torch import nn

from torchrec_hilomoe.hilomoe.dispatch import in_a_transform
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.passes import backward_number, in_a_backward, nodes_of

__all__ = ["StrengthWatch"]

STEPS = 2  # that agree: one may be the last of an odd number of micro-batches
MOST = 256  # backwards of a host whose optimizer is not heard, after which nothing is said


class StrengthWatch:
    """Counts what each of an optimizer's first steps gathers: backward passes that add up.

    A pass counts that adds to the gradient of a router's keys or projection, as the auxiliary
    losses do; one that began with no gradient, or with zeros, is the first. So nothing is said of
    passes whose gradients were thrown away, as of an optimizer's closures or a step that was
    skipped, nor of ``torch.autograd.grad``, which adds to none.

    Args:
        sites: Those that are watched, by name.
    """

    def __init__(self, sites: Mapping[str, HiLoMoELinear]) -> None:
        self._sites = dict(sites)
        self._gathers: dict[nn.Parameter, _Gathers] = {}
        self._counts: list[int] = []
        self._backward, self._backwards = -1, 0
        self._half = False
        self._judged = False

    def __getstate__(self) -> dict:
        """Copies and pickles count their own."""
        return {**vars(self), "_gathers": {}, "_counts": []}

    @property
    def judged(self) -> bool:
        """Whether it has seen what it must; then it hears no backward."""
        return self._judged

    @judged.setter
    def judged(self, judged: bool) -> None:
        self._judged = judged
        if judged:
            for gathers in self._gathers.values():
                gathers.handle.remove()
            self._gathers.clear()

    def before(self) -> None:
        """A training forward begins."""
        if self.judged or self._is_told():
            return
        kinds = {site.weight.device.type for site in self._losing().values()}
        if not any(_scales(kind) for kind in kinds):
            return
        if not self._half:  # its scale may be told before its backward
            self._half = True
            return
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
        if self.judged or in_a_backward() or in_a_transform():
            return
        for parameter in {p for site in self._losing().values() for p in _routing_of(site)}:
            if parameter not in self._gathers:
                self._gathers[parameter] = _Gathers(parameter)
        if self._gathers:
            for node in {*nodes_of(output)}:
                node.register_prehook(partial(_reached, weakref.ref(self)))

    def stepped(self) -> None:
        """An optimizer has moved parameters of the sites."""
        passes = max((gathers.passes for gathers in self._gathers.values()), default=0)
        for gathers in self._gathers.values():
            gathers.passes = 0
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
        """A backward has reached the output of a forward, and no parameter yet."""
        number = backward_number()
        if self.judged or number == self._backward:
            return
        self._backward = number
        self._backwards += 1
        if self._backwards > MOST:
            self.judged = True
        for gathers in self._gathers.values():
            gathers.begin()

    def _losing(self) -> dict[str, HiLoMoELinear]:
        """Sites that compute auxiliary losses by which a router learns."""
        return {
            name: site
            for name, site in self._sites.items()
            if site.active_layers > 0
            and (site.config.balance_weight or site.config.z_weight)
            and _routing_of(site)
        }

    def _is_told(self) -> bool:
        """Whether the host has said by what it multiplies its loss; then all is said."""
        told = any(site.scale_is_told for site in self._sites.values())
        self.judged = self.judged or told
        return told


class _Gathers:
    """Backward passes that have added to a parameter's gradient since it was none."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)
        self._begun = False
        self.passes = 0
        self.handle = parameter.register_post_accumulate_grad_hook(
            partial(_added, weakref.ref(self))
        )

    def begin(self) -> None:
        """A backward begins, which may add to the gradient."""
        parameter, self._begun = self._parameter(), True
        if parameter is None or parameter.grad is None or not parameter.grad.any():
            self.passes = 0

    def added(self) -> None:
        """A backward has added."""
        self.passes += self._begun
        self._begun = False


def _added(gathers: weakref.ref[_Gathers], parameter: torch.Tensor) -> None:
    if (found := gathers()) is not None:
        found.added()


def _routing_of(site: HiLoMoELinear) -> list[nn.Parameter]:
    """What learns of a site's router."""
    if site.router is not None:
        own = dict(site.router.named_parameters())
    elif site.config.tie_keys:
        own = {"expert_in": site.expert_in}
    else:
        own = site.routing_parameters()
    return [p for p in own.values() if isinstance(p, nn.Parameter) and p.requires_grad]


def _scales(device: str) -> bool:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return torch.get_autocast_dtype(device) == torch.float16


def _reached(watch: weakref.ref[StrengthWatch], grads: tuple) -> None:
    if (found := watch()) is not None:
        found.reached()
