"""Sample-level routing: one router decides once per sample, for every token of several sites.

Routing per row computes logits for each token of each site. Where what matters about a sample is
known in one place of the model, for instance in the embedding of its user, the sites can share one
router that reads that place: its cost no longer grows with the length of the sequence.

A layer may have a *view*, the columns of that tensor that it reads. Experts can only specialise by
what their router can tell apart: one that reads everything starts with choices that say little
about any one feature, so all experts see the same mixture, and nothing pulls them apart. With a
view of its own, a layer's first choices already are a function of what it reads. (As Hash Layers,
Roller et al., 2021, arXiv 2106.04426, choose by a token alone; here the choice goes on learning.)

Shape legend:
    B  samples     D  width of the tensor that is read     Q  query width
    L  active expert layers     E  experts     k  experts chosen
    V  columns of the widest view
"""

import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.dispatch import refuse_torchscript
from torchrec_hilomoe.hilomoe.execution import Execution, execution_for
from torchrec_hilomoe.hilomoe.function import record_of, rms_norm, route_samples
from torchrec_hilomoe.hilomoe.layer_counts import LayerCount, LayerCounts
from torchrec_hilomoe.hilomoe.losses import loss_weights, LossWeights, RoutingRecord
from torchrec_hilomoe.hilomoe.passes import RoutedPass, RoutedPasses
from torchrec_hilomoe.hilomoe.ranks import RankGroup
from torchrec_hilomoe.hilomoe.routing import Routing
from torchrec_hilomoe.hilomoe.views import check_views, parts_of, places_of

__all__ = ["SampleRouter", "query_of"]

# Opaque to FX, as in `linear`.
torch.fx.wrap("_route")
torch.fx.wrap("query_of")


class SampleRouter(nn.Module):
    """Routes samples by a tensor of the model.

    A forward hook (`query_hook`) on the module that makes the tensor routes the samples; the
    routing is kept for the sites until the model's next forward.

    Args:
        width: ``D``.
        config: Options of the sites that share this router.
        device: Of the parameters.
        dtype: Of the parameters.
        views: For each expert layer, the ranges of columns that it reads; None lets every layer
            read all of them. The query is then all ranges side by side, ``Q`` columns, each range
            divided by its own root mean square, whatever ``query_norm``; and a layer hears of the
            choices above it only through the ranges that it has in common with them.

    Attributes:
        query_width: ``Q``.
        active_layers: The most that one of its sites computes; each site says how many those are.
        auxiliary_scale: As for a site, for all sites that share this router together.
        group: As for a site.
        query_entry: Which entry of the query module's output is the query; None where it is one.

    Example:
        >>> router = SampleRouter(6, HiLoMoEConfig(num_layers=2, num_experts=4))
        >>> router(torch.randn(32, 6)).chosen_LkN.shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        width: int,
        config: HiLoMoEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        views: Sequence[Sequence[range]] | None = None,
    ) -> None:
        super().__init__()
        if config.tie_keys:
            raise ValueError(
                "HiLoMoEConfig.tie_keys = True needs a router for each site, because its keys are "
                "the site's own down-vectors. Use tie_keys=False to share a router."
            )
        if config.backend == "triton":
            raise ValueError(
                "HiLoMoEConfig.backend = 'triton' routes and computes in one kernel, so it cannot "
                "share a router. Use backend='auto' or 'eager'."
            )
        if config.backend == "compiled":
            raise ValueError(
                "HiLoMoEConfig.backend = 'compiled' compiles routing and experts as one, so it "
                "cannot share a router. Use backend='auto' or 'eager'."
            )
        self.width, self.config = width, config
        self.ranges: tuple[range, ...] = ()
        read = source = width
        if views is not None:
            check_views(views, width, config)
            self.ranges = tuple(dict.fromkeys(part for view in views for part in view))
            source = sum(len(part) for part in self.ranges)
            self._places_LV = places_of(views, self.ranges)
            self.view_places: Tensor
            places_LV = torch.empty(self._places_LV.shape, dtype=torch.int64, device=device)
            self.register_buffer("view_places", places_LV, persistent=False)
            read = places_LV.shape[1]
        self.execution = execution_for(config, source)
        self.query_width = config.query_dim or source
        L, E, V = config.num_layers, config.num_experts, config.query_dim or read
        self.expert_keys = nn.Parameter(torch.empty(L, E, V, device=device, dtype=dtype))
        if config.query_dim is not None:
            self.query_proj = nn.Parameter(torch.empty(V, width, device=device, dtype=dtype))
        self._counts = LayerCounts(L)
        self.auxiliary_scale = 1.0
        self.group: RankGroup | None = None
        self.query_entry: str | int | None = None
        self._hooks: list[RemovableHandle] = []
        self._routing: Routing | None = None
        self._passes = RoutedPasses()
        self._offsets: dict[str, Tensor] = {}
        self._record: RoutingRecord | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw keys and query projection anew, and say again where views stand.

        Keys of a layer sum to zero, as in ``HiLoMoELinear.reset_experts``.
        """
        if self.ranges:
            self.view_places.copy_(self._places_LV)
        nn.init.normal_(self.expert_keys, generator=generator)
        if self.config.num_experts > 1:
            with torch.no_grad():
                self.expert_keys -= self.expert_keys.mean(dim=1, keepdim=True)
        if self.config.query_dim is not None:
            nn.init.normal_(self.query_proj, std=1 / math.sqrt(self.width), generator=generator)

    @property
    def active_layers(self) -> int:
        """The most that one of its sites computes; all of them, if there has been no site."""
        return self._counts.most

    def count(self, layers: int) -> LayerCount:
        """Route the layers that a site computes, as long as it keeps what is returned."""
        self._record = None
        return self._counts.add(LayerCount(layers))

    def routing(self) -> Routing:
        """How the samples of the pass under way are routed; gates are differentiable.

        In a backward that runs a site again it is the routing of that site's own forward.

        Raises:
            ValueError: If nothing has been routed, or that forward is not known.
        """
        if self._reruns:
            return self._passes.again()
        if self._routing is None:
            raise ValueError(
                "SampleRouter: a site ran before the module whose output routes it, or outside of "
                "its model, or FX traced past it. Name a module that runs earlier, and is not one "
                "of torch.nn's own, as the query."
            )
        return self._routing

    @property
    def _reruns(self) -> bool:
        return not torch.compiler.is_compiling() and self._passes.reruns

    def anchor(self, y: Tensor) -> Tensor:
        """Let the output of a site that has used `routing` keep it for the backward."""
        if not torch.compiler.is_compiling():
            self._passes.anchor(y)
        return y

    @property
    def routing_record(self) -> RoutingRecord | None:
        """As ``HiLoMoELinear.routing_record``."""
        return self._record

    def attach(self, model: nn.Module, query_module: str, tokens: Iterable[str]) -> None:
        """Register hooks on the modules of ``model`` whose outputs are needed.

        Args:
            model: Has the sites.
            query_module: The module whose output, ``(samples, D)``, is the query.
            tokens: Modules whose outputs are offsets, ``(samples + 1,)``: where in a list of
                tokens each sample's begin.
        """
        self._hooks += [
            model.register_forward_pre_hook(self.clear),
            model.register_forward_hook(self.leave, always_call=True),
            model.get_submodule(query_module).register_forward_hook(self.query_hook),
        ]
        for name in tokens:
            hook = partial(self.offsets_hook, name)
            self._hooks.append(model.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def query_hook(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the module that makes the query."""
        if self.active_layers == 0:
            return
        routing = self(query_of(output, self.query_entry))
        if self._reruns:
            self._passes.rerouted(routing)
            return
        self._routing = routing
        if not torch.compiler.is_compiling():
            self._passes.routed(routing, self._offsets)

    def offsets_hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a module whose output says whose the tokens of a list are."""
        if not self._reruns:
            self._offsets[name] = output

    def offsets(self, name: str | None) -> Tensor | None:
        """The output of the module ``name`` in the pass under way; None if it has not run."""
        if name is None:
            return None
        offsets = self._passes.running().offsets if self._reruns else self._offsets
        return offsets.get(name)

    def clear(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the model: a pass must not use the routing of the one before."""
        self._routing, self._offsets = None, {}
        if not torch.compiler.is_compiling():
            self._passes.enter()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model: its outputs keep the routing for their backward."""
        if not torch.compiler.is_compiling():
            self._passes.leave(output, self.begin)

    def begin(self, passes: Sequence[RoutedPass]) -> None:
        """A backward has reached the outputs of one of the model's forwards.

        A compiled site that it runs again asks nobody: it reads what is set here.
        """
        self._passes.begin(passes, partial(self._set, self._routing, self._offsets))
        if len(passes) == 1:
            self._set(passes[0].routing, passes[0].offsets)
        else:
            self._set(None, {})

    def _set(self, routing: Routing | None, offsets: dict[str, Tensor]) -> None:
        self._routing, self._offsets = routing, offsets

    def forward(self, query_BD: Tensor) -> Routing:
        """Route samples."""
        if torch.jit.is_tracing():
            refuse_torchscript()
        config = self.config
        routing, counts_LE = _route(
            query_BD,
            self.width,
            None if config.query_dim is None else self.query_proj,
            self.ranges,
            self.keys_LEQ()[: self.active_layers],
            config,
            self.execution,
            loss_weights(config, self.auxiliary_scale, self.group) if self.training else None,
            self.group,
        )
        if (record := record_of(counts_LE, routing, config, self.group)) is not None:
            self._record = record
        return routing

    def keys_LEQ(self) -> Tensor:
        """Of all layers; keys compare with what their layer reads, and are zero elsewhere."""
        if not self.ranges:
            return self.expert_keys
        # Of the configuration: FX knows no shapes, and must not have to unpack them.
        L, E, V = self.config.num_layers, self.config.num_experts, self._places_LV.shape[1]
        everywhere_LEQ = self.expert_keys.new_zeros(L, E, self.query_width + 1)
        places_LEV = self.view_places[:, None].expand(L, E, V)
        return everywhere_LEQ.scatter(2, places_LEV, self.expert_keys)[..., : self.query_width]

    def extra_repr(self) -> str:
        """What it reads and how it routes."""
        return f"width={self.width}, active_layers={self.active_layers}, {self.config}"

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` asks for."""
        refuse_torchscript()

    def __getstate__(self) -> dict:
        """Copies and pickles start without what the last pass left, and what hooks left behind.

        A module that was replaced, as by quantization, takes its hooks' books with it, of which no
        copy can be made. Those that are there must not go while the copy is made.
        """
        books = {hook: _books_of(hook) for hook in self._hooks}
        kept = [hook for hook, found in books.items() if all(it is not None for it in found)]
        left = {"_routing": None, "_record": None, "_offsets": {}}
        held = [books[hook] for hook in kept]
        return {**super().__getstate__(), **left, "_hooks": kept, "_books": held}

    def __setstate__(self, state: dict) -> None:
        """The books are the modules' own."""
        super().__setstate__({name: value for name, value in state.items() if name != "_books"})


def _books_of(hook: RemovableHandle) -> list[Any]:
    """Where a module keeps the hook; None for each that is gone."""
    return [ref() for ref in (hook.hooks_dict_ref, *hook.extra_dict_ref)]


def query_of(output: Any, entry: str | int | None) -> Tensor:
    """``(samples, D)``, the query in a module's output: a tensor, or pooled embeddings."""
    if entry is not None:
        try:
            output = output[entry]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"query_entry is {entry!r}, which the output of the query module, a "
                f"{type(output).__name__}, has not. Name one of its keys or indices, or leave "
                "query_entry out."
            ) from error
    sparse = sys.modules.get("torchrec.sparse.jagged_tensor")  # costly to import, if not there
    if sparse is not None:
        lazy = sys.modules.get("torchrec.distributed.types")
        if lazy is not None and isinstance(output, lazy.LazyAwaitable):
            output = output.wait()
        if isinstance(output, sparse.KeyedTensor):
            output = output.values()
    if not isinstance(output, Tensor):
        raise ValueError(
            f"query_module: the query module's output is a {type(output).__name__}, which must be "
            "a tensor or a KeyedTensor. Say which entry of a tuple or dict is the query "
            "(query_entry), or name another module."
        )
    return output.flatten(1)


def _route(
    query_BD: Tensor,
    width: int,
    query_proj: Tensor | None,
    ranges: Sequence[range],
    keys_LEQ: Tensor,
    config: HiLoMoEConfig,
    execution: Execution,
    weights: LossWeights | None,
    group: RankGroup | None,
) -> tuple[Routing, Tensor | None]:
    """As `route_samples`, if a router of this width can take the query."""
    if query_BD.dim() != 2 or query_BD.shape[1] != width:
        raise ValueError(
            f"SampleRouter.width is {width}, but the query's shape is {tuple(query_BD.shape)}; it "
            f"must be (samples, {width}). Name another module as the query, or build the router "
            "with its width."
        )
    q_BQ = query_BD.detach() if config.stop_gradient == "query" else query_BD
    if query_proj is not None:
        q_BQ = F.linear(q_BQ, query_proj)
    if ranges:
        q_BQ = parts_of(q_BQ, ranges)
    elif config.query_norm:
        q_BQ = rms_norm(q_BQ)
    return route_samples(q_BQ, keys_LEQ, config, execution, weights, group)
