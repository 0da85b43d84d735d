"""Any Arrow type in a table: ``schema init`` drafts a schema that ``prepare parquet`` takes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st

from tests.unit.data.prepare.test_raw_cases import ROWS
from tests.unit.data.prepare.test_type_fuzz import typed
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.data.prepare.schema_draft import draft_schema

NAMES = ("value", "user_id", "shown_at", "history", "price", "past_items")


@pytest.mark.filterwarnings("error")
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.sampled_from(NAMES), typed(), typed())
def test_a_draft_of_any_types_is_read_or_one_line(tmp_path_factory, name, array, other):
    raw = tmp_path_factory.mktemp("fuzz") / "raw"
    (raw / "train").mkdir(parents=True)
    columns = {
        "click": [place % 2 for place in range(ROWS)],
        "item": [f"i{place % 3}" for place in range(ROWS)],
        name: array,
        "more": other,
    }
    pq.write_table(pa.table(columns), raw / "train" / "0.parquet")
    path = str(raw.parent / "mine.yaml")
    try:
        draft_schema([str(raw / "train" / "0.parquet")], out=path)
        report = prepare_parquet(
            raw=str(raw),
            schema=path,
            out=str(raw.parent / "out"),
            valid_by="rows",
            max_bad_rows=ROWS,
            fill_dense=0.0,
        )
        told = ""
        assert report.rows_kept + sum(report.rows_bad.values()) == ROWS
    except DataError as error:
        told = str(error)
    assert "\n" not in told
    assert ", but " not in told, told  # as a type is refused that no row can satisfy
