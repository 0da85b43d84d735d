"""Which forward a site belongs to that a backward runs again.

Activation checkpointing runs parts of a model a second time, in the backward. A site with a shared
router then needs the routing of the forward whose backward this is, and the router may have routed
other samples since. So each forward's routing is handed through its graph: the nodes of the sites'
outputs and of the model's own outputs hold it, and it lives as long as one of them does. A model's
output, which a backward reaches first, also says whose backward has begun; the gates, which it
reaches last, say that this forward's sites are done. What remains open is refused.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn, Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node

from torchrec_hilomoe.hilomoe.dispatch import in_a_transform
from torchrec_hilomoe.hilomoe.routing import Routing

__all__ = ["RoutedPass", "RoutedPasses", "backward_number", "in_a_backward", "nodes_of"]

_HIDDEN = (
    "SampleRouter: activation checkpointing with use_reentrant=True recomputes the query module "
    "apart from sites that it routes, and so hides from them that their routing has a gradient: "
    "the router would learn nothing. Use use_reentrant=False, or checkpoint both as one part."
)
DEEPEST = 6  # containers in an output; what lies deeper is not looked for


@dataclass(eq=False, kw_only=True)
class RoutedPass:
    """What one forward's sites need to be run again.

    Attributes:
        routing: Of its samples.
        offsets: Where each sample's tokens begin, by the module that says so.
        rerouted: The routing of a query module that was run again itself.
        hidden: Whether it was routed in a part of the model that records no gradients, as one in
            ``checkpoint(use_reentrant=True)`` is.
        used: Whether sites have used ``routing`` while gradients were recorded.
    """

    routing: Routing
    offsets: dict[str, Tensor] = field(default_factory=dict)
    rerouted: Routing | None = None
    hidden: bool = False
    used: bool = False


class RoutedPasses:
    """The forwards of one router whose backward is yet to come, or under way."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[RoutedPass] = weakref.WeakSet()
        self._begun: dict[int, set[RoutedPass]] = {}  # by the number of the backward
        self._forward: list[RoutedPass] = []  # of the model's forward under way
        self._learns = self._inside = self._whole = False

    def __reduce__(self) -> tuple:
        """A copy's forwards are its own."""
        return RoutedPasses, ()

    @property
    def reruns(self) -> bool:
        """Whether a backward runs a part of the model again, and not the model as a whole."""
        return in_a_backward() and not self._whole

    def enter(self) -> None:
        """The model's forward begins."""
        if in_a_backward():
            self._whole = True
        else:
            self._begun.clear()
        self._forward = []
        self._inside, self._learns = True, torch.is_grad_enabled()

    def leave(self, output: Any, begin: Callable[[Sequence[RoutedPass]], None]) -> None:
        """The model's forward is over.

        Args:
            output: Its output; None if it failed.
            begin: A method, which is told of the forwards whose outputs a backward has reached.
        """
        if self._forward:
            reached = partial(_begin, weakref.WeakMethod(begin), tuple(self._forward))
            for node in {*nodes_of(output)}:
                node.register_prehook(reached)
        self._forward = []
        self._inside = self._learns = self._whole = False

    def routed(self, routing: Routing, offsets: dict[str, Tensor]) -> None:
        """The router has routed the samples of a forward."""
        if not (torch.is_grad_enabled() or self._learns) or _is_traced(routing):
            return
        routed = RoutedPass(routing=routing, offsets=offsets, hidden=not torch.is_grad_enabled())
        self._forward = [*self._forward, routed] if self._inside else [routed]
        self._alive.add(routed)
        self._end_with(routing, routed)

    def rerouted(self, routing: Routing) -> None:
        """The query module is run again, in a backward."""
        routed = self.running()
        if routed.used and routed.hidden and routing.gates_LkN.requires_grad:
            raise ValueError(_HIDDEN)
        routed.rerouted = routing
        self._end_with(routing, routed)

    def again(self) -> Routing:
        """The routing for a site that is run again, in a backward."""
        routed = self.running()
        if routed.rerouted is not None:
            return routed.rerouted
        if routed.hidden and not routed.used:
            raise ValueError(_HIDDEN)
        return routed.routing

    def anchor(self, y: Tensor) -> None:
        """The output of a site holds its forward's routing."""
        if not self._forward or not torch.is_grad_enabled():
            return
        routed = self._forward[-1]
        routed.used = True
        if isinstance(y, Tensor) and y.grad_fn is not None:
            cast(dict, y.grad_fn.metadata)["hilomoe"] = routed

    def running(self) -> RoutedPass:
        """The forward whose part the backward under way runs again.

        Raises:
            ValueError: If it could be one of several, or none is left.
        """
        found = [*(self._begun[max(self._begun)] if self._begun else self._alive)]
        if len(found) != 1:
            how_many = f"{len(found)} forwards are" if found else "none is"
            raise ValueError(
                "SampleRouter: activation checkpointing recomputes a site in a backward, and of "
                f"the forwards that it could belong to {how_many} left, where it must be one. Call "
                "backward after each forward, use use_reentrant=False, or leave the sites out of "
                "the checkpointed part."
            )
        return found[0]

    def begin(self, passes: Sequence[RoutedPass], restore: Callable[[], None]) -> None:
        """A backward has reached the outputs of a forward; ``restore`` is called at its end."""
        task = backward_number()
        if task not in self._begun:
            self._begun[task] = set()
            Variable._execution_engine.queue_callback(partial(self._forget, task))
            Variable._execution_engine.queue_callback(restore)
        self._begun[task].update(passes)

    def end(self, routed: RoutedPass) -> None:
        """A backward has passed all sites of a forward."""
        routed.rerouted = None
        for passes in self._begun.values():
            passes.discard(routed)
        kept = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore
        if not kept():
            self._alive.discard(routed)

    def _forget(self, task: int) -> None:
        self._begun.pop(task, None)

    def _end_with(self, routing: Routing, routed: RoutedPass) -> None:
        """When the gates have their gradient, all sites have run."""
        if (node := routing.gates_LkN.grad_fn) is not None:
            # Weak, because the pass holds the gates, and a node is no object for Python to collect.
            node.register_hook(partial(_end, weakref.ref(self), weakref.ref(routed)))


def in_a_backward() -> bool:
    """Whether autograd runs this."""
    return backward_number() != -1


def backward_number() -> int:
    """Of the backward that runs this; -1 where none does."""
    return torch._C._current_graph_task_id()


def _is_traced(routing: Routing) -> bool:
    """Whether there is no graph that could hold the routing."""
    return not isinstance(routing.gates_LkN, Tensor) or in_a_transform()


def _begin(
    begin: weakref.WeakMethod, passes: tuple[RoutedPass, ...], grads: tuple[Tensor, ...]
) -> None:
    if (told := begin()) is not None and in_a_backward():
        told(passes)


def _end(
    passes: weakref.ref[RoutedPasses], ended: weakref.ref[RoutedPass], *grads: tuple[Tensor, ...]
) -> None:
    found, routed = passes(), ended()
    if found is not None and routed is not None and in_a_backward():
        found.end(routed)


def nodes_of(output: Any, depth: int = 0) -> Iterator[Node]:
    """Nodes of the graph that made the tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output.grad_fn
        return
    if depth > DEEPEST or isinstance(output, nn.Module | torch.fx.Proxy | type):
        return
    if isinstance(output, Mapping):
        held = [*output.values()]
    elif isinstance(output, list | tuple | set | frozenset):
        held = [*output]
    else:
        slots = (name for kind in type(output).__mro__ for name in vars(kind).get("__slots__", ()))
        held = [*vars(output).values()] if hasattr(output, "__dict__") else []
        held += [getattr(output, name, None) for name in slots]
    for value in held:
        yield from nodes_of(value, depth + 1)
