"""Schema: refusals by message, keys in order, and the way through JSON."""

import json
from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA
from torchrec_hilomoe.data.schema import (
    FrozenTable,
    IdFeature,
    PooledFeature,
    Schema,
    SequenceGroup,
    VocabularyRule,
)


def test_survives_json_and_files(tmp_path):
    assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
    SCHEMA.save(str(tmp_path / "schema.json"))
    assert Schema.load(str(tmp_path / "schema.json")) == SCHEMA


def test_another_version_is_refused():
    raw = {**json.loads(SCHEMA.to_json()), "version": 7}
    with pytest.raises(ValueError, match=r"version is 7, this package reads 1 to 2; prepare"):
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
        (
            {"tables": {**SCHEMA.tables, "kind": 0}},
            r"tables\['kind'\] must be a whole number of at least 1.*got 0",
        ),
        ({"group": "price"}, r"group 'price' is a list, a dense column, the weight or the label"),
        ({"group": "label"}, r"group 'label' is a list"),
        ({"group": "tags"}, r"group 'tags' is a list"),
        ({"group": "weight", "weight": "weight"}, r"group 'weight' is a list.* the weight"),
        ({"time": "price"}, r"names \['price'\] occur twice"),
        ({"sequences": (replace(CLICKS, time="item"),)}, r"names \['item'\] occur twice"),
        (
            {"frozen": {"itm": FrozenTable(width=8, file="itm.npy")}},
            r"frozen names table 'itm'.*Did you mean 'item'",
        ),
        (
            {"vocabularies": {"usr": VocabularyRule(kind="hashed")}},
            r"vocabularies names table 'usr'.*Did you mean 'user'",
        ),
        (
            {
                "tables": {**SCHEMA.tables, "kind": 1},
                "vocabularies": {"kind": VocabularyRule(kind="hashed")},
            },
            r"tables\['kind'\] is 1, but row 0 is padding.* hashed vocabulary .* at least 2",
        ),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SCHEMA, **change)


def a_sequence(**change):
    return SequenceGroup(**{"name": "clicks", "fields": CLICKS.fields, "max_length": 4, **change})


def a_frozen_table(**change):
    return FrozenTable(**{"width": 8, "file": "item.npy", **change})


def a_rule(**change):
    return VocabularyRule(**{"kind": "counted", **change})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            a_sequence,
            {"max_length": 0},
            r"sequences\['clicks'\] needs fields and max_length of at least 1.*max_length 0",
        ),
        (a_sequence, {"fields": ()}, r"got 0 fields"),
        (
            a_sequence,
            {"keep": "middle"},
            r"sequences\['clicks'\]\.keep must be 'last' or 'first', got 'middle'",
        ),
        (
            lambda **change: PooledFeature(name="tags", table="tag", **change),
            {"max_length": 0},
            r"pooled\['tags'\]\.max_length must be at least 1 .*got 0",
        ),
        (a_frozen_table, {"width": 6}, r"width must be a multiple of 4, got 6; pad"),
        (a_frozen_table, {"file": "/etc/item.npy"}, r"below the schema's folder, got '/etc"),
        (a_frozen_table, {"file": "../item.npy"}, r"below the schema's folder, got '\.\./item"),
        (
            a_rule,
            {"kind": "guessed"},
            r"kind must be one of counted, given, hashed, bucketed, got 'guessed'",
        ),
        (a_rule, {"unknown": "first"}, r"unknown must be one of zero, last, got 'first'"),
        (a_rule, {"kind": "bucketed"}, r"buckets is None for a bucketed .* such as 32"),
        (a_rule, {"buckets": 8}, r"buckets is 8 for a counted vocabulary"),
        (a_rule, {"kind": "bucketed", "buckets": 1}, r"buckets must be from 2 to 65536, got 1"),
        (a_rule, {"min_count": 0}, r"min_count is 0 for a counted vocabulary"),
        (
            a_rule,
            {"kind": "hashed", "unknown": "last"},
            r"unknown is 'last' for a hashed vocabulary.*leave it out",
        ),
        (a_rule, {"kind": "hashed", "min_count": 2}, r"min_count is 2 for a hashed vocabulary"),
    ],
)
def test_each_part_refuses_what_is_impossible(part, change, message):
    with pytest.raises(ValueError, match=message):
        part(**change)


WHOLE = replace(
    SCHEMA,
    sequences=(replace(CLICKS, time="clicks_time"), SCHEMA.sequences[1]),
    time="time",
    weight="weight",
    frozen={"kind": FrozenTable(width=8, file="kind.npy")},
    vocabularies={"item": VocabularyRule(kind="counted", min_count=3, unknown="last", file="i")},
)


def test_what_version_2_added_survives_json_and_makes_columns():
    assert Schema.from_json(WHOLE.to_json()) == WHOLE
    assert WHOLE.event_times == ("clicks_time",)
    assert WHOLE.columns[-3:] == ("clicks_time", "time", "weight")


def test_a_file_of_version_1_is_read():
    raw = json.loads(SCHEMA.to_json())
    for key in ("time", "weight", "frozen", "vocabularies"):
        del raw[key]
    for group in raw["sequences"]:
        del group["time"]
    assert Schema.from_json(json.dumps({**raw, "version": 1})) == SCHEMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, r"^Schema has no 'candidates'\. Did you mean 'candidate'\?"),
        ({"pooled": [{"nam": "user", "table": "user"}]}, r"Schema\.pooled has no 'nam'\. Did"),
        ({"pooled": [{"name": "user"}]}, r"Schema\.pooled lacks table"),
        ({"frozen": {"item": {"width": 8}}}, r"Schema\.frozen\['item'\] lacks file"),
        ({"tables": {**SCHEMA.tables, "item": "many"}}, r"\['item'\] must be a whole .*got 'many'"),
        ({"tables": 5}, r"^Schema\.tables is 5, and must be a mapping of names to values\.$"),
        ({"candidate": {"name": "a"}}, r"^Schema\.candidate is a mapping, and must be a list\.$"),
        ({"pooled": [7]}, r"^Schema\.pooled is 7, but must be a mapping"),
        ({"dataset": None}, r"^Schema\.dataset is null, and must be text\.$"),
        ({"group": ["user"]}, r"^Schema\.group is a list, and must be text\.$"),
        ({"dense": ["a", 3]}, r"^Schema\.dense\[1\] is 3, and must be text\.$"),
        ({"sequences": [{"fields": 3}]}, r"^Schema\.sequences\.fields is 3, and must be a list\.$"),
        (
            {"pooled": [{"name": "user", "table": "user", "max_length": "1"}]},
            r"^Schema\.pooled\.max_length is '1', and must be a whole number\.$",
        ),
        ({"vocabularies": {"item": None}}, r"Schema\.vocabularies\['item'\] is None, but must be"),
    ],
)
def test_misspelt_and_missing_keys_are_named(change, message):
    raw = json.loads(SCHEMA.to_json())
    with pytest.raises(ValueError, match=message):
        Schema.from_json(json.dumps({**raw, **change}))


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, ()),
        ({"tables": {**SCHEMA.tables, "item": 30}}, ("tables['item']: 20 here, 30 there",)),
        (
            {"sequences": (replace(CLICKS, max_length=9), SCHEMA.sequences[1])},
            ("sequences['clicks']['max_length']: 4 here, 9 there",),
        ),
        ({"dense": ("price",)}, ("dense: ['price', 'age'] here, ['price'] there",)),
        (
            {"pooled": SCHEMA.pooled[:2]},
            ("pooled['tags']: {'table': 'tag', 'max_length': 2} here, absent there",),
        ),
        (
            {"candidate": SCHEMA.candidate[::-1]},
            ("candidate: in the order ['item', 'kind'] here, ['kind', 'item'] there",),
        ),
        (
            {"time": "at", "label": "clk"},
            ("label: 'label' here, 'clk' there", "time: None here, 'at' there"),
        ),
    ],
)
def test_differences_are_told_part_by_part(change, want):
    assert SCHEMA.differences(replace(SCHEMA, **change)) == want
