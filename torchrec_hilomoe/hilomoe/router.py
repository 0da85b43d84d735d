"""Sample-level routing: one router decides once per sample, for every token of several sites.

Routing per row computes logits for each token of each site. Where what matters about a sample is
known in one place of the model, for instance in the embedding of its user, the sites can share one
router that reads that place: its cost no longer grows with the length of the sequence.

Shape legend:
    B  samples     D  width of the tensor that is read     Q  query width
    L  active expert layers     E  experts     k  experts chosen
    V  columns of the widest view
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.function import route_samples
from torchrec_hilomoe.hilomoe.losses import RoutingRecord
from torchrec_hilomoe.hilomoe.plan import plan_for
from torchrec_hilomoe.hilomoe.queries import check_views, parts_of, places_of, rms_norm
from torchrec_hilomoe.hilomoe.routing import Routing

__all__ = ["SampleRouter", "TokenGates", "for_tokens"]

# Opaque to FX, as in `linear`.
for _name in ("checked", "parts_of", "rms_norm", "route_samples"):
    torch.fx.wrap(_name)


class SampleRouter(nn.Module):
    """Routes samples by a tensor of the model.

    It hears the tensor through a forward hook (`hear`) on the module that makes it, and keeps the
    routing for the sites until the model's next forward.

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
        active_layers: As for a site; the sites set it.
        auxiliary_scale: As for a site, for all sites that share this router together.
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
            places_LV = places_of(views, self.ranges, device)
            self.view_places: Tensor
            self.register_buffer("view_places", places_LV, persistent=False)
            read = places_LV.shape[1]
        self.plan = plan_for(config, source)
        self.query_width = config.query_dim or source
        L, E, V = config.num_layers, config.num_experts, config.query_dim or read
        self.expert_keys = nn.Parameter(torch.empty(L, E, V, device=device, dtype=dtype))
        if config.query_dim is not None:
            self.query_proj = nn.Parameter(torch.empty(V, width, device=device, dtype=dtype))
        self.active_layers = L
        self.auxiliary_scale = 1.0
        self._hooks: list[RemovableHandle] = []
        self._routing: Routing | None = None
        self._offsets: dict[str, Tensor] = {}
        self._record: RoutingRecord | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Keys of a layer sum to zero, as in ``HiLoMoELinear.reset_experts``."""
        nn.init.normal_(self.expert_keys, generator=generator)
        if self.config.num_experts > 1:
            with torch.no_grad():
                self.expert_keys -= self.expert_keys.mean(dim=1, keepdim=True)
        if self.config.query_dim is not None:
            nn.init.normal_(self.query_proj, std=1 / math.sqrt(self.width), generator=generator)

    @property
    def routing(self) -> Routing:
        """How the samples of the pass under way are routed; gates are differentiable."""
        if self._routing is None:
            raise ValueError(
                "SampleRouter: a site ran before the module whose output routes it, or outside of "
                "its model, or FX traced past it. Name a module that runs earlier, and is not one "
                "of torch.nn's own, as the query."
            )
        return self._routing

    @property
    def routing_record(self) -> RoutingRecord | None:
        """As ``HiLoMoELinear.routing_record``."""
        return self._record

    def attach(self, model: nn.Module, query: str, tokens: Iterable[str]) -> None:
        """Hear what modules of ``model`` say in each of its forwards.

        Args:
            model: Has the sites.
            query: The module whose output, ``(samples, D)``, is the query.
            tokens: Modules whose outputs are offsets, ``(samples + 1,)``: where in a list of
                tokens each sample's begin.
        """
        self._hooks += [
            model.register_forward_pre_hook(self.forget),
            model.get_submodule(query).register_forward_hook(self.hear),
        ]
        for name in tokens:
            hook = partial(self.hear_offsets, name)
            self._hooks.append(model.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        """Hear no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def hear(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the module that makes the query."""
        if self.active_layers > 0:
            self._routing = self(output.flatten(1))

    def hear_offsets(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a module that says whose the tokens of a list are."""
        self._offsets[name] = output

    def offsets(self, name: str | None) -> Tensor | None:
        """What the module ``name`` said in the pass under way; None if it has not run."""
        return None if name is None else self._offsets.get(name)

    def forget(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the model: a pass must not use the routing of the one before."""
        self._routing = None
        self._offsets.clear()

    def forward(self, query_BD: Tensor) -> Routing:
        """Route samples."""
        config = self.config
        query_BD = checked(query_BD, self.width)
        q_BQ = query_BD.detach() if config.stop_gradient == "query" else query_BD
        if config.query_dim is not None:
            q_BQ = F.linear(q_BQ, self.query_proj)
        if self.ranges:
            q_BQ = parts_of(q_BQ, self.ranges)
        elif config.query_norm:
            q_BQ = rms_norm(q_BQ)
        scale = self.auxiliary_scale
        weights = (config.balance_weight * scale, config.z_weight * scale)
        losing = self.training and torch.is_grad_enabled() and weights != (0.0, 0.0)
        keys_MQ = self._keys()[: self.active_layers].flatten(0, 1)
        routing, counts_LE = route_samples(
            q_BQ, keys_MQ, config, self.plan, weights if losing else None
        )
        if losing and isinstance(counts_LE, Tensor):  # an FX proxy is no value to keep
            self._record = RoutingRecord(
                counts_LE=counts_LE,
                scores_LEN=routing.scores_LEN,
                logsumexp_LN=routing.logsumexp_LN,
                top_k=config.top_k,
            )
        return routing

    def _keys(self) -> Tensor:
        """``(L, E, Q)``: keys compare with what their layer reads, and are zero elsewhere."""
        if not self.ranges:
            return self.expert_keys
        L, E, V = self.expert_keys.shape
        everywhere_LEQ = self.expert_keys.new_zeros(L, E, self.query_width + 1)
        places_LEV = self.view_places[:, None].expand(L, E, V)
        return everywhere_LEQ.scatter(2, places_LEV, self.expert_keys)[..., : self.query_width]

    def extra_repr(self) -> str:
        """What it reads and how it routes."""
        return f"width={self.width}, active_layers={self.active_layers}, {self.config}"

    def __getstate__(self) -> dict:
        """Copies and pickles start without what the last pass left."""
        return {**super().__getstate__(), "_routing": None, "_record": None, "_offsets": {}}


@dataclass(frozen=True, kw_only=True)
class TokenGates:
    """The gates of each token: those of its sample."""

    gates_LkN: Tensor
    chosen_LkN: Tensor


def for_tokens(
    routing: Routing, x: Tensor, num_layers: int, offsets: Tensor | None = None
) -> TokenGates:
    """Give every token of ``x`` the routing of its sample.

    Args:
        routing: Of the samples.
        x: ``(B, ..., D)``; or, with offsets, ``(N, D)``: the tokens of all samples in one list.
        num_layers: Expert layers that compute.
        offsets: ``(B + 1,)``, where in that list each sample's tokens begin.

    Raises:
        ValueError: If ``x`` has neither the router's number of samples nor, as far as is known,
            their tokens.
    """
    gates_LkB, chosen_LkB = routing.gates_LkN[:num_layers], routing.chosen_LkN[:num_layers]
    samples = gates_LkB.shape[2]
    if offsets is not None:
        lengths_B = offsets[1:] - offsets[:-1]
        sample_B = torch.arange(samples, device=x.device)
        sample_N = torch.repeat_interleave(sample_B, lengths_B, output_size=x.shape[0])
        return TokenGates(
            gates_LkN=gates_LkB.index_select(2, sample_N),
            chosen_LkN=chosen_LkB.index_select(2, sample_N),
        )
    if x.dim() < 2 or x.shape[0] != samples:
        raise ValueError(
            f"SampleRouter: {samples} samples were routed, but a site's input has shape "
            f"{tuple(x.shape)}; its first dimension must be the samples. Give the site rows per "
            "sample, say whose its tokens are (share_routing's tokens), or let it route its own "
            "rows."
        )
    tokens = x.shape[1:-1].numel()
    if tokens == 1:
        return TokenGates(gates_LkN=gates_LkB, chosen_LkN=chosen_LkB)
    return TokenGates(
        gates_LkN=gates_LkB.repeat_interleave(tokens, dim=2),
        chosen_LkN=chosen_LkB.repeat_interleave(tokens, dim=2),
    )


def checked(query_BD: Tensor, width: int) -> Tensor:
    """Return the query if a router of this width can take it."""
    if query_BD.dim() != 2 or query_BD.shape[1] != width:
        raise ValueError(
            f"SampleRouter.width is {width}, but the query's shape is {tuple(query_BD.shape)}; it "
            f"must be (samples, {width}). Name another module as the query, or build the router "
            "with its width."
        )
    return query_BD
