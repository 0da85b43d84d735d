"""Hierarchical routing in score space: every layer's choice from one product over the input.

Layer ``l`` compares its keys with a query that the layers before it have moved,
``q_l = q_1 + sum_{j<l} p_j K_j``, where ``p_j`` are the scores layer ``j`` passes on. Nothing wider
than ``E`` needs to be moved, because the comparison is linear in the query:

    q_l K_l^T = q_1 K_l^T + sum_{j<l} p_j (K_j K_l^T)

The first terms of all layers are columns of one product over the input (the *direct* logits); the
second are products of ``E``-vectors with blocks of the keys' Gram matrix.

Shape legend:
    N  rows     Q  query width     L  expert layers     E  experts     M  experts of all layers
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = ["Routing", "inverse_rms", "route", "select", "wide"]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the layers of a site decided for ``N`` rows, one ``(N, E)`` tensor a layer.

    Attributes:
        logits: Scaled logits.
        scores: Their softmax.
        gates: The scores of the chosen experts, zero elsewhere.
        chosen: True where a row chose an expert.
    """

    logits: list[Tensor]
    scores: list[Tensor]
    gates: list[Tensor]
    chosen: list[Tensor]


def route(
    direct_NM: Tensor, keys_MQ: Tensor, config: HiLoMoEConfig, num_layers: int, query_dim: int
) -> Routing:
    """Run the layers' recursion over scores.

    Args:
        direct_NM: ``q_1 K_l^T`` of all layers side by side, unscaled.
        keys_MQ: Keys of all layers, one below the other.
        config: The site's options.
        num_layers: ``L``; sizes are arguments because a traced tensor does not tell them.
        query_dim: ``Q``.
    """
    E, scale = config.num_experts, query_dim**-0.5
    gram_MM = exact_product(keys_MQ, keys_MQ.t()) * scale
    routing = Routing(logits=[], scores=[], gates=[], chosen=[])
    passed: list[Tensor] = []
    for layer in range(num_layers):
        here = slice(layer * E, (layer + 1) * E)
        logits_NE = direct_NM[:, here] * scale
        for before, passed_NE in enumerate(passed):
            gram_EE = gram_MM[before * E : (before + 1) * E, here]
            logits_NE = logits_NE + exact_product(passed_NE, gram_EE)
        scores_NE = torch.softmax(logits_NE, dim=1)
        chosen_NE = select(logits_NE, config.top_k)
        gates_NE = torch.where(chosen_NE, scores_NE, 0.0)
        passed_NE = scores_NE if config.query_update == "soft" else gates_NE
        passed.append(passed_NE.detach() if config.stop_gradient == "scores" else passed_NE)
        routing.logits.append(logits_NE)
        routing.scores.append(scores_NE)
        routing.gates.append(gates_NE)
        routing.chosen.append(chosen_NE)
    return routing


def select(logits_NE: Tensor, k: int) -> Tensor:
    """Mark each row's ``k`` largest logits; of equal ones, the first.

    Softmax is strictly increasing, so these are the ``k`` largest scores. Logits are compared
    because rounding can make different logits equal scores.
    """
    logits_NE = logits_NE.detach()
    if k == 1:
        best_Nk = logits_NE.argmax(dim=1, keepdim=True)
    else:
        best_Nk = logits_NE.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, best_Nk, True)


@torch.fx.wrap
def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype they have, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def wide(t: Tensor) -> Tensor:
    """At least float32: logits are compared, and half precision cannot hold sums of them."""
    return t if t.dtype == torch.float64 else t.float()


def inverse_rms(q_NQ: Tensor) -> Tensor:
    """One over each row's root mean square, as ``rms_norm`` divides by default; ``(N, 1)``."""
    q_NQ = wide(q_NQ)
    return (q_NQ.square().mean(dim=1, keepdim=True) + torch.finfo(q_NQ.dtype).eps).rsqrt()
