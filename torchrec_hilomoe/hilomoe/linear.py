"""A linear map that carries stacked layers of routed rank-1 experts.

Shape legend:
    N  rows (tokens or samples)     D  input width     O  output width    Q  query width
    L  expert layers                E  experts         R  rank
    M  experts of all active layers, L E               H  their down-vectors, L E R
"""

import math
from collections.abc import Sequence
from typing import NoReturn, Self

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.dispatch import refuse_torchscript
from torchrec_hilomoe.hilomoe.execution import execution_for
from torchrec_hilomoe.hilomoe.function import hilomoe, mix_rows, record_of, SiteOutput
from torchrec_hilomoe.hilomoe.losses import loss_weights, RoutingRecord
from torchrec_hilomoe.hilomoe.ranks import RankGroup
from torchrec_hilomoe.hilomoe.router import SampleRouter

__all__ = ["ROUTING", "HiLoMoELinear", "is_of_experts"]

EXPERTS = ("expert_in", "expert_out", "expert_keys", "query_proj")
ROUTING = ("expert_keys", "query_proj")

# Opaque to FX: they ask for shapes and dtypes, which a proxy does not have.
torch.fx.wrap("hilomoe")
torch.fx.wrap("mix_rows")


class HiLoMoELinear(nn.Module):
    r"""``nn.Linear`` plus ``L`` layers of ``E`` experts, each an outer product of two vectors.

    .. math:: y = x W^T + b + \alpha \sum_l \sum_e g_{l,e} \sum_r B_{l,e,r} (A_{l,e,r} \cdot x)

    A layer's gates ``g`` come from a softmax over its keys; its query is that of the layer before,
    moved by the scores found there. The keys are the site's own, and each row is routed by itself;
    or a router is given, which decides for whole samples. ``L`` layers of ``E`` experts give a row
    ``E**L`` compositions for the work of ``L E`` rank-1 products. The up-vectors ``B`` start at
    zero, so a fresh module computes exactly its base linear map.

    In training, the auxiliary losses reach the routing through the output's own gradient, so the
    host adds nothing to its loss; see `torchrec_hilomoe.hilomoe.losses`.

    Args:
        in_features: ``D``.
        out_features: ``O``.
        config: Options, shared by all sites of a model.
        bias: Whether the base map has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        router: Routes this site and others by sample; None lets the site route its own rows. The
            model registers it, not the site: see ``inject_shared_router``.

    Shape:
        - ``x``: ``(..., D)``
        - returns ``(..., O)``

    Attributes:
        active_layers: How many expert layers compute, 0 to ``L``; 0 is exactly ``nn.Linear``.
        auxiliary_scale: Factor on the auxiliary loss's gradient; set for a whole model by
            ``set_auxiliary_loss_scale``.
        scale_is_told: Whether the host has called that.
        group: Over which ranks that loss is; set for a whole model by ``set_process_group``.
        execution: How it computes, decided when it was built.
        has_run: Set by each forward, for who wants to know whether the host calls the site.
        tokens: With a given router, the module that the router hears of whose the site's tokens
            are, where its inputs are the tokens of all samples in one list; else None.

    Example:
        >>> site = HiLoMoELinear(16, 4, HiLoMoEConfig(num_layers=2, num_experts=4))
        >>> site(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HiLoMoEConfig,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        router: SampleRouter | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width < 1:
                raise ValueError(
                    f"HiLoMoELinear.{name} must be at least 1, got {width}. "
                    "Experts need vectors to work on."
                )
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.execution = execution_for(config, in_features)
        L, E, R = config.num_layers, config.num_experts, config.rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.expert_in = parameter(L, E, R, in_features)
        self.expert_out = parameter(L, E, R, out_features)
        if router is None and not config.tie_keys:
            self.expert_keys = parameter(L, E, config.query_dim or in_features)
        if router is None and config.query_dim is not None:
            self.query_proj = parameter(config.query_dim, in_features)
        self.auxiliary_scale = 1.0
        self.scale_is_told = False
        self.group: RankGroup | None = None
        self.has_run = False
        self.tokens: str | None = None
        self._given = () if router is None else (router,)  # a tuple, so that it is not registered
        self._record: RoutingRecord | None = None
        self._active_layers = L
        self._count = None if router is None else router.count(L)  # the router holds it weakly
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: HiLoMoEConfig, router: SampleRouter | None = None
    ) -> Self:
        """Put fresh experts on an existing map, whose very parameters become the site's."""
        weight = linear.weight
        site = cls(
            linear.in_features,
            linear.out_features,
            config,
            bias=linear.bias is not None,
            device=torch.device("meta"),  # draws no random numbers for a base that is not used
            dtype=weight.dtype,
            router=router,
        )
        experts = site.expert_parameters()
        for name, parameter in experts.items():
            setattr(site, name, nn.Parameter(torch.empty_like(parameter, device=weight.device)))
        site.weight, site.bias = weight, linear.bias
        site.reset_experts()
        return site.train(linear.training)

    @property
    def active_layers(self) -> int:
        """How many expert layers compute, counted from the first; 0 is exactly ``nn.Linear``."""
        return self._active_layers

    @active_layers.setter
    def active_layers(self, layers: int) -> None:
        if not 0 <= layers <= self.config.num_layers:
            raise ValueError(
                f"HiLoMoELinear.active_layers must lie between 0 and num_layers = "
                f"{self.config.num_layers}, got {layers}. Build the site with more layers."
            )
        self._active_layers = layers
        self._record = None
        if self.router is not None:  # which computes what the other sites need, too
            self._count = self.router.count(layers)

    @property
    def router(self) -> SampleRouter | None:
        """The router that it was given; None if it routes its own rows."""
        return self._given[0] if self._given else None

    @property
    def routing_record(self) -> RoutingRecord | None:
        """What the last training forward has left for its losses; None before there was one."""
        return self._record if self.router is None else self.router.routing_record

    def reset_parameters(self) -> None:
        """Start as ``nn.Linear`` does, with experts that add exactly nothing."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_experts()

    def reset_experts(self) -> None:
        """Start with up-vectors of zero, so that the experts add exactly nothing.

        Down-vectors keep the size of a normalised input, keys spread its logits by about one. The
        keys of a layer sum to zero: an undecided layer then leaves the query where it is, instead
        of pushing all rows to the same experts of the next layer.
        """
        nn.init.normal_(self.expert_in, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.expert_out)
        self.reset_routing()

    def reset_routing(self, generator: torch.Generator | None = None) -> None:
        """Draw keys and query projection anew.

        Tied keys stay, being the experts' down-vectors; a given router resets itself.
        """
        config = self.config
        if self.router is not None:
            # As many numbers as for keys of its own: a seed then starts the experts alike whoever
            # routes them, and what differs between two such runs is the routing.
            like, Q = self.expert_in, config.query_dim or self.in_features
            like.new_empty(config.num_layers, config.num_experts, Q).normal_(generator=generator)
            if config.query_dim is not None:
                like.new_empty(config.query_dim, self.in_features).normal_(generator=generator)
            return
        if not config.tie_keys:
            nn.init.normal_(self.expert_keys, generator=generator)
            if config.num_experts > 1:
                with torch.no_grad():
                    self.expert_keys -= self.expert_keys.mean(dim=1, keepdim=True)
        if config.query_dim is not None:
            std = 1 / math.sqrt(self.in_features)
            nn.init.normal_(self.query_proj, std=std, generator=generator)

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Those that ``nn.Linear`` does not have, by name."""
        return {name: p for name, p in self.named_parameters() if is_of_experts(name)}

    def keys_LEQ(self) -> Tensor:
        """Of all layers, of a site that routes its own rows."""
        return self.expert_in.flatten(1, 2) if self.config.tie_keys else self.expert_keys

    def routing_parameters(self) -> dict[str, nn.Parameter]:
        """Those that do nothing but route, by name; none of them if keys are tied."""
        return {name: p for name, p in self.named_parameters() if _stands_for(name, ROUTING)}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map and its active experts; shapes are in the class docstring.

        Raises:
            NotImplementedError: In ``torch.jit.trace``.
        """
        if torch.jit.is_tracing():
            refuse_torchscript()
        self.has_run = True
        if not isinstance(x, Tensor):  # TorchRec's awaitable, for which PyTorch's functions wait
            x = torch.atleast_1d(x)
        if self._active_layers == 0:
            return F.linear(x, self.weight, self.bias)
        router = self.router
        if router is None:
            return self.compute(x).y
        y = mix_rows(
            x,
            self.weight,
            self.bias,
            self._active(self.expert_in),
            self._active(self.expert_out),
            router.routing(),
            router.offsets(self.tokens),
            self.config,
            self.execution,
        )
        return router.anchor(y)

    def compute(self, x: Tensor) -> SiteOutput:
        """Apply the map, and tell how the input's rows were routed; not for a given router."""
        config = self.config
        out = hilomoe(
            x,
            self.weight,
            self.bias,
            self._active(self.expert_in),
            self._active(self.expert_out),
            None if config.tie_keys else self._active(self.expert_keys),
            None if config.query_dim is None else self.query_proj,
            config,
            self.execution,
            loss_weights(config, self.auxiliary_scale, self.group) if self.training else None,
            self.group,
        )
        if (record := record_of(out.counts_LE, out.routing, config, self.group)) is not None:
            self._record = record
        return out

    def _active(self, parameter: Tensor) -> Tensor:
        """That of the layers that compute."""
        if self._active_layers < self.config.num_layers:
            return parameter[: self._active_layers]
        return parameter

    def extra_repr(self) -> str:
        """Sizes and options, as ``nn.Linear`` prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, active_layers={self._active_layers}, {self.config}"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` asks for."""
        refuse_torchscript()

    def __getstate__(self) -> dict:
        """Copies and pickles start without the last pass's losses."""
        return {**super().__getstate__(), "_record": None}


def is_of_experts(name: str) -> bool:
    """Whether a site's parameter is the experts', also under a reparametrization's name for it."""
    return _stands_for(name, EXPERTS)


def _stands_for(name: str, parameters: Sequence[str]) -> bool:
    return any(
        name == own or name.startswith((f"{own}_", f"parametrizations.{own}."))
        for own in parameters
    )
