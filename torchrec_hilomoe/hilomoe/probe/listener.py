"""What a probe hears of a host's passes, through hooks: no loop is changed, and no module.

A site's input and the gradient by its output, and the output of the module that is a sample's
query. A pass is complete when the next forward begins, or listening ends: tasks may have a backward
each, whose gradients add up.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn, Tensor

from torchrec_hilomoe.hilomoe.passes import in_a_backward
from torchrec_hilomoe.hilomoe.probe.heard import HeardPass, HeardQuery, LossTerms, SiteCall
from torchrec_hilomoe.hilomoe.router import query_of

__all__ = ["PassListener"]

logger = logging.getLogger(__name__)


class PassListener:
    """Hooks on a model while its passes are to be heard, as a context.

    Args:
        model: The model.
        query_module: Name of the module whose output is the samples' query.
        query_entry: Key or index of the query in it.
        tokens: Sites, by name, each with the module that says whose its events are, or None.
        loss_terms: Tells of a pass how the host makes its loss; None: the mean.
        every: Passes of which one is heard.
        prepare: Called with the query of each pass, tells whether the pass can be judged.
        add: Called with each complete pass.

    Attributes:
        passes: Forwards so far, heard or not.
    """

    def __init__(
        self,
        model: nn.Module,
        query_module: str,
        query_entry: str | int | None,
        tokens: Mapping[str, str | None],
        loss_terms: Callable[..., LossTerms] | None,
        *,
        every: int,
        prepare: Callable[[Tensor], bool],
        add: Callable[[HeardPass], None],
    ) -> None:
        self._model, self._query_module, self._query_entry = model, query_module, query_entry
        self._tokens, self._loss_terms, self._every = tokens, loss_terms, every
        self._prepare, self._add = prepare, add
        self.passes = 0
        self._pass: HeardPass | None = None
        self._heard: dict[int, HeardPass] = {}  # by number, those that a backward has reached
        self._overlaps = self._warned = False
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        module, begin = self._model.get_submodule, self._begin
        offsets = dict.fromkeys(name for name in self._tokens.values() if name is not None)
        self._handles = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True),
            module(self._query_module).register_forward_hook(self._hear_query),
            *(
                module(name).register_forward_hook(partial(self._hear_offsets, name))
                for name in offsets
            ),
            *(
                module(name).register_forward_hook(partial(self._hear_site, name), with_kwargs=True)
                for name in self._tokens
            ),
        ]

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._pass = [], None
        if error is not None:
            self._heard = {}  # what a backward that failed has told is not whole
        self.add_heard()

    @torch.no_grad()
    def add_heard(self) -> None:
        """Hand on the passes of which a backward was heard, now that no other one will come."""
        heard, self._heard = self._heard, {}
        for one in heard.values():
            self._add(one)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if not in_a_backward():
            self.add_heard()
        elif self._pass is not None and self._pass.calls:
            return  # activation checkpointing of the whole model: this pass is heard already
        self._overlaps = self._pass is not None and not self._pass.has_gradient
        self._pass = None
        if torch.is_grad_enabled():
            if self.passes % self._every == 0:
                self._pass = HeardPass(self.passes // self._every, args, kwargs)
            self.passes += 1

    def _listens(self) -> bool:
        """Whether what runs now is of a pass that is heard, and known to be.

        A backward may run a part of a pass again after another one has begun.
        """
        return self._pass is not None and not (self._overlaps and in_a_backward())

    @torch.no_grad()
    def _hear_query(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the query's module; FX traces it with a proxy."""
        if self._pass is None or isinstance(output, fx.Proxy) or not self._listens():
            return
        query_BQ = query_of(output, self._query_entry).detach()
        query_BQ = query_BQ if query_BQ.is_floating_point() else query_BQ.float()
        if self._prepare(query_BQ):
            # A host may go on to change it in place.
            self._pass.query = HeardQuery(query_BQ.clone())

    def _hear_offsets(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of a module that says whose the events of a list are."""
        if self._pass is not None and isinstance(output, Tensor) and self._listens():
            self._pass.offsets[name] = output

    def _hear_site(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of a site."""
        heard = self._pass
        if heard is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if not self._listens():
            # Where the first run was heard this one gets no gradient.
            output.register_hook(_refuse_overlap)
            return
        x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
        offsets = heard.offsets.get(self._tokens[name] or "")
        call = SiteCall(x, x._version, heard.query, offsets)
        heard.calls.setdefault(name, []).append(call)
        output.register_hook(partial(self._hear_gradient, name, heard, call))

    @torch.no_grad()
    def _hear_gradient(self, name: str, heard: HeardPass, call: SiteCall, gradient: Tensor) -> None:
        """Hook of a site's output."""
        if not self._handles:
            return
        self._heard[heard.number] = heard
        # A scaled loss that overflowed tells nothing. To ask each number takes ten times as long.
        if gradient.numel() and not bool(gradient.abs().max().isfinite()):
            heard.not_finite.append(name)
            if not self._warned:
                logger.warning(
                    "a gradient of site %r is not finite: such passes tell nothing", name
                )
            self._warned = True
            return
        call.add(name, gradient)
        if heard.terms is None:  # while the host's batch is what it was
            terms = LossTerms()
            if self._loss_terms is not None:
                terms = self._loss_terms(*heard.args, **heard.kwargs)
            if not isinstance(terms, LossTerms):
                raise ValueError(
                    f"InteractionProbe.loss_terms must return LossTerms, got {terms!r}. Return "
                    "LossTerms(), or leave loss_terms out where the loss is the mean."
                )
            heard.terms = terms


def _refuse_overlap(gradient: Tensor) -> None:
    raise ValueError(
        "InteractionProbe: activation checkpointing runs a site again in a backward, and another "
        "forward has begun since, so nobody knows whose rows these are. Call backward after each "
        "forward (and evaluate under torch.no_grad()), or use use_reentrant=False."
    )
