"""What a model costs: parameters, FLOPs of a sample, bytes of its lookups, a component each.

FLOPs are those of a forward pass, as `hilomoe.costs` counts them for anyone's model, for a batch of
samples with full histories.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures
from torchrec_hilomoe.hilomoe.costs import count_flops
from torchrec_hilomoe.hilomoe.inject import expert_parameters, sites_of
from torchrec_hilomoe.hilomoe.linear import ROUTING
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["Cost", "cost_table", "count_cost"]

COMPONENTS = ("tables", "backbone", "head", "experts", "routing")
SAMPLES = 1024  # a usual batch: what is computed once a batch is shared by so many


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs; each mapping has a figure per component and their ``total``.

    Components are ``tables``, ``backbone``, ``head``, ``experts`` and ``routing``.

    Attributes:
        parameters: Trainable numbers; frozen tables are none.
        activated: Parameters that one sample uses, by component: the rows that it looks up, and of
            each expert layer the experts that it chooses.
        flops: FLOPs of one sample's forward pass, by component.
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
    with (
        # FBGEMM computes shapes with a function that PyTorch deprecates.
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        FakeTensorMode(allow_non_fake_inputs=True),  # shapes without numbers cost nothing
    ):
        parts = {"head": backbone.get_submodule("head")}
        found = count_flops(backbone, lambda: backbone(_samples(widths)), parts)
    whole, head = found[""], found["head"].base
    batch = {
        "tables": 0,
        "backbone": whole.base - head,
        "head": head,
        "experts": whole.experts,
        "routing": whole.routing,
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


def _samples(widths: FeatureWidths) -> SequenceFeatures:
    histories = tuple(
        History(
            events=torch.zeros(SAMPLES * history.max_length, history.event),
            lengths=torch.full((SAMPLES,), history.max_length),
            target=torch.zeros(SAMPLES, history.event),
        )
        for history in widths.histories
    )
    max_seqlen = max((history.max_length for history in widths.histories), default=1)
    return SequenceFeatures(
        candidate=torch.zeros(SAMPLES, widths.candidate),
        context=torch.zeros(SAMPLES, widths.context),
        histories=histories,
        max_seqlen=max_seqlen,
        num_tokens=SAMPLES * max_seqlen,
    )
