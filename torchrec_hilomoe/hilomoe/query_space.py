"""Hierarchical routing in query space, for many experts on a narrow query.

Layer ``l`` moves the query by its own keys, ``q_{l+1} = q_l + p_l K_l``, and every layer compares
with the query as it finds it: ``2 L - 1`` products of ``E Q`` numbers a row, where `routing` needs
``L`` of these and ``L (L - 1) / 2`` of ``E E``. Gates (``query_update="selected"``) move it by
the chosen keys alone.

Shape legend: as in `routing`. The query is stored with its rows last, too.
"""

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.experts import Gathered
from torchrec_hilomoe.hilomoe.losses import choice_counts
from torchrec_hilomoe.hilomoe.routing import (
    add_direct,
    decided,
    largest,
    losses_of,
    score,
    score_backward,
    Scored,
    ScoreGradients,
    to_logits,
    wide,
)

__all__ = ["score_by", "score_by_backward"]


def score_by(space: str, q_NQ: Tensor, keys_MQ: Tensor, config: HiLoMoEConfig) -> Scored:
    """Route rows by their query, in the space that the site's plan names."""
    if space == "scores":
        return score(q_NQ, keys_MQ, config)
    E, k, M = config.num_experts, config.top_k, len(keys_MQ)
    keys_MQ, q_QN = wide(keys_MQ), wide(q_NQ).t()
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    logits_MN = q_QN.new_empty(M, len(q_NQ))
    scores_MN = torch.empty_like(logits_MN)
    moved = []
    for at in range(0, M, E):
        here = slice(at, at + E)
        logits_MN[here] = scaled_MQ[here] @ q_QN
        torch.softmax(logits_MN[here], dim=0, out=scores_MN[here])
        if at + E < M:
            if config.query_update == "soft":
                q_QN = torch.addmm(q_QN, keys_MQ[here].t(), scores_MN[here])
            else:
                chosen_kN = largest(logits_MN[here].unsqueeze(0), k).squeeze(0)
                gates_Nk = Gathered.layout(scores_MN[here].gather(0, chosen_kN))
                q_NQ = q_QN.t().contiguous()
                chosen = Gathered(Gathered.indices(chosen_kN))
                q_QN = chosen.add(q_NQ.clone(), gates_Nk, keys_MQ[here]).t().contiguous()
            moved.append(q_QN)
    routing = decided(logits_MN, scores_MN, config)
    counts_LE = choice_counts(routing.chosen_LkN, E).to(q_QN.dtype)
    memory = torch.stack(moved) if moved else q_QN[:0]
    return Scored(routing=routing, memory=memory, counts_LE=counts_LE)


def score_by_backward(
    space: str,
    grad_gates_LkN: Tensor,
    q_NQ: Tensor,
    keys_MQ: Tensor,
    scored: Scored,
    config: HiLoMoEConfig,
    loss_weights: tuple[float, float] | None,
) -> ScoreGradients:
    """From the gates to keys and query, along the way that the query was moved."""
    if space == "scores":
        return score_backward(grad_gates_LkN, q_NQ, keys_MQ, scored, config, loss_weights)
    E, scale, dtype = config.num_experts, q_NQ.shape[1] ** -0.5, q_NQ.dtype
    routing, loss = scored.routing, losses_of(scored, config, loss_weights)
    keys_MQ, first_QN = wide(keys_MQ), wide(q_NQ).t()
    grad_keys_MQ = torch.zeros_like(keys_MQ)
    grad_QN: Tensor | None = None  # by the query of the layer after
    for layer in reversed(range(len(routing.scores_LEN))):
        here, only = slice(layer * E, (layer + 1) * E), slice(layer, layer + 1)
        scores_EN, chosen_LkN = routing.scores_LEN[layer], routing.chosen_LkN[only]
        grad_gates_kN = grad_gates_LkN[only]
        grad_1EN = torch.zeros_like(routing.scores_LEN[only])
        if grad_QN is not None:
            passes = config.stop_gradient != "scores"
            if config.query_update == "soft":
                grad_keys_MQ[here] += scores_EN @ grad_QN.t()
                if passes:
                    grad_1EN[0].addmm_(keys_MQ[here], grad_QN)
            else:
                grad_NQ = grad_QN.t().contiguous()
                chosen = Gathered(Gathered.indices(chosen_LkN[0]))
                gates_Nk = Gathered.layout(routing.gates_LkN[layer])
                grad_keys_MQ[here] += chosen.grad(grad_NQ, gates_Nk, E)
                if passes:
                    passed_kN = Gathered.layout(chosen.dot(grad_NQ, keys_MQ[here]))
                    grad_gates_kN = grad_gates_kN + passed_kN
        add_direct(grad_1EN, chosen_LkN, grad_gates_kN, loss, layer)
        grad_EN = grad_1EN[0]
        pull_N = None if loss is None else routing.logsumexp_LN[layer] * (2 * loss.z)
        to_logits(grad_EN, scores_EN, pull_N)
        q_QN = scored.memory[layer - 1] if layer else first_QN
        grad_keys_MQ[here] += (grad_EN @ q_QN.t()) * scale
        scaled_QE = keys_MQ[here].t() * scale
        grad_QN = scaled_QE @ grad_EN if grad_QN is None else grad_QN.addmm_(scaled_QE, grad_EN)
    assert grad_QN is not None
    return ScoreGradients(keys_MQ=grad_keys_MQ.to(dtype), query_QN=grad_QN.to(dtype))
