"""The public sets' schemas: with the benchmark's DIN they have its published parameter counts."""

from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from torchrec_hilomoe.config import DINConfig, InjectionConfig, ModelConfig
from torchrec_hilomoe.data.prepare.amazon_electronics import amazon_electronics_schema
from torchrec_hilomoe.data.prepare.criteo import criteo_schema
from torchrec_hilomoe.data.prepare.kuaivideo import kuaivideo_schema
from torchrec_hilomoe.data.prepare.microvideo import microvideo_schema
from torchrec_hilomoe.data.prepare.taobao_ad import taobao_ad_schema
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import Cost, count_cost


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("amazon-electronics", amazon_electronics_schema()),
        ("taobao-ad", taobao_ad_schema()),
        ("kuaivideo", kuaivideo_schema()),
        ("microvideo", microvideo_schema()),
    ],
)
def test_recipes_carry_the_schemas_that_prepare_makes(name, schema):
    text = files("torchrec_hilomoe").joinpath(f"recipes/schemas/{name}.yaml").read_text()
    assert Schema.from_dict(yaml.safe_load(text)).differences(schema) == ()


def test_the_recipe_of_criteo_has_its_columns_and_sizes_of_its_own():
    text = files("torchrec_hilomoe").joinpath("recipes/schemas/criteo.yaml").read_text()
    recipe = Schema.from_dict(yaml.safe_load(text))
    assert recipe.differences(criteo_schema(dict(recipe.tables))) == ()


def din(schema: Schema, *, dim=64, head=(1024, 512, 256), norm=False, attention, hidden) -> Cost:
    config = ModelConfig(
        backbone="din",
        embedding_dim=dim,
        embed_dense=True,
        head=head,
        batch_norm=norm,
        hilomoe=InjectionConfig(enabled=False),
        din=DINConfig(
            attention_units=(512, 256), attention_activation=attention, head_activation=hidden
        ),
    )
    return count_cost(build_task(config, schema), schema, dim)


@pytest.mark.parametrize(
    ("schema", "options", "published"),
    [
        (
            amazon_electronics_schema(),
            {"norm": True, "attention": "dice", "hidden": "dice"},
            5_403_522,
        ),
        (
            taobao_ad_schema(),
            {"dim": 32, "head": (512, 256, 128), "attention": "relu", "hidden": "relu"},
            42_263_682,
        ),
        (kuaivideo_schema(), {"attention": "relu", "hidden": "dice"}, 43_032_835),
        (microvideo_schema(), {"norm": True, "attention": "relu", "hidden": "relu"}, 2_127_234),
    ],
    ids=["amazon-electronics", "taobao-ad", "kuaivideo", "microvideo"],
)
def test_din_has_the_published_number_of_parameters(schema, options, published):
    assert din(schema, **options).parameters["total"] == published


def test_frozen_tables_cost_projections_instead_of_parameters():
    schema = kuaivideo_schema()
    frozen = din(schema, attention="relu", hidden="dice")
    trained = din(replace(schema, frozen={}), attention="relu", hidden="dice")
    projections = 3 * 64 * 64
    assert frozen.parameters["tables"] == trained.parameters["tables"] - 64 * 3_242_317
    assert frozen.parameters["backbone"] == trained.parameters["backbone"] + projections
    # One candidate and a hundred events on either side.
    extra = 2 * 64 * 64 * (1 + 100 + 100)
    assert frozen.flops["backbone"] == trained.flops["backbone"] + extra
    assert frozen.lookup_bytes == trained.lookup_bytes
