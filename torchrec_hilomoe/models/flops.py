"""What a model costs: parameters, FLOPs of a sample, bytes of its lookups, a component each.

FLOPs are those of matrix products, two for each multiply-add, forward, for a batch of samples with
full histories; pointwise work is not counted. PyTorch's own counter counts the plain model. It does
not see a site's kernels, so experts and routing are counted from their sizes: what is computed,
which is all of a layer's experts or only the chosen ones, as the site itself decides.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.sites import expert_parameters, sites_of
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["Cost", "cost_table", "count_cost", "site_flops"]

COMPONENTS = ("tables", "backbone", "head", "experts", "routing")
ROUTING = ("expert_keys", "query_proj")
SAMPLES = 1024  # a usual batch: what is computed once a batch is shared by so many


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs; each mapping has a figure per component and their ``total``.

    Components are ``tables``, ``backbone``, ``head``, ``experts`` and ``routing``.

    Attributes:
        parameters: Trainable numbers; frozen tables are none.
        activated: Of those, what one sample uses: the rows that it looks up, and of each expert
            layer the experts that it chooses.
        flops: Of one sample's forward pass.
        lookup_bytes: Read from tables for one sample, float32.
    """

    parameters: Mapping[str, int]
    activated: Mapping[str, int]
    flops: Mapping[str, int]
    lookup_bytes: int

    @property
    def training_flops(self) -> dict[str, int]:
        """Of one sample's forward and backward pass.

        Each product of the forward pass has two in the backward, one for either factor: all
        inputs are embeddings, which learn.
        """
        return {name: 3 * flops for name, flops in self.flops.items()}


def count_cost(task: TrainTask, schema: Schema, embedding_dim: int) -> Cost:
    """Count a model that is not yet sharded; its dense part must be on CPU."""
    backbone, widths = task.model.backbone, task.model.sparse.widths
    parameters = _parameters(task)
    flops = _flops(backbone, widths)
    flops["backbone"] += _projection_flops(schema, embedding_dim)
    return Cost(
        parameters=_with_total(parameters),
        activated=_with_total(_activated(task, parameters, schema, embedding_dim)),
        flops=_with_total(flops),
        lookup_bytes=_lookup_bytes(schema, embedding_dim),
    )


def cost_table(cost: Cost) -> str:
    """Return the cost as text, a line a component."""
    titles = ("component", "parameters", "activated", "FLOPs", "training FLOPs")
    lines = ["{:<10} {:>14} {:>14} {:>14} {:>15}".format(*titles)]
    for name, parameters in cost.parameters.items():
        lines.append(
            f"{name:<10} {parameters:>14,} {cost.activated[name]:>14,} {cost.flops[name]:>14,} "
            f"{cost.training_flops[name]:>15,}"
        )
    lines.append(f"FLOPs are a sample's; its lookups read {cost.lookup_bytes:,} bytes")
    return "\n".join(lines)


def site_flops(site: HiLoMoELinear, rows: int) -> int:
    """Return the FLOPs that a site's experts and routing add to its base map's, forward."""
    return _expert_flops(site, rows) + _routing_flops(site, rows)


def _lookups(schema: Schema) -> list[tuple[IdFeature | PooledFeature, int]]:
    """Each feature and the most ids that a sample has of it."""
    ids: list[tuple[IdFeature | PooledFeature, int]] = [(field, 1) for field in schema.candidate]
    ids += [(feature, feature.max_length) for feature in schema.pooled]
    ids += [(field, group.max_length) for group in schema.sequences for field in group.fields]
    return ids


def _lookup_bytes(schema: Schema, embedding_dim: int) -> int:
    widths = {table: frozen.width for table, frozen in schema.frozen.items()}
    ids = _lookups(schema)
    return 4 * sum(count * widths.get(feature.table, embedding_dim) for feature, count in ids)


def _activated(
    task: TrainTask, parameters: Mapping[str, int], schema: Schema, embedding_dim: int
) -> dict[str, int]:
    ids = sum(count for feature, count in _lookups(schema) if feature.table not in schema.frozen)
    unused = sum(
        parameter.numel() * (site.config.num_experts - site.config.top_k) // site.config.num_experts
        for site in sites_of(task).values()
        # Tied keys are down-vectors, all of which route.
        for parameter in ([] if site.config.tie_keys else [site.expert_in]) + [site.expert_out]
    )
    return {
        **parameters,
        "tables": ids * embedding_dim,
        "experts": parameters["experts"] - unused,
    }


def _with_total(parts: dict[str, int]) -> dict[str, int]:
    return {**parts, "total": sum(parts.values())}


def _parameters(task: TrainTask) -> dict[str, int]:
    parts: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    experts = expert_parameters(task)
    tables = {id(table) for table in task.model.sparse.trained_tables}
    frozen = {id(table) for table in task.model.sparse.frozen_tables}
    for name, parameter in task.named_parameters():
        if id(parameter) in frozen:
            continue  # came with the data
        if id(parameter) in tables:
            component = "tables"
        elif name in experts:
            component = "routing" if name.endswith(ROUTING) else "experts"
        else:
            component = "head" if name.startswith("model.backbone.head.") else "backbone"
        parts[component] += parameter.numel()
    return parts


def _flops(backbone: Backbone, widths: FeatureWidths) -> dict[str, int]:
    sites = sites_of(backbone)
    rows: dict[str, int] = {}
    hooks = [
        site.register_forward_pre_hook(partial(_note_rows, rows, name))
        for name, site in sites.items()
    ]
    layers = {name: site.active_layers for name, site in sites.items()}
    for site in sites.values():
        site.active_layers = 0
    plain, head = _count(backbone, widths)
    for name, site in sites.items():
        site.active_layers = layers[name]
    for hook in hooks:
        hook.remove()
    batch = {
        "tables": 0,
        "backbone": plain - head,
        "head": head,
        "experts": sum(_expert_flops(site, rows[name]) for name, site in sites.items()),
        "routing": sum(_routing_flops(site, rows[name]) for name, site in sites.items()),
    }
    return {name: round(flops / SAMPLES) for name, flops in batch.items()}


def _projection_flops(schema: Schema, embedding_dim: int) -> int:
    """FLOPs of the maps from given vectors to embeddings; a pooled feature has one a row."""
    lengths = {field.name: group.max_length for group in schema.sequences for field in group.fields}
    return sum(
        2 * schema.frozen[feature.table].width * embedding_dim * lengths.get(feature.name, 1)
        for feature in schema.id_features
        if feature.table in schema.frozen
    )


def _note_rows(rows: dict[str, int], name: str, site: nn.Module, args: tuple[Tensor]) -> None:
    rows[name] = args[0].numel() // args[0].shape[-1]


def _expert_flops(site: HiLoMoELinear, rows: int) -> int:
    """FLOPs of the products with the experts' vectors, on their way down and up."""
    config = site.config
    experts = config.num_experts if site.plan.experts == "dense" else config.top_k
    vectors = config.num_layers * experts * config.rank
    return 2 * rows * vectors * (site.in_features + site.out_features)


def _routing_flops(site: HiLoMoELinear, rows: int) -> int:
    """FLOPs of the logits.

    They are the query, its products with all keys, and what each layer passes on to those below
    it: through the keys' Gram matrix or, where the plan says so, by moving the query. A router
    that sites share works once for each sample.
    """
    config, source, plan = site.config, site.in_features, site.plan
    width = config.query_dim or source
    if site.shared_router is not None:
        if site.shared_router not in site.children():  # its owner has counted it
            return 0
        router = site.shared_router
        rows, source, plan, width = SAMPLES, router.width, router.plan, router.query_width
    layers, experts = config.num_layers, config.num_experts
    keys = layers * experts
    query = 2 * source * config.query_dim if config.query_dim else 0
    if plan.space == "queries":
        passed = experts if config.query_update == "soft" else config.top_k
        moves = 2 * (layers - 1) * passed * width
        return rows * (query + 2 * keys * width + moves)
    moves = layers * (layers - 1) * experts**2
    return 2 * keys * keys * width + rows * (query + 2 * keys * width + moves)


@torch.no_grad()
def _count(backbone: Backbone, widths: FeatureWidths) -> tuple[int, int]:
    """Return the FLOPs of a batch: all of them, and the head's."""
    training = backbone.training
    backbone.eval()
    with (
        # FBGEMM computes shapes with a function that PyTorch deprecates.
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        FakeTensorMode(allow_non_fake_inputs=True),  # shapes without numbers cost nothing
        sdpa_kernel(SDPBackend.MATH),  # the counter does not know the CPU's own attention
        FlopCounterMode(display=False) as counter,
    ):
        backbone(_samples(widths))
    backbone.train(training)
    counts = counter.get_flop_counts()
    head = sum(counts.get(f"{type(backbone).__name__}.head", {}).values())
    return counter.get_total_flops(), head


def _samples(widths: FeatureWidths) -> SequenceFeatures:
    histories = tuple(
        History(
            events=torch.zeros(SAMPLES * history.max_length, history.event),
            lengths=torch.full((SAMPLES,), history.max_length),
            target=torch.zeros(SAMPLES, history.event),
        )
        for history in widths.histories
    )
    longest = max((history.max_length for history in widths.histories), default=1)
    return SequenceFeatures(
        candidate=torch.zeros(SAMPLES, widths.candidate),
        context=torch.zeros(SAMPLES, widths.context),
        histories=histories,
        longest=longest,
        steps=SAMPLES * longest,
    )
