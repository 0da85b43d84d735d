"""The recipes that are shipped: each one builds, and the public sets' have the published sizes."""

from functools import cache

import pytest

from torchrec_hilomoe.command_line import parse_run, recipe_names
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import BACKBONES, build_task, with_widest_views
from torchrec_hilomoe.models.flops import count_cost

SETS = (
    "amazon-electronics",
    "taobao-ad",
    "kuaivideo",
    "microvideo",
    "movielens",
    "amazon-toys",
    "amazon-beauty",
    "trivago",
)
NEEDS_NO_HISTORY = ("dlrm", "dcn")
RECIPES = [
    *(
        f"{backbone}-{name}"
        for backbone in BACKBONES
        if backbone not in NEEDS_NO_HISTORY
        for name in SETS
    ),
    *(f"{backbone}-criteo" for backbone in NEEDS_NO_HISTORY),
]
# BARS's tuned runs; TransAct is FuxiCTR's count at these widths.
PUBLISHED = {
    "din-amazon-electronics": 5_403_522,
    "dien-amazon-electronics": 5_369_602,
    "bst-amazon-electronics": 5_301_057,
    "transact-amazon-electronics": 7_220_609,
    "din-taobao-ad": 42_263_682,
    "dien-taobao-ad": 42_376_194,
    "bst-taobao-ad": 42_052_065,
    "din-kuaivideo": 43_032_835,
    "dien-kuaivideo": 43_034_627,
    "bst-kuaivideo": 42_831_233,
    "din-microvideo": 2_127_234,
    "dien-microvideo": 2_095_874,
    "bst-microvideo": 1_832_065,
}


# What counts of parameters do not show of BARS's tuned runs: rate and batch of a set, whether its
# heads are normalised; and of DIN attention's dropout and softmax, of BST heads and pooling.
RUNS = {
    "amazon-electronics": ((5e-4, 1024, True), (0.1, True), (8, True, "target")),
    "taobao-ad": ((1e-3, 8192, False), (0.4, False), (4, True, "mean")),
    "kuaivideo": ((1e-3, 8192, False), (0.2, False), (8, False, "target")),
    "microvideo": ((5e-4, 2048, True), (0.2, True), (4, False, "target")),
}


@cache
def recipe(name: str, *overrides: str) -> RunConfig:
    return parse_run(["--config", name, *overrides]).config


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_a_recipe_has_the_tuned_settings(name):
    run, din, bst = RUNS[name]
    for backbone in ("din", "dien", "bst"):
        config = recipe(f"{backbone}-{name}")
        train, model = config.train, config.model
        assert (train.learning_rate, train.batch_size, model.batch_norm) == run
        assert train.max_grad_norm == 10
        if backbone == "din":
            assert (model.din.attention_dropout, model.din.softmax) == din
        if backbone == "bst":
            assert (model.bst.num_heads, model.bst.residual, model.bst.pooling) == bst
    config = recipe(f"interformer-{name}")
    assert (config.model.head, config.train.batch_size) == ((1024, 512, 256, 128), 2048)


def test_every_backbone_has_a_recipe_for_every_set_that_it_is_for():
    own = {f"{backbone}-parquet" for backbone in NEEDS_NO_HISTORY}
    assert {*RECIPES, *own} < set(recipe_names())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
def test_a_recipe_builds_without_files(name):
    config = recipe(name)
    assert config.model.backbone == name.partition("-")[0]
    schema = config.data.data_schema
    assert schema is not None
    task = build_task(with_widest_views(config.model, schema), schema)
    assert sites_of(task)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_recipe_has_the_published_number_of_parameters(name, published):
    config = recipe(name, "--model.hilomoe", "null")
    schema = config.data.data_schema
    assert schema is not None
    cost = count_cost(build_task(config.model, schema), schema, config.model.embedding_dim)
    assert cost.parameters["total"] == published
