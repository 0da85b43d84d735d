"""Sites as a package has them: few products, and no arithmetic that requests have in common.

A request has few rows, so the number of its operations counts, not only their size. What does not
depend on rows is computed ahead: the scaled keys, which become rows of the base map's own product,
and their Gram matrix. The rest is written so that the compiler makes one loop of it: every layer's
choice by reductions, whose results it stores, and then the vectors that a row chose, one by one,
each read once for all of a site's products. It would compute anything else again for every column.

Shape legend:
    N  rows     D  input width     O  output width     Q  query width     L  active expert layers
    E  experts     R  rank     k  experts chosen     M  experts of all layers, L E
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.function import rms_norm
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear

__all__ = ["ServedSite", "served_sites"]


class ServedSite(nn.Module):
    """A trained site in evaluation, with the equations of `HiLoMoELinear`.

    Args:
        site: Has active layers, and routes its own rows in score space.
    """

    @torch.no_grad()
    def __init__(self, site: HiLoMoELinear) -> None:
        super().__init__()
        self.config, self.layers = site.config, site.active_layers
        self.out_features = site.out_features
        keys_MQ = site.keys_LEQ()[: self.layers].flatten(0, 1)
        scaled_MQ = keys_MQ * keys_MQ.shape[1] ** -0.5
        self.gram_MM = _constant(scaled_MQ @ keys_MQ.t())
        # The input may meet the keys at once; what makes another query of it comes before them.
        projects, norms = self.config.query_dim is not None, self.config.query_norm
        beside = [site.query_proj] if projects else [] if norms else [scaled_MQ]
        self.scaled_MQ = _constant(scaled_MQ) if projects or norms else None
        self.stacked = _constant(torch.cat([site.weight, *beside]))
        bias = self.stacked.new_zeros(len(self.stacked))
        if site.bias is not None:
            bias[: site.out_features] = site.bias
        self.bias = _constant(bias)
        self.down_LERD = _constant(site.expert_in[: self.layers])
        self.up_LERO = _constant(site.expert_out[: self.layers] * site.config.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map and its experts to ``(..., D)``."""
        x_ND = x.reshape(-1, x.shape[-1])
        product = F.linear(x_ND, self.stacked, self.bias)
        y_NO, beside = product[:, : self.out_features], product[:, self.out_features :]
        for layer, of_layer in enumerate(self._route(x_ND, beside)):
            down_ERD, up_ERO = self.down_LERD[layer], self.up_LERO[layer]
            for gates_N, chosen_N in of_layer:
                said_NO = torch.zeros_like(y_NO)
                for down_ED, up_EO in zip(down_ERD.unbind(1), up_ERO.unbind(1), strict=True):
                    hidden_N1 = (x_ND * down_ED[chosen_N]).sum(dim=1, keepdim=True)
                    said_NO = said_NO + hidden_N1 * up_EO[chosen_N]
                y_NO = y_NO + gates_N.unsqueeze(1) * said_NO
        return y_NO.reshape(*x.shape[:-1], self.out_features)

    def _route(self, x_ND: Tensor, beside: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """For each layer, gates and experts, as often as a row chooses."""
        E, selected = self.config.num_experts, self.config.query_update == "selected"
        direct_NM = beside
        if self.scaled_MQ is not None:
            query_NQ = x_ND if self.config.query_dim is None else beside
            query_NQ = rms_norm(query_NQ) if self.config.query_norm else query_NQ
            direct_NM = F.linear(query_NQ, self.scaled_MQ)
        chosen: list[list[tuple[Tensor, Tensor]]] = []
        passed: list[Tensor] = []
        for at in range(0, self.layers * E, E):
            logits_NE = direct_NM[:, at : at + E]
            if passed:
                by_earlier_ME = self.gram_MM[at : at + E, :at].t()
                moved_NME = torch.cat(passed, dim=1).unsqueeze(2) * by_earlier_ME
                logits_NE = logits_NE + moved_NME.sum(dim=1)
            scores_NE = torch.softmax(logits_NE, dim=1)
            best = _largest(logits_NE, scores_NE, self.config.top_k)
            chosen.append(best)
            passed.append(_gates_alone(scores_NE, best) if selected else scores_NE)
        return chosen


def _largest(logits_NE: Tensor, scores_NE: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """The ``k`` largest scores and whose they are, best first; of equal logits, the first."""
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(k):
        if found:
            last_N1 = found[-1][1].unsqueeze(1)
            logits_NE = logits_NE.scatter(1, last_N1, -torch.inf)
            scores_NE = scores_NE.scatter(1, last_N1, -torch.inf)
        found.append((scores_NE.amax(dim=1), logits_NE.argmax(dim=1)))
    return found


def _gates_alone(scores_NE: Tensor, best: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The scores of the chosen experts, zero elsewhere."""
    gates_NE = torch.zeros_like(scores_NE)
    for gates_N, chosen_N in best:
        gates_NE = gates_NE.scatter(1, chosen_N.unsqueeze(1), gates_N.unsqueeze(1))
    return gates_NE


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


@contextmanager
def served_sites(model: nn.Module) -> Iterator[None]:
    """Replace the sites of a model, for as long as it is traced for a compiler.

    Those of a shared router, and those with so many experts that their queries are moved, keep
    their form; rows then meet the chosen vectors by plain indexing.
    """
    places = [
        (name, site)
        for name, site in model.named_modules(remove_duplicate=False)
        if isinstance(site, HiLoMoELinear) and site.active_layers
    ]
    executions = [(site, site.execution) for _, site in places]
    try:
        for name, site in places:
            if site.router is None and site.execution.space == "scores":
                model.set_submodule(name, ServedSite(site))
            else:
                site.execution = replace(site.execution, experts="indexed")
        yield
    finally:
        for (name, site), (_, execution) in zip(places, executions, strict=True):
            model.set_submodule(name, site)
            site.execution = execution
