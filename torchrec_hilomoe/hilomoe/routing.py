r"""Hierarchical routing in score space: every layer's choice from one product over the input.

Layer ``l`` compares its keys with a query that the layers before it have moved,
``q_l = q_1 + sum_{j<l} p_j K_j``, where ``p_j`` is what layer ``j`` passes on: its scores or its
gates. Nothing wider than ``E`` needs to be moved, because the comparison is linear in the query:

.. math:: q_l K_l^T = q_1 K_l^T + \sum_{j<l} p_j (K_j K_l^T)

The first terms of all layers are rows of one product over the input, the *direct* logits; the
second are products of ``E``-vectors with blocks of the keys' Gram matrix.

With many experts on a narrow query, where ``L E`` is larger than ``2 Q``, moving the query is
cheaper after all (`score_by`): ``2 L - 1`` products of ``E Q`` numbers a row, instead of ``L`` of
these and ``L (L - 1) / 2`` of ``E E``.

Everything is stored with the input's rows last. A step over the experts, such as the largest or
the sum of the scores, is then a step over whole contiguous lines, which a CPU computes up to twenty
times faster than over the many short rows of the other order.

The functions here know nothing of autograd: `function` calls each forward with its backward.

Shape legend:
    N  rows     Q  query width     L  expert layers     E  experts     k  experts chosen
    M  experts of all layers, L E
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.experts import GatheredKernel
from torchrec_hilomoe.hilomoe.losses import choice_counts, loss_gradients, LossGradients, wide

__all__ = [
    "RouteGradients",
    "Routing",
    "ScoreGradients",
    "Scored",
    "add_direct",
    "decided",
    "largest",
    "losses_of",
    "route",
    "route_backward",
    "score",
    "score_backward",
    "score_by",
    "score_by_backward",
    "to_logits",
]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the layers of a site decided for ``N`` rows.

    Attributes:
        gates_LkN: The scores of the chosen experts.
        chosen_LkN: The experts that each row chose in each layer, best first.
        scores_LEN: All scores.
        logsumexp_LN: Of the logits.
    """

    gates_LkN: Tensor
    chosen_LkN: Tensor
    scores_LEN: Tensor
    logsumexp_LN: Tensor


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What scoring found.

    Attributes:
        routing: The decisions.
        memory: What the backward needs besides: the keys' scaled Gram matrix, or the queries of the
            layers but the first.
        counts_LE: Choices of each expert; None in a backward that computes no losses.
    """

    routing: Routing
    memory: Tensor
    counts_LE: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ScoreGradients:
    """By the keys and by the first query, which is the sum of those of its parts that are there.

    Attributes:
        keys_MQ: By the keys.
        direct_MN: By the direct logits; the query's part is its product with the scaled keys.
        scaled_MQ: Those keys.
        query_QN: By the query, where it was moved.
    """

    keys_MQ: Tensor
    direct_MN: Tensor | None = None
    scaled_MQ: Tensor | None = None
    query_QN: Tensor | None = None

    def add_query_to(self, grad_NQ: Tensor) -> Tensor:
        """Add the gradient by the query, in place."""
        if self.query_QN is not None:
            return grad_NQ.add_(self.query_QN.t())
        assert self.direct_MN is not None
        assert self.scaled_MQ is not None
        return grad_NQ.addmm_(self.direct_MN.t(), self.scaled_MQ)


def score(q_NQ: Tensor, keys_MQ: Tensor, config: HiLoMoEConfig) -> Scored:
    """Route rows by their query.

    Keys are scaled before they meet a query, so that logits come scaled out of the product.
    """
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    gram_MM = wide(scaled_MQ) @ wide(keys_MQ).t()
    routing = route(wide(scaled_MQ @ q_NQ.t()), gram_MM, config)
    counts_LE = choice_counts(routing.chosen_LkN, config.num_experts).to(gram_MM.dtype)
    return Scored(routing=routing, memory=gram_MM, counts_LE=counts_LE)


def score_backward(
    grad_gates_LkN: Tensor,
    q_NQ: Tensor,
    keys_MQ: Tensor,
    scored: Scored,
    config: HiLoMoEConfig,
    loss_weights: Sequence[float] | None,
) -> ScoreGradients:
    """From the gates to the direct logits, and through the keys' Gram matrix to the keys."""
    scale = q_NQ.shape[1] ** -0.5
    loss = losses_of(scored, config, loss_weights)
    grads = route_backward(grad_gates_LkN, scored.routing, scored.memory, config, loss)
    direct_MN = grads.direct_MN.to(q_NQ.dtype)
    by_scaled_MQ = ((grads.gram_MM + grads.gram_MM.t()) @ wide(keys_MQ)).to(q_NQ.dtype)
    return ScoreGradients(
        keys_MQ=by_scaled_MQ.addmm_(direct_MN, q_NQ) * scale,
        direct_MN=direct_MN,
        scaled_MQ=keys_MQ * scale,
    )


def losses_of(
    scored: Scored, config: HiLoMoEConfig, loss_weights: Sequence[float] | None
) -> LossGradients | None:
    """The gradient of the auxiliary losses, if there are any."""
    if loss_weights is None:
        return None
    assert scored.counts_LE is not None
    rows = scored.routing.gates_LkN.shape[2]
    return loss_gradients(scored.counts_LE, rows, config.top_k, loss_weights)


@dataclass(frozen=True, kw_only=True)
class RouteGradients:
    """By the direct logits, and by the Gram matrix."""

    direct_MN: Tensor
    gram_MM: Tensor


def route(direct_MN: Tensor, gram_MM: Tensor, config: HiLoMoEConfig) -> Routing:
    """Run the layers' recursion over scores.

    Args:
        direct_MN: The scaled ``q_1 K_l^T`` of all layers, one below the other; overwritten.
        gram_MM: The scaled products of all keys with all keys.
        config: The site's options.
    """
    E, selected = config.num_experts, config.query_update == "selected"
    logits_MN, scores_MN = direct_MN, torch.empty_like(direct_MN)
    passed_MN = torch.zeros_like(direct_MN) if selected else scores_MN
    for at in range(0, len(direct_MN), E):
        here = slice(at, at + E)
        logits_EN = logits_MN[here]
        if at:
            logits_EN.addmm_(gram_MM[here, :at], passed_MN[:at])
        torch.softmax(logits_EN, dim=0, out=scores_MN[here])
        if selected:
            chosen_kN = largest(logits_EN.unsqueeze(0), config.top_k).squeeze(0)
            passed_MN[here].scatter_(0, chosen_kN, scores_MN[here].gather(0, chosen_kN))
    return decided(logits_MN, scores_MN, config)


def decided(logits_MN: Tensor, scores_MN: Tensor, config: HiLoMoEConfig) -> Routing:
    """The choice of all layers, from their logits and scores."""
    logits_LEN, scores_LEN = (
        t.unflatten(0, (-1, config.num_experts)) for t in (logits_MN, scores_MN)
    )
    chosen_LkN = largest(logits_LEN, config.top_k)
    gates_LkN, best_L1N = scores_LEN.gather(1, chosen_LkN), chosen_LkN[:, :1]
    return Routing(
        gates_LkN=gates_LkN,
        chosen_LkN=chosen_LkN,
        scores_LEN=scores_LEN,
        # log(sum(exp(z))) = z_e - log(s_e) for any e; the best score has not underflown
        logsumexp_LN=logits_LEN.gather(1, best_L1N).squeeze(1) - gates_LkN[:, 0].log(),
    )


def route_backward(
    grad_gates_LkN: Tensor,
    routing: Routing,
    gram_MM: Tensor,
    config: HiLoMoEConfig,
    loss: LossGradients | None,
) -> RouteGradients:
    """Run the recursion backwards, from the scores alone.

    Args:
        grad_gates_LkN: The gradient by the gates.
        routing: What `route` returned.
        gram_MM: What it was given.
        config: The site's options.
        loss: The gradient of the auxiliary losses, which joins here; None without.
    """
    E, selected = config.num_experts, config.query_update == "selected"
    scores_LEN, chosen_LkN = routing.scores_LEN, routing.chosen_LkN
    passed_LEN = scores_LEN
    if selected:
        passed_LEN = torch.zeros_like(scores_LEN).scatter_(1, chosen_LkN, routing.gates_LkN)
    # By the time a layer's turn comes, its lines hold what the output, the losses and later layers
    # want of its scores; in the same place, that becomes the gradient of its logits.
    grad_LEN, grad_gram_MM = torch.zeros_like(scores_LEN), torch.zeros_like(gram_MM)
    grad_MN, passed_MN = grad_LEN.flatten(0, 1), passed_LEN.flatten(0, 1)
    if not selected:
        add_direct(grad_LEN, chosen_LkN, grad_gates_LkN, loss)
    pull_LN = None if loss is None else routing.logsumexp_LN * (2 * loss.z)
    for layer in reversed(range(len(scores_LEN))):
        at, here, only = layer * E, slice(layer * E, (layer + 1) * E), slice(layer, layer + 1)
        grad_EN, scores_EN = grad_LEN[layer], scores_LEN[layer]
        if selected:  # later layers have seen no more than the gates
            passed_on_1kN = grad_LEN[only].gather(1, chosen_LkN[only])
            grad_EN.zero_()
            grad_gates_1kN = grad_gates_LkN[only] + passed_on_1kN
            add_direct(grad_LEN[only], chosen_LkN[only], grad_gates_1kN, loss, layer)
        to_logits(grad_EN, scores_EN, None if pull_LN is None else pull_LN[layer])
        if at:
            grad_gram_MM[here, :at] = grad_EN @ passed_MN[:at].t()
            if config.stop_gradient != "scores":
                grad_MN[:at].addmm_(gram_MM[:at, here], grad_EN)
    return RouteGradients(direct_MN=grad_MN, gram_MM=grad_gram_MM)


def to_logits(grad_EN: Tensor, scores_EN: Tensor, pull_N: Tensor | None) -> None:
    """Turn the gradient by a layer's scores into that by its logits, in place.

    ``pull_N`` is the gradient by the logsumexp, if there is one.
    """
    shift_N = (scores_EN * grad_EN).sum(dim=0)
    if pull_N is not None:
        shift_N -= pull_N
    grad_EN.sub_(shift_N).mul_(scores_EN)


def add_direct(
    grad_LEN: Tensor,
    chosen_LkN: Tensor,
    grad_gates_LkN: Tensor,
    loss: LossGradients | None,
    layer: int | None = None,
) -> None:
    """Add what the gates and the losses want of the scores of all layers, or of one."""
    grad_LEN.scatter_add_(1, chosen_LkN, grad_gates_LkN)
    if loss is not None:
        scores_LE = loss.scores_LE if layer is None else loss.scores_LE[layer : layer + 1]
        grad_LEN += scores_LE.unsqueeze(2)


def largest(logits_LEN: Tensor, k: int) -> Tensor:
    """Find the ``k`` largest logits of each row and layer, best first; of equal ones, the first.

    Softmax is strictly increasing, so these are the ``k`` largest scores. Logits are compared
    because rounding can make different logits equal scores. Nothing but float arithmetic is used:
    on a CPU, argmax over lines is twenty times slower.
    """
    E = logits_LEN.shape[1]
    # Of several best experts, the first has the highest rank.
    rank_E1 = torch.arange(E, 0, -1, device=logits_LEN.device, dtype=logits_LEN.dtype).unsqueeze(1)
    found: list[Tensor] = []
    for _ in range(k):
        if found:
            logits_LEN = logits_LEN.scatter(1, found[-1], -torch.inf)
        best_L1N = logits_LEN.amax(dim=1, keepdim=True)
        is_best_LEN = (logits_LEN - best_L1N).sign_().add_(1)
        index_L1N = E - is_best_LEN.mul_(rank_E1).amax(dim=1, keepdim=True)
        # A row with a NaN chooses anything: its gates are NaN, and so is its output. Infinities are
        # of lanes beyond the last row, whose indices the compiler's kernels for GPUs check as well.
        found.append(index_L1N.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).long())
    return found[0] if k == 1 else torch.cat(found, dim=1)


def score_by(space: str, q_NQ: Tensor, keys_MQ: Tensor, config: HiLoMoEConfig) -> Scored:
    """Route rows by their query, in the space that the site's execution names.

    In query space a layer moves the query by its own keys, ``q_{l+1} = q_l + p_l K_l``, and every
    layer compares with the query as it finds it. Gates (``query_update="selected"``) move it by the
    chosen keys alone. The query is stored with its rows last, too.
    """
    if space == "scores":
        return score(q_NQ, keys_MQ, config)
    E, k, M = config.num_experts, config.top_k, len(keys_MQ)
    keys_MQ, q_QN = wide(keys_MQ), wide(q_NQ).t()
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    logits_MN = q_QN.new_empty(M, q_NQ.shape[0])  # its length would be a constant of an export
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
                gates_Nk = GatheredKernel.layout(scores_MN[here].gather(0, chosen_kN))
                q_NQ = q_QN.t().contiguous()
                chosen = GatheredKernel(GatheredKernel.indices(chosen_kN))
                q_QN = chosen.add(q_NQ.clone(), gates_Nk, keys_MQ[here]).t().contiguous()
            moved.append(q_QN)
    routing = decided(logits_MN, scores_MN, config)
    counts_LE = choice_counts(routing.chosen_LkN, E).to(q_QN.dtype)
    memory = torch.stack(moved) if moved else q_QN.new_empty(0)
    return Scored(routing=routing, memory=memory, counts_LE=counts_LE)


def score_by_backward(
    space: str,
    grad_gates_LkN: Tensor,
    q_NQ: Tensor,
    keys_MQ: Tensor,
    scored: Scored,
    config: HiLoMoEConfig,
    loss_weights: Sequence[float] | None,
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
                chosen = GatheredKernel(GatheredKernel.indices(chosen_LkN[0]))
                gates_Nk = GatheredKernel.layout(routing.gates_LkN[layer])
                grad_keys_MQ[here] += chosen.grad(grad_NQ, gates_Nk, E)
                if passes:
                    passed_kN = GatheredKernel.layout(chosen.dot(grad_NQ, keys_MQ[here]))
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
