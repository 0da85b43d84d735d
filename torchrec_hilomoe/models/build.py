"""Configuration -> modules: the only file that knows both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.bst import BST
from torchrec_hilomoe.backbones.dcn import DCN
from torchrec_hilomoe.backbones.dien import DIEN
from torchrec_hilomoe.backbones.din import DIN
from torchrec_hilomoe.backbones.dlrm import DLRM
from torchrec_hilomoe.backbones.interformer import InterFormer
from torchrec_hilomoe.backbones.transact import TransAct
from torchrec_hilomoe.config import InjectionConfig, ModelConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.hilomoe.fixed_routing import fix_random_routing
from torchrec_hilomoe.hilomoe.inject import inject_hilomoe, inject_shared_router
from torchrec_hilomoe.models.train_task import CTRModel, TrainTask

__all__ = [
    "BACKBONES",
    "READS_NO_TARGET",
    "build_backbone",
    "build_task",
    "inject_experts",
    "site_patterns",
    "with_widest_views",
]


UNSHARDED = torch.device("meta")


def build_task(config: ModelConfig, schema: Schema, tables: torch.device = UNSHARDED) -> TrainTask:
    """Build the model that is trained.

    Args:
        config: Its options.
        schema: Of the data.
        tables: Where its tables are made: on ``meta`` until they are sharded, by default.

    Raises:
        ValueError: If the configuration is impossible, alone or with the schema.
    """
    if config.embedding_dim < 4 or config.embedding_dim % 4:
        raise ValueError(
            f"model.embedding_dim must be a multiple of 4, got {config.embedding_dim}; "
            "FBGEMM's kernels want aligned rows."
        )
    sparse = SparseArch(schema, config.embedding_dim, tables, embed_dense=config.embed_dense)
    backbone = build_backbone(config, sparse.widths)
    _check_targets(config.backbone, schema)
    task = TrainTask(CTRModel(sparse, backbone))
    if config.hilomoe.enabled:
        inject_experts(task, config.hilomoe)
    return task


def inject_experts(task: TrainTask, config: InjectionConfig) -> None:
    """Put experts on a plain model, before or after its tables are sharded.

    Raises:
        ValueError: If the configuration does not go with the model, or does not say yet by which
            features it routes.
    """
    backbone, sparse = task.model.backbone, task.model.sparse
    patterns = site_patterns(backbone, config)
    if config.route_by == "auto":
        raise ValueError(
            "model.hilomoe.route_by is auto: its features are chosen while a plain model trains, "
            "so that none can be built with them yet. Name them, or train with apps/train.py."
        )
    if config.routing == "sample" or config.route_by is not None:
        width, views = sparse.widths.candidate + sparse.widths.context, None
        if config.route_by is not None:
            views = _views(config.route_by, sparse)
            backbone.include_history_mean = True
            width += sum(history.event for history in sparse.widths.histories)
        inject_shared_router(
            backbone, config, patterns, "sample", width, tokens=backbone.tokens, views=views
        )
    else:
        inject_hilomoe(backbone, config, sites=patterns)
    if config.routing == "random":
        fix_random_routing(backbone, seed=int(torch.randint(2**31, ())))


def with_widest_views(config: ModelConfig, schema: Schema) -> ModelConfig:
    """Stand in for what ``route_by: auto`` may choose: the features that cost most.

    Raises:
        ValueError: If there is nothing to choose from.
    """
    if not config.hilomoe.enabled or config.hilomoe.route_by != "auto":
        return config
    sparse = SparseArch(
        schema, config.embedding_dim, torch.device("meta"), embed_dense=config.embed_dense
    )
    widest = sorted(sparse.columns, key=lambda name: -len(sparse.columns[name]))
    if len(widest) < 2:
        raise ValueError(
            "model.hilomoe.route_by is auto, which chooses between features, but the schema has "
            f"one alone: {', '.join(widest)}. Set route_by to null, or give data with more."
        )
    layers = config.hilomoe.num_layers
    views = tuple((widest[layer % len(widest)],) for layer in range(layers))
    return replace(config, hilomoe=replace(config.hilomoe, route_by=views))


def _views(route_by: Sequence[Sequence[str]], sparse: SparseArch) -> tuple[tuple[range, ...], ...]:
    """Say where the features stand, and those of a whole side."""
    columns = sparse.columns
    features = {**sparse.sides, **{name: (name,) for name in columns}}
    views = []
    for layer, names in enumerate(route_by, start=1):
        unknown = [name for name in names if name not in features]
        found = [feature for name in names for feature in features.get(name, ())]
        if unknown or not found or len(set(found)) < len(found):
            near = get_close_matches(unknown[0], features, n=1) if unknown else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"model.hilomoe.route_by: layer {layer} reads {list(names)}, which must be one or "
                f"more different features of {', '.join(columns)}, or sides of "
                f"{', '.join(sparse.sides)}.{hint}"
            )
        views.append(tuple(columns[feature] for feature in found))
    return tuple(views)


def site_patterns(backbone: Backbone, config: InjectionConfig) -> tuple[str, ...]:
    """Resolve groups of sites, and ``all``, to name patterns; other entries are patterns.

    A group that these options leave without a map, such as DIEN's plain attention, is none of all.

    Raises:
        ValueError: If there is no entry, or one means no linear map of this backbone.
    """
    linears = [name for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)]

    def present(patterns: Iterable[str]) -> tuple[str, ...]:
        return tuple(p for p in patterns if any(fnmatchcase(name, p) for name in linears))

    groups = {name: found for name, group in backbone.SITES.items() if (found := present(group))}
    groups["all"] = tuple(pattern for group in groups.values() for pattern in group)
    has = f"{type(backbone).__name__} has the groups {', '.join(groups)}"
    if not config.sites:
        raise ValueError(
            f"model.hilomoe.sites is empty, so there is no place for experts. {has}; for the plain "
            "backbone set model.hilomoe to null."
        )
    for site in config.sites:
        if site not in groups and not present([site]):
            raise ValueError(
                f"model.hilomoe.sites pattern {site!r} matches none of the model's nn.Linear: "
                f"{', '.join(linears)}. Name one of these, or a group: {has}."
            )
    return tuple(pattern for site in config.sites for pattern in groups.get(site, (site,)))


def _check_targets(backbone: str, schema: Schema) -> None:
    """Refuse histories that the candidate cannot be compared with."""
    tables = {field.table for field in schema.candidate}
    if backbone in READS_NO_TARGET or any(f.table in tables for f in schema.sequence_fields):
        return
    candidates, events = (
        ", ".join(f"{field.name} ({field.table})" for field in fields)
        for fields in (schema.candidate, schema.sequence_fields)
    )
    raise ValueError(
        f"{backbone} compares events with the candidate, but no field of Schema.sequences shares a "
        f"table with one of Schema.candidate: {events} against {candidates}. Give fields that mean "
        "the same one table, or take a model.backbone that does not compare them: "
        f"{', '.join(READS_NO_TARGET)}."
    )


BACKBONES: Mapping[str, Callable[..., Backbone]] = MappingProxyType(
    {
        "bst": BST,
        "dien": DIEN,
        "din": DIN,
        "transact": TransAct,
        "interformer": InterFormer,
        "dlrm": DLRM,
        "dcn": DCN,
    }
)


READS_NO_TARGET = ("interformer", "dlrm", "dcn")


def build_backbone(config: ModelConfig, widths: FeatureWidths) -> Backbone:
    """Build a backbone: the options of its group have the names of its arguments.

    Raises:
        ValueError: If it is not known, or an option does not go with the sizes.
    """
    name = config.backbone
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(BACKBONES)}."
        raise ValueError(f"model.backbone is {name!r}, which is not known. {hint}")
    return BACKBONES[name](
        widths,
        head=config.head,
        head_dropout=config.dropout,
        batch_norm=config.batch_norm,
        **vars(getattr(config, name)),
    )
