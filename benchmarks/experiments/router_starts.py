"""Starts of experts and of keys, from what a plain model's sites and router would see.

`listen` keeps inputs, gradients and queries of rows on which nothing is trained; `start_spectral`
begins down-vectors from them, and `start_keys` keys.

Shape legend:
    N  rows     D  input width     O  output width     V  width of a view     L  layers
    E  experts     R  rank     S  columns of a sketched gradient     C  distinct queries
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from benchmarks.experiments.worlds import logits_of
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe.inject import routers_of, sites_of
from torchrec_hilomoe.hilomoe.probe.interactions import inverse_root
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["ROUTE_BY", "Heard", "listen", "router_of", "start_keys", "start_spectral"]

ROUTE_BY = (("category",), ("hour",), ("category_history",))
SKETCH = 64  # S
SUBSPACE = 3  # directions
SHRINK = 200.0  # rows by which a value's mean gradient is shrunk


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Rows of a plain model: each site's inputs and gradients, and each layer's queries."""

    x: dict[str, Tensor]  # (N, D)
    delta: dict[str, Tensor]  # (N, O)
    queries: list[Tensor]  # (N, V), a layer each


def listen(task: TrainTask, batches: Iterator[CTRBatch]) -> Heard:
    """Pass rows forward and backward, and keep what sites and routers see; nothing learns."""
    backbone = task.model.backbone
    backbone.include_history_mean = True
    names = [name for name, m in backbone.named_modules() if _is_site(name, m)]
    x: dict[str, list[Tensor]] = {name: [] for name in names}
    delta: dict[str, list[Tensor]] = {name: [] for name in names}
    samples: list[Tensor] = []
    hooks = [
        backbone.sample.register_forward_hook(lambda _m, _i, out: samples.append(out.detach()))
    ]
    for name in names:
        module = backbone.get_submodule(name)
        hooks.append(
            module.register_forward_hook(lambda _m, i, _o, n=name: x[n].append(i[0].detach()))
        )
        hooks.append(
            module.register_full_backward_hook(
                lambda _m, _i, out, n=name: delta[n].append(out[0].detach())
            )
        )
    for batch in batches:
        logits = logits_of(task.model, batch)
        F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum").backward()
        task.zero_grad()
    for hook in hooks:
        hook.remove()
    columns, sample_NS = task.model.sparse.columns, torch.cat(samples)
    queries = [
        torch.cat(
            [F.rms_norm(sample_NS[:, list(columns[n])], (len(columns[n]),)) for n in layer], dim=1
        )
        for layer in ROUTE_BY
    ]
    return Heard(
        x={name: torch.cat(parts) for name, parts in x.items()},
        delta={name: torch.cat(parts) for name, parts in delta.items()},
        queries=queries,
    )


def _is_site(name: str, module: nn.Module) -> bool:
    return name.startswith("head.hidden") and isinstance(module, nn.Linear)


def sketched_gradient(heard: Heard, site: str, generator: torch.Generator) -> Tensor:
    """``(N, S)``: each row's centred, whitened ``delta x^T``, projected at random."""
    x_ND, delta_NO = heard.x[site].double(), heard.delta[site].double()
    x_ND = (x_ND - x_ND.mean(dim=0)) @ inverse_root(torch.cov(x_ND.t()))
    delta_NO = delta_NO - delta_NO.mean(dim=0)
    delta_NO = delta_NO @ inverse_root(delta_NO.t() @ delta_NO / len(delta_NO))
    left_OS = torch.randn(delta_NO.shape[1], SKETCH, generator=generator, dtype=torch.float64)
    right_DS = torch.randn(x_ND.shape[1], SKETCH, generator=generator, dtype=torch.float64)
    sketch_NS = (delta_NO @ left_OS) * (x_ND @ right_DS)
    return sketch_NS - sketch_NS.mean(dim=0)


def start_spectral(task: TrainTask, heard: Heard) -> None:
    """Down-vectors of an expert: the right singular vectors of what its own rows ask for."""
    router = router_of(task)
    keys = router.expert_keys.detach()
    for name, site in sites_of(task.model.backbone).items():
        x_ND, delta_NO = heard.x[name].double(), heard.delta[name].double()
        right_DD = inverse_root(torch.cov(x_ND.t()))
        left_OO = inverse_root(delta_NO.t() @ delta_NO / len(delta_NO))
        norm = site.expert_in.detach().norm(dim=-1).mean()
        for layer, query_NV in enumerate(heard.queries):
            chosen_N = (query_NV @ keys[layer, :, : query_NV.shape[1]].t()).argmax(dim=1)
            inside = []
            for expert in range(keys.shape[1]):
                own = chosen_N == expert
                d, x = delta_NO[own], x_ND[own]
                few = len(d) < 2
                inside.append(torch.zeros(d.shape[1], x.shape[1]).double() if few else _cov(d, x))
            share_E = torch.bincount(chosen_N, minlength=keys.shape[1]).double() / len(chosen_N)
            inside_EOD = torch.stack(inside)
            spread_EOD = inside_EOD - torch.einsum("e,eod->od", share_E, inside_EOD)
            for expert, one_OD in enumerate(spread_EOD):
                _, _, v = torch.linalg.svd(left_OO @ one_OD @ right_DD, full_matrices=False)
                rank = site.config.rank
                start_RD = (v[:rank] @ right_DD).float()
                start_RD = F.normalize(start_RD, dim=1) * norm
                with torch.no_grad():
                    site.expert_in[layer, expert] = start_RD.view_as(site.expert_in[layer, expert])


def _cov(d_NO: Tensor, x_ND: Tensor) -> Tensor:
    return d_NO.t() @ x_ND / len(d_NO) - torch.outer(d_NO.mean(dim=0), x_ND.mean(dim=0))


def start_keys(task: TrainTask, heard: Heard, kind: str, seed: int) -> None:
    """Draw the keys in a subspace, or fit them to clusters, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    router = router_of(task)
    site = next(iter(heard.x))
    gradient_NS = sketched_gradient(heard, site, generator)
    for layer, query_NV in enumerate(heard.queries):
        E, V = router.config.num_experts, query_NV.shape[1]
        if kind == "subspace":
            keys_EV = subspace_keys(query_NV.double(), gradient_NS, E, generator)
        else:
            keys_EV = clustered_keys(query_NV.double(), gradient_NS, E, generator)
        scale = router.expert_keys[layer, :, :V].detach().norm(dim=1).mean()
        keys_EV = keys_EV - keys_EV.mean(dim=0)
        keys_EV = keys_EV * (scale / keys_EV.norm(dim=1).mean())
        with torch.no_grad():
            router.expert_keys[layer, :, :V] = keys_EV.float()


def subspace_keys(
    query_NV: Tensor, gradient_NS: Tensor, experts: int, generator: torch.Generator
) -> Tensor:
    """Random keys in the directions along which a linear fit of the gradient varies most."""
    centred_NV = query_NV - query_NV.mean(dim=0)
    whiten_VV = inverse_root(torch.cov(centred_NV.t()))
    slope_SV = gradient_NS.t() @ centred_NV @ whiten_VV / len(query_NV)
    _, _, v = torch.linalg.svd(slope_SV, full_matrices=False)
    drawn = torch.randn(experts, SUBSPACE, generator=generator, dtype=torch.float64)
    return drawn @ v[:SUBSPACE] @ whiten_VV


def clustered_keys(
    query_NV: Tensor, gradient_NS: Tensor, experts: int, generator: torch.Generator
) -> Tensor:
    """Keys of a linear classifier that tells clusters of queries apart."""
    # A feature's values are its distinct queries; a history's mean has too many, so they are
    # gathered around some that are drawn.
    distinct_CV, value_N = torch.unique(query_NV.round(decimals=4), dim=0, return_inverse=True)
    if len(distinct_CV) > 256:
        drawn = torch.randperm(len(query_NV), generator=generator)[:256]
        distinct_CV = query_NV[drawn]
        value_N = (query_NV @ distinct_CV.t()).argmax(dim=1)
    C = len(distinct_CV)
    count_C = torch.bincount(value_N, minlength=C).double()
    sum_CS = torch.zeros(C, gradient_NS.shape[1]).double().index_add_(0, value_N, gradient_NS)
    point_CS = sum_CS / (count_C + SHRINK)[:, None]
    cluster_C = balanced_clusters(point_CS, count_C, experts, generator)
    keys_EV = nn.Parameter(torch.zeros(experts, query_NV.shape[1]).double())
    optimizer = torch.optim.LBFGS([keys_EV], max_iter=50)
    weight_C = count_C / count_C.sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        each_C = F.cross_entropy(distinct_CV.double() @ keys_EV.t(), cluster_C, reduction="none")
        loss = (weight_C * each_C).sum() + 1e-3 * keys_EV.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return keys_EV.detach()


def balanced_clusters(
    point_CS: Tensor, count_C: Tensor, clusters: int, generator: torch.Generator
) -> Tensor:
    """k-means with a price for full clusters, raised until no load is twice its share."""
    C = len(point_CS)
    centre = point_CS[torch.randperm(C, generator=generator)[: min(clusters, C)]]
    if len(centre) < clusters:
        centre = torch.cat([centre, centre[: clusters - len(centre)]])
    price = torch.zeros(clusters).double()
    scale = point_CS.var(dim=0).sum()
    own = torch.zeros(C, dtype=torch.int64)
    for _ in range(100):
        own = (torch.cdist(point_CS, centre).square() + price).argmin(dim=1)
        load = torch.zeros(clusters).double().index_add_(0, own, count_C) / count_C.sum()
        price += 0.3 * scale * (load - 1 / clusters) * clusters / 8
        for cluster in range(clusters):
            mine = own == cluster
            if mine.any():
                weight = count_C[mine][:, None]
                centre[cluster] = (point_CS[mine] * weight).sum(dim=0) / weight.sum().clamp(min=1)
    return own


def router_of(task: TrainTask) -> SampleRouter:
    """The one that all sites share."""
    (router,) = routers_of(task.model.backbone).values()
    assert isinstance(router, SampleRouter)
    return router
