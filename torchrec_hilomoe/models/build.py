"""Configuration -> modules: the only file that knows both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.bst import BST
from torchrec_hilomoe.backbones.dien import DIEN
from torchrec_hilomoe.backbones.din import DIN
from torchrec_hilomoe.backbones.interformer import InterFormer
from torchrec_hilomoe.backbones.transact import TransAct
from torchrec_hilomoe.config import InjectionConfig, ModelConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.hilomoe.controls import fix_random_routing
from torchrec_hilomoe.hilomoe.inject import inject_hilomoe, share_routing
from torchrec_hilomoe.models.ctr_model import CTRModel
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["build_task", "site_patterns"]


def build_task(config: ModelConfig, schema: Schema) -> TrainTask:
    """Build the model that is trained, its tables on the ``meta`` device until they are sharded.

    Raises:
        ValueError: If the configuration is impossible, alone or with the schema.
    """
    if config.embedding_dim < 4 or config.embedding_dim % 4:
        raise ValueError(
            f"model.embedding_dim must be a multiple of 4, got {config.embedding_dim}; "
            "FBGEMM's kernels want aligned rows."
        )
    sparse = SparseArch(
        schema, config.embedding_dim, torch.device("meta"), embed_dense=config.embed_dense
    )
    backbone = _builder(config.backbone)(config, sparse.widths)
    _check_targets(config.backbone, schema)
    if config.hilomoe is not None:
        _inject(backbone, config.hilomoe, sparse)
    return TrainTask(CTRModel(sparse, backbone))


def _inject(backbone: Backbone, config: InjectionConfig, sparse: SparseArch) -> None:
    patterns = site_patterns(backbone, config)
    if config.routing == "sample" or config.route_by is not None:
        width, views = sparse.widths.candidate + sparse.widths.context, None
        if config.route_by is not None:
            views = _views(config.route_by, sparse)
            backbone.tells_histories = True
            width += sum(history.event for history in sparse.widths.histories)
        share_routing(
            backbone, config, patterns, "sample", width, tokens=backbone.tokens, views=views
        )
    else:
        inject_hilomoe(backbone, config, sites=patterns)
    if config.routing == "random":
        fix_random_routing(backbone, seed=int(torch.randint(2**31, ())))


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
        "the same one table, or take model.backbone interformer, which does not compare them."
    )


def _bst(config: ModelConfig, widths: FeatureWidths) -> BST:
    return BST(
        widths,
        position_dim=config.embedding_dim if config.bst.positions else 0,
        num_layers=config.bst.num_layers,
        num_heads=config.bst.num_heads,
        dropout=config.dropout if config.bst.dropout is None else config.bst.dropout,
        head_dropout=config.dropout,
        residual=config.bst.residual,
        layer_norm=config.bst.layer_norm,
        pooling=config.bst.pooling,
        head=config.head,
        batch_norm=config.batch_norm,
    )


def _din(config: ModelConfig, widths: FeatureWidths) -> DIN:
    return DIN(
        widths,
        attention_units=config.din.attention_units,
        attention_activation=config.din.attention_activation,
        attention_dropout=config.din.attention_dropout,
        softmax=config.din.softmax,
        head=config.head,
        head_activation=config.din.head_activation,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
    )


def _dien(config: ModelConfig, widths: FeatureWidths) -> DIEN:
    options = config.dien
    return DIEN(
        widths,
        attention=options.attention,
        attention_units=options.attention_units,
        attention_activation=options.attention_activation,
        attention_dropout=options.attention_dropout,
        auxiliary_weight=options.auxiliary_weight,
        auxiliary_units=options.auxiliary_units,
        head=config.head,
        head_activation=options.head_activation,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
    )


def _transact(config: ModelConfig, widths: FeatureWidths) -> TransAct:
    options = config.transact
    return TransAct(
        widths,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        ffn_width=options.ffn_width,
        latest=options.latest,
        time_window=options.time_window,
        dropout=config.dropout if options.dropout is None else options.dropout,
        cross_layers=options.cross_layers,
        head=config.head,
        activation=options.head_activation,
        head_dropout=config.dropout,
        batch_norm=config.batch_norm,
    )


def _interformer(config: ModelConfig, widths: FeatureWidths) -> InterFormer:
    options = config.interformer
    return InterFormer(
        widths,
        num_layers=options.num_layers,
        interaction_layers=options.interaction_layers,
        num_heads=options.num_heads,
        cls_tokens=options.cls_tokens,
        pooled_tokens=options.pooled_tokens,
        recent_tokens=options.recent_tokens,
        gating=options.gating,
        residual=options.residual,
        dropout=config.dropout,
        head=config.head,
        batch_norm=config.batch_norm,
    )


BUILDERS: Mapping[str, Callable[[ModelConfig, FeatureWidths], Backbone]] = MappingProxyType(
    {"bst": _bst, "dien": _dien, "din": _din, "transact": _transact, "interformer": _interformer}
)


READS_NO_TARGET = ("interformer",)


def _builder(name: str) -> Callable[[ModelConfig, FeatureWidths], Backbone]:
    if name not in BUILDERS:
        near = get_close_matches(name, BUILDERS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(BUILDERS)}."
        raise ValueError(f"model.backbone is {name!r}, which is not known. {hint}")
    return BUILDERS[name]
