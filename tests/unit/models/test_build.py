"""Configuration -> modules: what is built, where experts go, what is refused."""

import re
from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA, without
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import (
    BSTConfig,
    DCNConfig,
    DIENConfig,
    DLRMConfig,
    InjectionConfig,
)
from torchrec_hilomoe.data.schema import IdFeature, SequenceGroup
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import (
    BACKBONES,
    build_task,
    READS_NO_TARGET,
    with_widest_views,
)

HEAD = {"head.hidden.0", "head.hidden.2"}
FFN = {f"transformers.{i}.layers.0.{name}" for i in (0, 1) for name in ("ffn_in", "ffn_out")}
ATTENTION = {
    f"transformers.{i}.layers.0.attention.{name}"
    for i in (0, 1)
    for name in ("query", "key", "value", "output")
}


@pytest.mark.parametrize(
    ("sites", "want"),
    [
        (("head",), HEAD),
        (("ffn",), FFN),
        (("attention",), ATTENTION),
        (("head", "ffn"), HEAD | FFN),
        (("all",), HEAD | FFN | ATTENTION),
        (("*.hidden.2", "ffn"), FFN | {"head.hidden.2"}),
    ],
    ids=["head", "ffn", "attention", "head and ffn", "all", "a pattern and ffn"],
)
def test_sites_are_groups_of_the_backbone_or_patterns(sites, want):
    config = replace(MODEL, hilomoe=InjectionConfig(num_experts=2, sites=sites))
    assert set(sites_of(build_task(config, SCHEMA).model.backbone)) == want


def test_sample_routing_shares_one_router_among_all_sites():
    experts = InjectionConfig(num_experts=2, sites=("all",), routing="sample")
    task = build_task(replace(MODEL, hilomoe=experts), SCHEMA)
    sites = sites_of(task.model.backbone)
    assert set(sites) == HEAD | FFN | ATTENTION
    assert len({id(site.router) for site in sites.values()}) == 1


def test_a_layer_is_routed_by_the_features_that_are_named():
    experts = InjectionConfig(
        num_layers=3,
        num_experts=2,
        sites=("all",),
        routing="sample",
        route_by=(("kind",), ("price", "place"), ("clicks_kind",)),
    )
    backbone = build_task(replace(MODEL, hilomoe=experts), SCHEMA).model.backbone
    router = next(iter(sites_of(backbone).values())).router
    assert router is not None
    # Candidate item 0:4, kind 4:8; context user 8:12, place 12:16, tags, price 20, age 21;
    # clicks item 22:26, kind 26:30; views item.
    assert router.ranges == (range(4, 8), range(20, 21), range(12, 16), range(26, 30))
    assert router.width == 34
    assert backbone.include_history_mean


def test_a_side_is_all_of_its_features():
    experts = InjectionConfig(
        num_layers=3,
        routing="sample",
        route_by=(("candidate",), ("context",), ("clicks_kind", "candidate")),
    )
    backbone = build_task(replace(MODEL, hilomoe=experts), SCHEMA).model.backbone
    router = next(iter(sites_of(backbone).values())).router
    assert router is not None
    candidate = (range(4), range(4, 8))
    context = (range(8, 12), range(12, 16), range(16, 20), range(20, 21), range(21, 22))
    assert router.ranges == (*candidate, *context, range(26, 30))
    assert router.expert_keys.shape == (3, 8, 14)


@pytest.mark.parametrize("routing", ["sample", "random"])
def test_what_routes_by_features_learns_unless_it_is_the_control(routing):
    experts = InjectionConfig(num_layers=1, routing=routing, route_by=(("place",),))
    backbone = build_task(replace(MODEL, hilomoe=experts), SCHEMA).model.backbone
    router = next(iter(sites_of(backbone).values())).router
    assert router is not None
    learning = [name for name, _ in router.named_parameters()]
    assert learning == ([] if routing == "random" else ["expert_keys"])
    assert router.expert_keys.shape == (1, 8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route_by": (("kind",),), "routing": "row"}, "model.hilomoe.routing is row. Set"),
        ({"route_by": ()}, "route_by has 0 lists of features for num_layers = 1. Give"),
        ({"route_by": (("kind",), ("place",))}, "route_by has 2 lists of features for"),
        ({"route_by": ((),)}, "route_by: layer 1 reads [], which must be one or more"),
        ({"route_by": (("kin",),)}, "features of item, kind, user, place, tags, price, age, cl"),
        ({"route_by": (("kin",),)}, "Did you mean 'kind'?"),
        (
            {"route_by": (("contxt",),)},
            "views_item, or sides of candidate, context, histories. Did",
        ),
        ({"route_by": (("contxt",),)}, "Did you mean 'context'?"),
        ({"route_by": (("kind", "kind"),)}, "layer 1 reads ['kind', 'kind'], which must be"),
        ({"route_by": (("kind", "candidate"),)}, "reads ['kind', 'candidate'], which must be"),
        ({"route_by": (("kind",),), "query_dim": 3}, "views need query_dim = None, got"),
        ({"route_by": (("kind",),), "tie_keys": True}, "tie_keys = True needs a router for"),
    ],
    ids=str,
)
def test_impossible_features_to_route_by_are_refused(options, message):
    def build():
        experts = InjectionConfig(**{"num_layers": 1, "routing": "sample", **options})
        return build_task(replace(MODEL, hilomoe=experts), SCHEMA)

    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_random_routing_has_no_router_to_train():
    experts = InjectionConfig(num_experts=2, sites=("all",), routing="random")
    backbone = build_task(replace(MODEL, hilomoe=experts), SCHEMA).model.backbone
    assert set(sites_of(backbone)) == HEAD | FFN | ATTENTION
    assert not [name for name, _ in backbone.named_parameters() if name.endswith("expert_keys")]


def test_without_hilomoe_the_model_is_plain():
    assert not sites_of(build_task(replace(MODEL, hilomoe=InjectionConfig(enabled=False)), SCHEMA))


def test_tables_wait_on_meta_and_the_rest_is_real():
    task = build_task(MODEL, SCHEMA)
    assert {p.device.type for p in task.model.sparse.parameters()} == {"meta"}
    assert {p.device.type for p in task.model.backbone.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "bts"}, "model.backbone is 'bts', which is not known. Did you mean 'bst'?"),
        ({"backbone": "xyz"}, "model.backbone is 'xyz', which is not known. Use one of bst, "),
        ({"embedding_dim": 6}, "model.embedding_dim must be a multiple of 4, got 6"),
        ({"embedding_dim": 0}, "model.embedding_dim must be a multiple of 4, got 0"),
        ({"embedding_dim": -4}, "model.embedding_dim must be a multiple of 4, got -4"),
        ({"bst": BSTConfig(num_heads=5)}, "num_heads must divide width, got num_heads=5 and w"),
        ({"bst": BSTConfig(num_heads=0)}, "num_heads must be at least 1, got 0"),
        ({"bst": BSTConfig(num_layers=0)}, "BST.num_layers must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout"),
        (
            {"backbone": "dlrm", "dlrm": DLRMConfig(dense_units=(8, 0))},
            "model.dlrm.dense_units must be widths of at least 1, got (8, 0). Correct them, or",
        ),
        (
            {"backbone": "dcn", "dcn": DCNConfig(dense_units=(-1,))},
            "model.dcn.dense_units must be widths of at least 1, got (-1,). Correct them, or",
        ),
        (
            {"backbone": "dcn", "dcn": DCNConfig(cross_layers=0)},
            "CrossNetwork.num_layers must be at least 1, got 0",
        ),
        (
            {"backbone": "dcn", "dcn": DCNConfig(low_rank=0)},
            "CrossNetwork.low_rank must be at least 1, or null for full matrices, got 0",
        ),
        (
            {"backbone": "dcn", "hilomoe": InjectionConfig(sites=("ffn",))},
            "or a group: DCN has the groups head, cross, dense, all.",
        ),
        (
            {"head": (8, 0)},
            "MLP.hidden must be widths of at least 1, got (8, 0). Correct",
        ),
        (
            {"hilomoe": InjectionConfig(sites=("heads",))},
            "sites pattern 'heads' matches none of the model's nn.Linear: transformers.0",
        ),
        (
            {"hilomoe": InjectionConfig(sites=("head", "fnn"))},
            "Name one of these, or a group: BST has the groups head, ffn, attention, all.",
        ),
        (
            {"backbone": "din", "hilomoe": InjectionConfig(sites=("ffn",))},
            "or a group: DIN has the groups head, attention, all.",
        ),
        (
            {
                "backbone": "dien",
                "dien": DIENConfig(attention="dot"),
                "hilomoe": InjectionConfig(sites=("attention",)),
            },
            "or a group: DIEN has the groups head, gru, all.",
        ),
        (
            {"hilomoe": InjectionConfig(sites=())},
            "model.hilomoe.sites is empty, so there is no place for experts. BST has the groups "
            "head, ffn, attention, all; for the plain backbone set model.hilomoe to null.",
        ),
        (
            {"hilomoe": InjectionConfig(sites=("head", "head.*"))},
            "'head.hidden.0' is matched twice, by 'head.hidden.*' and by 'head.*'",
        ),
    ],
)
def test_an_impossible_model_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_task(replace(MODEL, **options), SCHEMA)


def test_a_schema_without_a_history_is_refused():
    with pytest.raises(ValueError, match="BST needs a behaviour sequence"):
        build_task(MODEL, without(SCHEMA, "sequences"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_histories_that_no_target_can_be_compared_with_are_refused(backbone):
    """As where a column's table has a name of its own in each of its two places."""
    events = IdFeature(name="seen", table="seen_item")
    schema = replace(
        SCHEMA,
        tables={**SCHEMA.tables, "seen_item": 20},
        sequences=(SequenceGroup(name="seen", fields=(events,), max_length=4),),
    )
    config = replace(MODEL, backbone=backbone, hilomoe=InjectionConfig(enabled=False))
    if backbone in READS_NO_TARGET:
        build_task(config, schema)
        return
    message = (
        f"{backbone} compares events with the candidate, but no field of Schema.sequences shares "
        "a table with one of Schema.candidate: seen (seen_item) against item (item), kind (kind). "
        "Give fields that mean the same one table, or take a model.backbone that does not compare "
        "them: interformer, dlrm, dcn."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build_task(config, schema)
    both = (*schema.sequences, *SCHEMA.sequences)  # others of which are compared
    build_task(config, replace(schema, sequences=both))


def test_what_may_be_chosen_is_counted_as_the_widest_features():
    experts = InjectionConfig(num_layers=2, routing="sample", route_by="auto")
    config = replace(MODEL, hilomoe=experts)
    found = with_widest_views(config, SCHEMA).hilomoe.route_by
    assert found is not None
    columns = build_task(replace(MODEL, hilomoe=InjectionConfig(enabled=False)), SCHEMA).model
    widths = {name: len(part) for name, part in columns.sparse.columns.items()}
    assert [widths[name] for (name,) in found] == [max(widths.values())] * 2
    assert found[0] != found[1]
    assert with_widest_views(MODEL, SCHEMA) == MODEL


def test_what_is_not_chosen_yet_is_not_built():
    experts = InjectionConfig(num_layers=2, routing="sample", route_by="auto")
    with pytest.raises(ValueError, match=r"route_by is auto: its features are chosen while"):
        build_task(replace(MODEL, hilomoe=experts), SCHEMA)


def test_one_feature_leaves_nothing_to_choose():
    lonely = replace(SCHEMA, candidate=SCHEMA.candidate[:1], sequences=(), pooled=(), dense=())
    experts = InjectionConfig(num_layers=2, routing="sample", route_by="auto")
    with pytest.raises(ValueError, match=r"the schema has one alone: item\. Set route_by to null"):
        with_widest_views(replace(MODEL, hilomoe=experts), lonely)
