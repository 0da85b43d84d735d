"""Slow, obvious definitions. Tests and benchmarks trust these and nothing else.

Plain loops over rows, layers and experts, in whatever dtype the tensors have; production code
never imports this file.

Shape legend:
    N  rows (tokens or samples)     D  input width     O  output width    Q  query width
    L  expert layers                E  experts         R  rank            k  experts chosen
    C  width of what a row is routed by, D unless a router is shared
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = ["Losses", "Output", "choose", "hilomoe_linear", "losses", "rms_norm"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a site computes from ``N`` rows, with everything on the way.

    Attributes:
        y_NO: The rows' outputs.
        logits_NLE: Logits of every layer.
        scores_NLE: Their softmax.
        gates_NLE: The scores of the chosen experts, zero elsewhere.
        chosen_NLE: True where a row chose an expert.
    """

    y_NO: Tensor
    logits_NLE: Tensor
    scores_NLE: Tensor
    gates_NLE: Tensor
    chosen_NLE: Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The auxiliary losses of each layer, unweighted, and their weighted mean."""

    balance_L: Tensor
    z_L: Tensor
    total: Tensor


def hilomoe_linear(
    x_ND: Tensor,
    params: Mapping[str, Tensor],
    config: HiLoMoEConfig,
    active_layers: int | None = None,
    chosen_NLE: Tensor | None = None,
    source_NC: Tensor | None = None,
) -> Output:
    """The equations of a site, one row and one expert at a time.

    Args:
        x_ND: Rows.
        params: The parameters of ``HiLoMoELinear`` by their names.
        config: The site's options.
        active_layers: Layers that compute; None means all.
        chosen_NLE: Experts to use instead of each row's best ones. In low precision near-ties may
            fall either way; with the choice given, what is left is a smooth function.
        source_NC: What each row is routed by, if not by itself: its sample's tensor, where sites
            share a router.
    """
    L = config.num_layers if active_layers is None else active_layers
    keys_LEQ = params["expert_in"].squeeze(2) if config.tie_keys else params["expert_keys"]
    rows: list[dict[str, Tensor]] = []
    for n, x_D in enumerate(x_ND):
        y_O = params["weight"] @ x_D
        if "bias" in params:
            y_O = y_O + params["bias"]
        source_C = x_D if source_NC is None else source_NC[n]
        q_Q = source_C.detach() if config.stop_gradient == "query" else source_C
        if config.query_dim is not None:
            q_Q = params["query_proj"] @ q_Q
        if config.query_norm:
            q_Q = rms_norm(q_Q)
        steps: dict[str, list[Tensor]] = {"logits": [], "scores": [], "gates": [], "chosen": []}
        for layer in range(L):
            K_EQ = keys_LEQ[layer]
            logits_E = torch.stack([q_Q @ k_Q for k_Q in K_EQ]) / math.sqrt(len(q_Q))
            scores_E = (logits_E - logits_E.max()).exp()
            scores_E = scores_E / scores_E.sum()
            given_E = None if chosen_NLE is None else chosen_NLE[n, layer]
            chosen_E = choose(logits_E, config.top_k) if given_E is None else given_E
            gates_E = torch.where(chosen_E, scores_E, torch.zeros_like(scores_E))
            for e in range(config.num_experts):
                for r in range(config.rank):
                    a_D = params["expert_in"][layer, e, r]
                    b_O = params["expert_out"][layer, e, r]
                    y_O = y_O + config.alpha * gates_E[e] * b_O * (a_D @ x_D)
            passed_E = scores_E if config.query_update == "soft" else gates_E
            if config.stop_gradient == "scores":
                passed_E = passed_E.detach()
            for p, k_Q in zip(passed_E, K_EQ, strict=True):
                q_Q = q_Q + p * k_Q
            for name, value in zip(steps, (logits_E, scores_E, gates_E, chosen_E), strict=True):
                steps[name].append(value)
        rows.append({"y": y_O, **{name: _stack(layers, x_D) for name, layers in steps.items()}})

    def column(name: str) -> Tensor:
        return torch.stack([row[name] for row in rows])

    return Output(
        y_NO=column("y"),
        logits_NLE=column("logits"),
        scores_NLE=column("scores"),
        gates_NLE=column("gates"),
        chosen_NLE=column("chosen"),
    )


def choose(logits_E: Tensor, k: int) -> Tensor:
    """Mark the ``k`` largest logits; of equal ones, the first.

    Softmax is strictly increasing, so the largest logits are the largest scores. They are compared
    before it, because rounding can make different logits equal scores.
    """
    chosen_E = torch.zeros_like(logits_E, dtype=torch.bool)
    values = logits_E.tolist()
    for e in sorted(range(len(values)), key=lambda e: -values[e])[:k]:
        chosen_E[e] = True
    return chosen_E


def rms_norm(q_Q: Tensor) -> Tensor:
    """Divide by the root mean square, as ``torch.nn.functional.rms_norm`` does by default."""
    wide = torch.float64 if q_Q.dtype == torch.float64 else torch.float32
    return q_Q / (q_Q.square().mean() + torch.finfo(wide).eps).sqrt()


def losses(out: Output, config: HiLoMoEConfig) -> Losses:
    """The auxiliary losses over all rows of ``out``, which must be the global batch."""
    N, L, E = out.scores_NLE.shape
    balances, zs = [], []
    for layer in range(L):
        balance = torch.zeros((), dtype=out.scores_NLE.dtype)
        for e in range(E):
            share = out.chosen_NLE[:, layer, e].to(balance.dtype).sum() / N
            balance = balance + share * out.scores_NLE[:, layer, e].sum() / N
        balances.append(balance * E / config.top_k)
        z = torch.zeros((), dtype=out.scores_NLE.dtype)
        for n in range(N):
            z = z + torch.logsumexp(out.logits_NLE[n, layer], dim=0) ** 2
        zs.append(z / N)
    balance_L, z_L = torch.stack(balances), torch.stack(zs)
    total = (config.balance_weight * balance_L + config.z_weight * z_L).sum() / L
    return Losses(balance_L=balance_L, z_L=z_L, total=total)


def _stack(layers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(layers) if layers else like.new_zeros(0)
