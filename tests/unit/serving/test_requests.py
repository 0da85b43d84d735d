"""Raw values of a request have the ids, and the numbers, that preparing gave them."""

from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.helpers.rounding import assert_same
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.serving.artifact import Artifact
from torchrec_hilomoe.serving.requests import Requests

ROWS = 200
NUMBERS = [1 + row % 8 for row in range(ROWS)]
KEPT = 4  # of a history's events


def numbers(kind: pa.DataType, *, missing: bool = False) -> pa.Array:
    values = [None if missing and it == 1 else Decimal(it) for it in NUMBERS]
    return pa.array(values, pa.decimal128(20, 2)).cast(kind)


def texts(kind: pa.DataType, *, missing: bool = True) -> pa.Array:
    values = [None if missing and it == 1 else f"v{it}" for it in NUMBERS]
    return pa.array(values).cast(kind)


def lists(values: pa.Array) -> pa.Array:
    """Of none to two entries; some are null."""
    taken = values.drop_null()
    rows = [None if row % 9 == 1 else taken[row % 5 : row % 5 + row % 3] for row in range(ROWS)]
    return pa.array([None if it is None else it.to_pylist() for it in rows], pa.list_(taken.type))


WHOLE = {
    **{str(kind): numbers(kind) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())},
    **{str(kind): numbers(kind) for kind in (pa.uint8(), pa.uint32(), pa.uint64())},
    "missing": numbers(pa.int64(), missing=True),
    "float": numbers(pa.float32()),
    "double": numbers(pa.float64(), missing=True),
    "decimal0": numbers(pa.decimal128(20, 0), missing=True),
    "decimal2": numbers(pa.decimal128(20, 2), missing=True),
    "decimal256": numbers(pa.decimal256(40, 3)),
    "bool": pa.array([None if it == 3 else bool(it % 2) for it in NUMBERS]),
    "encoded": numbers(pa.int64(), missing=True).dictionary_encode(),
}
OTHERS = {
    "string": texts(pa.string()),
    "large_string": texts(pa.large_string()),
    "string_view": texts(pa.string_view()),
    "binary": texts(pa.binary()),
    "fixed_binary": texts(pa.binary(2), missing=False),
    "encoded_text": texts(pa.string()).dictionary_encode(),
    "day": pa.array([date(2026, 1, it) for it in NUMBERS], pa.date32()),
    "moment": pa.array([date(2026, 1, it) for it in NUMBERS], pa.date64()),
    "digits": numbers(pa.int64()).cast(pa.string()),
    "fingerprints": pa.array([2**63 + it for it in NUMBERS], pa.uint64()),
}
FRACTIONS = {
    "half": pa.array([it / 2 for it in NUMBERS], pa.float64()),
    "single": pa.array([it / 10 for it in NUMBERS], pa.float32()),
    "price": pa.array([Decimal(it) / 4 for it in NUMBERS], pa.decimal128(10, 2)),
    "worded": pa.array([str(it / 10) for it in NUMBERS]),
}
MANY = {
    "many_int32": lists(numbers(pa.int32())),
    "many_uint64": lists(numbers(pa.uint64())),
    "many_decimal0": lists(numbers(pa.decimal128(20, 0))),
    "many_string": lists(texts(pa.string())),
    "many_binary": lists(texts(pa.binary())),
    "many_day": lists(OTHERS["day"]),
    "many_large": lists(texts(pa.string())).cast(pa.large_list(pa.string())),
    "many_fixed": pa.array([[f"v{it}"] * 3 for it in NUMBERS], pa.list_(pa.string(), 3)),
}
DENSE = {
    "dense_decimal": pa.array([Decimal(it) / 8 for it in NUMBERS], pa.decimal128(30, 20)),
    "dense_decimal0": pa.array([Decimal(10**20 + it) for it in NUMBERS], pa.decimal128(30, 0)),
    "dense_bool": pa.array([bool(it % 2) for it in NUMBERS]),
    "dense_uint64": pa.array([2**63 + it for it in NUMBERS], pa.uint64()),
    "dense_encoded": numbers(pa.int64()).dictionary_encode(),
}
ONE = {
    **{f"hashed_{name}": column for name, column in {**WHOLE, **OTHERS}.items()},
    **{f"shared_{name}": column for name, column in {**WHOLE, **OTHERS}.items()},
    **{
        f"counted_{name}": column
        for name, column in {**WHOLE, **OTHERS}.items()
        if name != "fingerprints"  # numbers beyond 63 bits are for hashed tables
    },
    **{f"bucketed_{name}": column for name, column in {**WHOLE, **FRACTIONS}.items()},
    **{f"plain_{name}": column for name, column in WHOLE.items()},
}
LISTS = {
    **{f"hashed_{name}": column for name, column in MANY.items()},
    **{f"counted_{name}": column for name, column in MANY.items()},
    **{f"bucketed_many_{name}": lists(column) for name, column in FRACTIONS.items()},
}
HISTORY = lists(texts(pa.string()))


def table_of(name: str) -> str:
    """The table of a column: its own, whose vocabulary its name begins with; or one for several."""
    return "shared" if name.startswith("shared_") else name


def description() -> dict[str, Any]:
    names = [*ONE, *LISTS, "history"]
    rules: dict[str, dict[str, Any]] = {
        "hashed": {"kind": "hashed"},
        "counted": {"kind": "counted", "unknown": "last"},
        "bucketed": {"kind": "bucketed", "buckets": 3},
        "history": {"kind": "counted"},
        "shared": {"kind": "hashed"},
    }
    kinds = {name: name.partition("_")[0] for name in names}
    sizes = {name: 9 if kind == "plain" else 5000 for name, kind in kinds.items()}
    return {
        "dataset": "types",
        "tables": {
            "row": ROWS,
            **{
                table_of(n): size
                for n, size in sizes.items()
                if kinds[n] in ("plain", "hashed", "shared")
            },
        },
        "candidate": [{"name": "row", "table": "row"}],
        "sequences": [
            {
                "name": "history",
                "fields": [{"name": "history", "table": "history"}],
                "max_length": KEPT,
            }
        ],
        "pooled": [
            *({"name": name, "table": table_of(name)} for name in ONE),
            *({"name": name, "table": name, "max_length": KEPT} for name in LISTS),
        ],
        "dense": list(DENSE),
        "group": "row",
        "vocabularies": {
            table_of(name): rules[kind] for name, kind in kinds.items() if kind != "plain"
        },
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    (folder / "raw").mkdir()
    row = pa.array(range(ROWS))
    label = pa.array([it % 2 for it in range(ROWS)])
    columns = {**ONE, **LISTS, **DENSE, "history": HISTORY, "row": row, "label": label}
    pq.write_table(pa.table(columns), folder / "raw" / "train.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(description()))
    out = folder / "out"
    report = prepare_parquet(
        raw=str(folder / "raw"),
        schema=str(folder / "schema.yaml"),
        out=str(out),
        valid_percent=20,
        test_percent=20,
    )
    assert report.rows_kept == ROWS
    return folder


@pytest.fixture(scope="module")
def requests(prepared: Path) -> Requests:
    out = prepared / "out"
    schema = Schema.load(str(out / "schema.json"))
    artifact = SimpleNamespace(path=out, schema=schema, file=lambda name: str(out / name))
    return Requests(cast(Artifact, artifact))


@pytest.fixture(scope="module")
def both(prepared: Path, requests: Requests) -> tuple[pa.Table, pa.Table]:
    """The raw rows, and the same as they were prepared."""
    splits = [pq.read_table(prepared / "out" / split) for split in ("train", "valid", "test")]
    return (
        pq.read_table(prepared / "raw" / "train.parquet"),
        pa.concat_tables(splits).sort_by("row"),
    )


@pytest.mark.parametrize("name", [*ONE, *LISTS, "history"])
def test_ids_are_those_of_preparing(requests, both, name):
    raw, want = both
    found = requests.encode(raw.select([name]))[name]
    assert found.to_pylist() == want[name].to_pylist()


def test_a_number_and_its_text_have_one_id_in_a_shared_table(both):
    _, prepared = both
    ids = prepared["shared_digits"].to_pylist()
    assert len(set(ids)) > 1
    for name in ("int64", "uint64", "float", "decimal256"):
        assert prepared[f"shared_{name}"].to_pylist() == ids, name


def test_numbers_are_those_of_preparing(requests, both):
    raw, want = both
    dense = requests.decode(requests.encode(requests.table_of(raw))).rows.dense
    wanted = np.stack([want[name].to_numpy() for name in DENSE], axis=1)
    assert_same(torch.from_numpy(dense.copy()), torch.from_numpy(wanted))


@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(10, 2)], ids=str)
@pytest.mark.parametrize("rule", ["hashed", "counted", "plain"])
def test_numbers_that_are_not_whole_are_no_ids(requests, kind, rule):
    table = pa.table({f"{rule}_int64": pa.array([Decimal(7), Decimal("7.5")]).cast(kind)})
    with pytest.raises(ValueError, match=r"_int64' has values of type .* which 7\.5 is not; conv"):
        requests.encode(table)


@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(10, 2)], ids=str)
def test_lists_of_ids_are_not_read_from_types_with_fractions(requests, kind):
    """Nor does preparing read them."""
    values = pa.array([[Decimal(7)]], pa.list_(pa.decimal128(10, 2))).cast(pa.list_(kind))
    told = r"column 'hashed_many_int32' has values of type (double|decimal128\(10, 2\)), but"
    with pytest.raises(ValueError, match=told):
        requests.encode(pa.table({"hashed_many_int32": values}))


def test_what_lies_under_a_null_list_is_no_entry(requests):
    values, offsets = pa.array(["v2", "v3", "v4", "v5"]), [0, 1, 2, 4]
    mask = pa.array([False, True, False])
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=mask)
    want = requests.encode(pa.table({"history": [["v2"], [], ["v4", "v5"]]}))["history"].to_pylist()
    assert requests.encode(pa.table({"history": column}))["history"].to_pylist() == want
    sliced = column.slice(1)
    assert requests.encode(pa.table({"history": sliced}))["history"].to_pylist() == want[1:]


def test_lists_that_are_all_null_are_empty(requests):
    found = requests.encode(pa.table({"history": pa.nulls(3)}))["history"]
    assert found.to_pylist() == [[], [], []]
    assert requests.encode(pa.table({"history": pa.nulls(0)}))["history"].to_pylist() == []


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string(), 2),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.binary()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
    ids=str,
)
def test_lists_of_every_kind_are_read(requests, kind):
    lists = [["v2", "v3"], None, ["v4", "v4"]]
    want = requests.encode(pa.table({"history": lists}))["history"].to_pylist()
    assert want[1] == []
    assert (
        requests.encode(pa.table({"history": pa.array(lists, kind)}))["history"].to_pylist() == want
    )
