"""A linear map that carries stacked layers of routed rank-1 experts.

Shape legend:
    N  rows (tokens or samples)     D  input width     O  output width    Q  query width
    L  expert layers                E  experts         R  rank
    M  experts of all active layers, L E               H  their down-vectors, L E R
"""

import math
from typing import Self

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.function import hilomoe, mix_rows, SiteOutput
from torchrec_hilomoe.hilomoe.losses import RoutingRecord
from torchrec_hilomoe.hilomoe.plan import plan_for
from torchrec_hilomoe.hilomoe.queries import rms_norm
from torchrec_hilomoe.hilomoe.router import for_tokens, SampleRouter

__all__ = ["HiLoMoELinear"]

# Opaque to FX: they ask for shapes, dtypes or the process group, which a proxy does not have.
for _name in ("checked", "for_tokens", "hilomoe", "mix_rows", "rms_norm", "unflattened"):
    torch.fx.wrap(_name)


class HiLoMoELinear(nn.Module):
    r"""``nn.Linear`` plus ``L`` layers of ``E`` experts, each an outer product of two vectors.

    .. math:: y = x W^T + b + \alpha \sum_l \sum_e g_{l,e} \sum_r B_{l,e,r} (A_{l,e,r} \cdot x)

    A layer's gates ``g`` come from a softmax over its keys; its query is that of the layer before,
    moved by the scores found there. ``L`` layers of ``E`` experts give a row ``E**L`` compositions
    for the work of ``L E`` rank-1 products. The up-vectors ``B`` start at zero, so a fresh module
    computes exactly its base linear map.

    In training, the auxiliary losses reach the routing through the output's own gradient, so the
    host adds nothing to its loss; see `torchrec_hilomoe.hilomoe.losses`.

    Args:
        in_features: ``D``.
        out_features: ``O``.
        config: Options, shared by all sites of a model.
        bias: Whether the base map has a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - ``x``: ``(..., D)``
        - returns ``(..., O)``

    Attributes:
        active_layers: How many expert layers compute, 0 to ``L``; 0 is exactly ``nn.Linear``.
        auxiliary_scale: Factor on the auxiliary loss's gradient; set for a whole model by
            ``set_auxiliary_loss_scale``.
        plan: How it computes, decided when it was built.

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
    ) -> None:
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width < 1:
                raise ValueError(
                    f"HiLoMoELinear.{name} must be at least 1, got {width}. "
                    "Experts need vectors to work on."
                )
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.plan = plan_for(config, in_features)
        L, E, R = config.num_layers, config.num_experts, config.rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.expert_in = parameter(L, E, R, in_features)
        self.expert_out = parameter(L, E, R, out_features)
        if not config.tie_keys:
            self.expert_keys = parameter(L, E, config.query_dim or in_features)
        if config.query_dim is not None:
            self.query_proj = parameter(config.query_dim, in_features)
        self.auxiliary_scale = 1.0
        self._record: RoutingRecord | None = None
        self._shared: tuple[SampleRouter] | None = None  # not registered: its owner has it
        self._tokens: str | None = None
        self._active_layers = L
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: HiLoMoEConfig) -> Self:
        """Put fresh experts on an existing map, whose very parameters become the site's."""
        weight = linear.weight
        site = cls(
            linear.in_features,
            linear.out_features,
            config,
            bias=linear.bias is not None,
            device=torch.device("meta"),  # draws no random numbers for a base that is not used
            dtype=weight.dtype,
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
        if self._shared is not None:
            self._shared[0].active_layers = layers

    @property
    def shared_router(self) -> SampleRouter | None:
        """What routes this site by sample; None if it routes its own rows."""
        return None if self._shared is None else self._shared[0]

    def share(self, router: SampleRouter, owner: bool, tokens: str | None = None) -> None:
        """Leave the routing to a router that several sites share; one of them owns it.

        ``tokens`` names the module that the router hears of whose the site's tokens are, where
        its inputs are the tokens of all samples in one list.
        """
        for name in self.routing_parameters():
            delattr(self, name)
        if owner:
            self.router = router
        self._shared, self._tokens = (router,), tokens

    @property
    def routing_record(self) -> RoutingRecord | None:
        """What the last training forward has left for its losses; None before there was one."""
        return self._record if self._shared is None else self._shared[0].routing_record

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

        Tied keys stay, being the experts' down-vectors; a shared router resets itself.
        """
        if self._shared is not None:
            return
        if not self.config.tie_keys:
            nn.init.normal_(self.expert_keys, generator=generator)
            if self.config.num_experts > 1:
                with torch.no_grad():
                    self.expert_keys -= self.expert_keys.mean(dim=1, keepdim=True)
        if self.config.query_dim is not None:
            std = 1 / math.sqrt(self.in_features)
            nn.init.normal_(self.query_proj, std=std, generator=generator)

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that ``nn.Linear`` does not have, by name."""
        base = ("weight", "bias")
        return {name: p for name, p in self.named_parameters() if name not in base}

    def routing_parameters(self) -> dict[str, nn.Parameter]:
        """Those that do nothing but route, by name; none of them if keys are tied."""
        own = ("weight", "bias", "expert_in", "expert_out")
        return {name: p for name, p in self.named_parameters() if name not in own}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map and its active experts; shapes are in the class docstring."""
        if self._active_layers == 0:
            return F.linear(x, self.weight, self.bias)
        x = checked(x, self.in_features)
        x_ND = x.reshape(-1, self.in_features)
        if self._shared is None:
            return unflattened(self.compute(x_ND).y_NO, x)
        router = self._shared[0]
        chosen = for_tokens(router.routing, x, self._active_layers, router.offsets(self._tokens))
        y_NO = mix_rows(
            x_ND,
            self.weight,
            self.bias,
            self._active(self.expert_in),
            self._active(self.expert_out),
            chosen.gates_LkN,
            chosen.chosen_LkN,
            self.config,
            self.plan,
        )
        return unflattened(y_NO, x)

    def compute(self, x_ND: Tensor) -> SiteOutput:
        """Apply the map to rows, and tell how they were routed; not for a shared router."""
        config = self.config
        query_NQ = None
        if config.query_dim is not None or config.query_norm:
            query_NQ = x_ND.detach() if config.stop_gradient == "query" else x_ND
            if config.query_dim is not None:
                query_NQ = F.linear(query_NQ, self.query_proj)
            if config.query_norm:
                query_NQ = rms_norm(query_NQ)
        scale = self.auxiliary_scale
        weights = (config.balance_weight * scale, config.z_weight * scale)
        losing = self.training and torch.is_grad_enabled() and weights != (0.0, 0.0)
        out = hilomoe(
            x_ND,
            query_NQ,
            self.weight,
            self.bias,
            self._active(self.expert_in),
            self._active(self.expert_out),
            None if config.tie_keys else self._active(self.expert_keys),
            config,
            self.plan,
            weights if losing else None,
        )
        if losing and isinstance(out, SiteOutput):  # an FX proxy is no value to keep
            assert out.counts_LE is not None
            self._record = RoutingRecord(
                counts_LE=out.counts_LE,
                scores_LEN=out.routing.scores_LEN,
                logsumexp_LN=out.routing.logsumexp_LN,
                top_k=config.top_k,
            )
        return out

    def _active(self, parameter: Tensor) -> Tensor:
        """The vectors of all experts that compute, one below the other."""
        if self._active_layers < self.config.num_layers:
            parameter = parameter[: self._active_layers]
        return parameter.flatten(0, -2)

    def extra_repr(self) -> str:
        """Sizes and options, as ``nn.Linear`` prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, active_layers={self._active_layers}, {self.config}"
        )

    def __getstate__(self) -> dict:
        """Copies and pickles start without the last pass's losses."""
        return {**super().__getstate__(), "_record": None}


def checked(x: Tensor, in_features: int) -> Tensor:
    """Return ``x`` if a site of this width can take it."""
    if x.shape[-1] != in_features:
        raise ValueError(
            f"HiLoMoELinear.in_features is {in_features}, but the input's last dimension is "
            f"{x.shape[-1]}. Build the site with in_features={x.shape[-1]}."
        )
    if not x.is_floating_point():
        raise ValueError(
            f"HiLoMoELinear takes a floating-point input, got {x.dtype}. "
            "Embed or convert it first, for example with x.float()."
        )
    return x


def unflattened(y_NO: Tensor, x: Tensor) -> Tensor:
    """Give rows back the leading dimensions of the input."""
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[1])
