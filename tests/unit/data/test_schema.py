"""Schema: refusals by message, keys in order, and the way through JSON."""

import json
from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema


def test_survives_json_and_files(tmp_path):
    assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
    SCHEMA.save(str(tmp_path / "schema.json"))
    assert Schema.load(str(tmp_path / "schema.json")) == SCHEMA


def test_another_version_is_refused():
    raw = {**json.loads(SCHEMA.to_json()), "version": 7}
    with pytest.raises(ValueError, match=r"version is 7, this package reads 1; prepare"):
        Schema.from_json(json.dumps(raw))


def test_keys_and_columns_are_in_order():
    assert SCHEMA.unpooled_keys == ("item", "kind", "clicks_item", "clicks_kind", "views_item")
    assert SCHEMA.pooled_keys == ("user", "place", "tags")
    assert SCHEMA.columns == (*SCHEMA.unpooled_keys, *SCHEMA.pooled_keys, "price", "age", "label")


def test_the_group_may_be_a_column_of_its_own():
    assert replace(SCHEMA, group="session").columns[-1] == "session"


CLICKS = SCHEMA.sequences[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": ()}, r"Schema\.candidate is empty"),
        (
            {"pooled": (PooledFeature(name="item", table="item"),)},
            r"names \['item'\] occur twice",
        ),
        ({"dense": ("price", "price")}, r"names \['price'\] occur twice"),
        ({"dense": ("label",)}, r"names \['label'\] occur twice"),
        ({"label": "item"}, r"names \['item'\] occur twice"),
        (
            {"candidate": (IdFeature(name="item", table="itm"),)},
            r"feature 'item' wants table 'itm'.*Did you mean 'item'",
        ),
        ({"tables": {**SCHEMA.tables, "kind": 0}}, r"tables\['kind'\] must be at least 1.*got 0"),
        (
            {"sequences": (replace(CLICKS, max_length=0),)},
            r"sequences\['clicks'\] needs fields and max_length of at least 1.*max_length 0",
        ),
        ({"sequences": (replace(CLICKS, fields=()),)}, r"got 0 fields"),
        (
            {"sequences": (replace(CLICKS, keep="middle"),)},
            r"sequences\['clicks'\]\.keep must be 'last' or 'first', got 'middle'",
        ),
        (
            {"pooled": (PooledFeature(name="tags", table="tag", max_length=0),)},
            r"pooled\['tags'\]\.max_length must be at least 1 .*got 0",
        ),
        ({"group": "price"}, r"group 'price' is a list, a dense column or the label"),
        ({"group": "label"}, r"group 'label' is a list"),
        ({"group": "tags"}, r"group 'tags' is a list"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SCHEMA, **change)
