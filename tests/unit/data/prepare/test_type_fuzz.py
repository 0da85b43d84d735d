"""Any Arrow type in any place of a schema: read, or one line; never a traceback."""

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st

from tests.unit.data.prepare.test_raw_cases import columns, prepare, ROWS
from torchrec_hilomoe.data.errors import DataError

VALUES: list[tuple[pa.DataType, Any]] = [
    (pa.null(), None),
    (pa.bool_(), True),
    *((kind, 1) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *((kind, 1) for kind in (pa.uint8(), pa.uint16(), pa.uint32())),
    (pa.uint64(), 2**64 - 1),
    (pa.float32(), 0.5),
    (pa.float64(), float("nan")),
    (pa.decimal128(38, 0), Decimal(10**30)),
    (pa.decimal128(10, 2), Decimal("1.50")),
    (pa.decimal256(50, 0), Decimal(7)),
    (pa.date32(), date(2020, 1, 2)),
    (pa.date64(), date(2020, 1, 2)),
    (pa.timestamp("s"), datetime(2020, 1, 2)),
    (pa.timestamp("ns", "UTC"), datetime(2020, 1, 2)),
    (pa.time64("us"), time(1, 2)),
    (pa.duration("s"), timedelta(1)),
    (pa.string(), "x"),
    (pa.large_string(), ""),
    (pa.string_view(), "1"),
    (pa.binary(), b"\xff"),
    (pa.binary(2), b"ab"),
    (pa.binary_view(), b"2"),
    (pa.struct([("a", pa.int64())]), {"a": 1}),
    (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
]
PLACES = list(columns())


@st.composite
def typed(draw: st.DrawFn) -> pa.Array:
    """A column: of a plain type, or of lists of one, or of lists of lists."""
    kind, value = draw(st.sampled_from(VALUES))
    values = [value if draw(st.integers(0, 9)) else None for _ in range(ROWS)]
    for depth in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from([pa.list_, pa.large_list]))(kind)
        fixed = draw(st.booleans()) and depth == 0
        kind = pa.list_(kind.value_type, 2) if fixed else kind
        values = [[value] * (2 if fixed else place % 3) for place, value in enumerate(values)]
    array = pa.array(values, kind)
    plain = pa.types.is_string(kind) or pa.types.is_int32(kind)
    return array.dictionary_encode() if plain and draw(st.booleans()) else array


@pytest.mark.filterwarnings("error")
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.sampled_from(PLACES), typed(), st.sampled_from(["counted", "hashed", "bucketed"]))
def test_any_type_anywhere_is_read_or_one_line(tmp_path_factory, place, array, kind):
    raw = tmp_path_factory.mktemp("fuzz") / "raw"
    (raw / "train").mkdir(parents=True)
    pq.write_table(pa.table({**columns(), place: array}), raw / "train" / "0.parquet")
    schema = {
        "vocabularies": {
            table: {"kind": kind} | ({"buckets": 3} if kind == "bucketed" else {})
            for table in ("item", "tag", "word")
        },
        "tables": {"item": 30, "tag": 30, "word": 50},
    }
    try:
        report = prepare(raw, schema=schema, valid_by="rows", max_bad_rows=ROWS)
        assert report.rows_kept + sum(report.rows_bad.values()) == ROWS
        told = ""
    except DataError as error:
        told = str(error)
    assert "\n" not in told
    assert (raw.parent / "out").exists() == (not told)
