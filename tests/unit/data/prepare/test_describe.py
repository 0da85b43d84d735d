"""Descriptions against counts by hand, and every sign of a leak."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import SCHEMA, toy_table, write_folder
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.describe import describe
from torchrec_hilomoe.data.prepare.describe_plots import (
    _label_rate,
    _lengths,
    _vocabularies,
    describe_and_draw,
)
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

SHOP = Schema(
    dataset="shop",
    tables={"item": 10, "kind": 4},
    candidate=(IdFeature(name="item", table="item"),),
    sequences=(
        SequenceGroup(
            name="clicks",
            fields=(
                IdFeature(name="clicked", table="item"),
                IdFeature(name="clicked_kind", table="kind"),
            ),
            max_length=5,
            time="clicked_at",
        ),
    ),
    group="user",
    time="at",
)
TYPES = pa.schema(
    [
        ("item", pa.int32()),
        ("clicked", pa.list_(pa.int32())),
        ("clicked_kind", pa.list_(pa.int32())),
        ("clicked_at", pa.list_(pa.int64())),
        ("label", pa.int8()),
        ("user", pa.int64()),
        ("at", pa.int64()),
    ]
)


def row(item, clicked, label, user, at, times=None):
    return {
        "item": item,
        "clicked": clicked,
        "clicked_kind": [1] * len(clicked),
        "clicked_at": [at - 10 + k for k in range(len(clicked))] if times is None else times,
        "label": label,
        "user": user,
        "at": at,
    }


TRAIN = [
    row(3, [1, 2], 1, 7, 100),
    row(4, [4, 9], 0, 7, 101),
    row(0, [0], 0, 8, 102),  # padding is in no history
    row(5, [], 1, 9, 103),
]
VALID = [row(6, [3], 1, 10, 110), row(6, [2], 0, 9, 111)]
TEST = [row(1, [3, 3, 3], 0, 7, 120), row(1, [2], 1, 11, 121)]


def folder(path: Path, *, held_out_by=None, **changed) -> str:
    rows = {"train": TRAIN, "valid": VALID, "test": TEST, **changed}
    for split, found in rows.items():
        (path / split).mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist(found, schema=TYPES),
            path / split / "part-0.parquet",
            row_group_size=3,
        )
    SHOP.save(str(path / "schema.json"))
    options = {"held_out_by": held_out_by}
    splits = {split: {"rows": len(found)} for split, found in rows.items()}
    (path / "report.json").write_text(json.dumps({"options": options, "splits": splits}))
    (path / "_SUCCESS").touch()
    return str(path)


def test_counts_are_those_by_hand(tmp_path):
    found = describe(folder(tmp_path / "d"))
    train = found.splits["train"]
    assert (train.rows, train.clicks) == (4, 2)
    assert train.lengths["clicks"].tolist() == [1, 1, 2]
    assert train.ids["item"].tolist() == [2, 1, 1, 1, 2, 1, 0, 0, 0, 1]
    assert train.ids["kind"].tolist() == [0, 5, 0, 0]
    assert train.target_in_history == {"item in clicked": [0, 1]}
    assert train.events_backwards == {"clicks": 0}
    assert train.events_after_request == {"clicks": 0}
    assert (train.first_time, train.last_time) == (100, 103)
    assert found.shared_groups == {
        "train and valid": 1,
        "train and test": 1,
        "valid and test": 0,
    }
    assert found.warnings == ()
    summary = json.loads(found.to_json())
    assert summary["splits"]["train"]["label_rate"] == 0.5
    assert summary["splits"]["train"]["lengths"]["clicks"] == {
        **{"p0": 0, "p10": 0, "p50": 1, "p90": 2, "p99": 2, "p100": 2},
        "mean": 1.25,
    }
    assert summary["splits"]["train"]["ids"]["item"]["seen"] == 7
    assert summary["splits"]["train"]["target_in_history"] == {
        "item in clicked": {"share_of_clicks": 0.0, "share_of_other_rows": 0.5}
    }


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        (
            {"train": [row(3, [1, 3], 1, 7, 9), row(2, [1], 0, 7, 9)]},
            "train: item in clicked for 100.0% of clicks and 0.0% of other rows, which tells",
        ),
        (
            {"train": [row(3, [1, 2], 1, 7, 9, [5, 4]), row(2, [1], 0, 7, 9)]},
            "train: 1 rows have events of 'clicks' that run backwards",
        ),
        (
            {"test": [row(3, [1, 2], 1, 7, 200, [5, 201]), row(2, [1], 0, 7, 200)]},
            "test: 1 rows have events of 'clicks' after the request",
        ),
        (
            {"train": [row(3, [1], 1, 7, 115), row(2, [1], 0, 7, 9)]},
            "train ends at 115, after valid begins at 110",
        ),
        ({"train": [row(3, [12], 1, 7, 9), row(2, [1], 0, 7, 9)]}, "train: 1 ids are outside"),
        ({"valid": [row(3, [1], 1, 70, 110)]}, "valid: all labels are equal"),
        (
            {
                "train": [row(3, [1], 1, 7, 9), row(2, [1], 0, 7, 9)],
                "valid": [row(3, [1], 1, 70, 110), row(0, [1, 0], 0, 70, 110)],
            },
            "valid: 40.0% of the ids of table 'item' are 0, which stands for unknown values and "
            "is never trained",
        ),
        (
            {"held_out_by": "group"},
            "1 groups are in train and in valid, which were to be apart",
        ),
    ],
)
def test_each_sign_of_a_leak_is_told(tmp_path, changed, warning):
    (found,) = describe(folder(tmp_path / "d", **changed)).warnings
    assert found.startswith(warning)


def test_users_may_be_shared_where_the_split_is_by_time(tmp_path):
    assert describe(folder(tmp_path / "d", held_out_by="time")).warnings == ()


def test_every_kind_of_feature_is_described(tmp_path):
    path = tmp_path / "toy"
    (path / "train").mkdir(parents=True)
    pq.write_table(toy_table(50), path / "train" / "a.parquet")
    replace(SCHEMA, dataset="toy").save(str(path / "schema.json"))
    (path / "_SUCCESS").touch()
    train = describe(str(path)).splits["train"]
    tags = toy_table(50)["tags"].to_pylist()
    assert train.ids["tag"].sum() == sum(map(len, tags))
    assert set(train.target_in_history) == {
        "item in clicks_item",
        "item in views_item",
        "kind in clicks_kind",
    }


def test_pictures_are_drawn(tmp_path):
    describe_and_draw(folder(tmp_path / "d"), plots=str(tmp_path / "plots"))
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["label_rate.png", "lengths.png", "vocabularies.png"]


@pytest.mark.parametrize("make", [_label_rate, _lengths, _vocabularies])
def test_every_picture_has_a_title_and_says_what_its_axes_are(tmp_path, make):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    make(axes, describe(folder(tmp_path / "d")).splits)
    assert axes.get_title()
    assert axes.get_ylabel()
    assert make is not _lengths or axes.get_xscale() == "symlog"


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "matplotlib>=3.8,<4"'):
        describe_and_draw(folder(tmp_path / "d"), plots=str(tmp_path / "plots"))


def test_what_is_no_prepared_folder_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"there is no data folder .*nowhere.*torchrec_hilomoe prepare"
    ):
        describe(str(tmp_path / "nowhere"))
    whole = folder(tmp_path / "d")
    (tmp_path / "d" / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report\.json is not JSON"):
        describe(whole)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_folder_of_another_engine_may_lack_rows_and_a_report(tmp_path, split):
    splits = {"train": [toy_table(9)], "valid": [toy_table(4)], "test": [toy_table(4)]}
    path = write_folder(tmp_path / "d", splits | {split: [toy_table(0)]})
    assert split not in describe(str(path)).splits
    assert len(describe(str(path)).splits) == 2


def test_rows_are_those_of_files_whatever_the_report_says(tmp_path):
    path = write_folder(tmp_path / "d", {"train": [toy_table(9)], "valid": [toy_table(4)]})
    (path / "report.json").write_text(json.dumps({"splits": {"valid": {"rows": 0}}}))
    assert describe(str(path)).splits["valid"].rows == 4
