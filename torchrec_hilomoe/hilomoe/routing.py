r"""Hierarchical routing in score space: every layer's choice from one product over the input.

Layer ``l`` compares its keys with a query that the layers before it have moved,
``q_l = q_1 + sum_{j<l} p_j K_j``, where ``p_j`` is what layer ``j`` passes on: its scores or its
gates. Nothing wider than ``E`` needs to be moved, because the comparison is linear in the query:

.. math:: q_l K_l^T = q_1 K_l^T + \sum_{j<l} p_j (K_j K_l^T)

The first terms of all layers are rows of one product over the input, the *direct* logits; the
second are products of ``E``-vectors with blocks of the keys' Gram matrix.

Everything is stored with the input's rows last. A step over the experts, such as the largest or
the sum of the scores, is then a step over whole contiguous lines, which a CPU computes up to twenty
times faster than over the many short rows of the other order.

The functions here know nothing of autograd: `function` calls each forward with its backward.

Shape legend:
    N  rows     Q  query width     L  expert layers     E  experts     k  experts chosen
    M  experts of all layers, L E
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.losses import LossGradients

__all__ = ["Routing", "largest", "route", "route_backward", "wide"]


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


def route(direct_MN: Tensor, gram_MM: Tensor, config: HiLoMoEConfig) -> Routing:
    """Run the layers' recursion over scores.

    Args:
        direct_MN: The scaled ``q_1 K_l^T`` of all layers, one below the other.
        gram_MM: The scaled products of all keys with all keys.
        config: The site's options.
    """
    E, k, selected = config.num_experts, config.top_k, config.query_update == "selected"
    scores_MN = torch.empty_like(direct_MN)
    passed_MN = torch.zeros_like(direct_MN) if selected else scores_MN
    rank_E1 = _ranks(E, direct_MN)
    chosen, best_logit = [], []
    for at in range(0, len(direct_MN), E):
        here = slice(at, at + E)
        logits_EN = direct_MN[here]
        if at:
            logits_EN = torch.addmm(logits_EN, gram_MM[here, :at], passed_MN[:at])
        torch.softmax(logits_EN, dim=0, out=scores_MN[here])
        best_logit.append(logits_EN.amax(dim=0, keepdim=True))
        chosen.append(_largest(logits_EN, best_logit[-1], rank_E1, k))
        if selected:
            index_kN = _as_index(chosen[-1])
            passed_MN[here].scatter_(0, index_kN, scores_MN[here].gather(0, index_kN))
    chosen_LkN, scores_LEN = _as_index(torch.stack(chosen)), scores_MN.unflatten(0, (-1, E))
    gates_LkN = scores_LEN.gather(1, chosen_LkN)
    return Routing(
        gates_LkN=gates_LkN,
        chosen_LkN=chosen_LkN,
        scores_LEN=scores_LEN,
        # log(sum(exp(z))) = z_e - log(s_e) for any e; the best score has not underflown
        logsumexp_LN=torch.cat(best_logit) - gates_LkN[:, 0].log(),
    )


def route_backward(
    grad_gates_LkN: Tensor,
    routing: Routing,
    gram_MM: Tensor,
    config: HiLoMoEConfig,
    loss: LossGradients | None,
    grad_direct_MN: Tensor,
) -> Tensor:
    """Run the recursion backwards, from the scores alone; return the gradient by the Gram matrix.

    Args:
        grad_gates_LkN: The gradient by the gates.
        routing: What `route` returned.
        gram_MM: What it was given.
        config: The site's options.
        loss: The gradient of the auxiliary losses, which joins here; None without.
        grad_direct_MN: Zeros, to be filled with the gradient by the direct logits.
    """
    E, selected = config.num_experts, config.query_update == "selected"
    scores_LEN, chosen_LkN = routing.scores_LEN, routing.chosen_LkN
    passed_LEN = scores_LEN
    if selected:
        passed_LEN = torch.zeros_like(scores_LEN).scatter_(1, chosen_LkN, routing.gates_LkN)
    passed_MN = passed_LEN.flatten(0, 1)
    grad_gram_MM = torch.zeros_like(gram_MM)
    pull_LN = None if loss is None else routing.logsumexp_LN * (2 * loss.z)
    for layer in reversed(range(len(scores_LEN))):
        at, here = layer * E, slice(layer * E, (layer + 1) * E)
        # By now this holds what later layers want of what this layer passes on. In the same place
        # it becomes what they and the output want of the scores, then the gradient of the logits.
        grad_EN, grad_gates_kN = grad_direct_MN[here], grad_gates_LkN[layer]
        if selected:  # what it passes on are its gates
            grad_gates_kN = grad_gates_kN + grad_EN.gather(0, chosen_LkN[layer])
            grad_EN.zero_()
        grad_EN.scatter_add_(0, chosen_LkN[layer], grad_gates_kN)
        if loss is not None:
            grad_EN += loss.scores_LE[layer].unsqueeze(1)
        shift_N = (scores_LEN[layer] * grad_EN).sum(dim=0)
        if pull_LN is not None:
            shift_N -= pull_LN[layer]
        grad_EN.sub_(shift_N).mul_(scores_LEN[layer])
        if at:
            grad_gram_MM[here, :at] = grad_EN @ passed_MN[:at].t()
            if config.stop_gradient != "scores":
                grad_direct_MN[:at].addmm_(gram_MM[:at, here], grad_EN)
    return grad_gram_MM


def largest(logits_EN: Tensor, k: int) -> Tensor:
    """Find the ``k`` largest logits of each row, best first; of equal ones, the first.

    Softmax is strictly increasing, so these are the ``k`` largest scores. Logits are compared
    because rounding can make different logits equal scores.
    """
    best_1N = logits_EN.amax(dim=0, keepdim=True)
    return _as_index(_largest(logits_EN, best_1N, _ranks(len(logits_EN), logits_EN), k))


def _largest(logits_EN: Tensor, best_1N: Tensor, rank_E1: Tensor, k: int) -> Tensor:
    """`largest` in floating-point numbers, given the maximum.

    Nothing but float arithmetic: on a CPU, argmax over lines is twenty times slower.
    """
    found: list[Tensor] = []
    for _ in range(k):
        if found:
            logits_EN = logits_EN.scatter(0, _as_index(found[-1]), -torch.inf)
            best_1N = logits_EN.amax(dim=0, keepdim=True)
        is_best_EN = (logits_EN - best_1N).sign_().add_(1)
        found.append(len(rank_E1) - is_best_EN.mul_(rank_E1).amax(dim=0, keepdim=True))
    return found[0] if k == 1 else torch.cat(found)


def _ranks(num_experts: int, like: Tensor) -> Tensor:
    """``E, E - 1, ..., 1``: the first of several best experts has the highest rank."""
    return torch.arange(num_experts, 0, -1, device=like.device, dtype=like.dtype).unsqueeze(1)


def _as_index(found: Tensor) -> Tensor:
    # A row with a NaN chooses anything: its gates are NaN, and so is its output.
    return found.nan_to_num(nan=0.0).long()


def wide(t: Tensor) -> Tensor:
    """At least float32: logits are compared, and half precision cannot hold sums of them."""
    return t if t.dtype == torch.float64 else t.float()
