"""Events come back by users, each once and in order, whatever runs and parts they were cut into."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_hilomoe.data.prepare import event_runs
from torchrec_hilomoe.data.prepare.event_runs import EventRuns


def events_of(seed: int, rows: int, users: int, *, text: bool) -> pa.Table:
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.5, size=rows) % users
    return pa.table(
        {
            "user": [f"U{number}é" for number in user] if text else user,
            "time": rng.integers(0, 5, size=rows),
            "line": np.arange(rows),
            "value": rng.random(rows),
        }
    )


@settings(max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(1, 300),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1 << 8, 1 << 13),
)
def test_parts_in_order_are_the_sorted_events(
    tmp_path_factory, seed, rows, users, text, pieces, least, limit
):
    events = events_of(seed, rows, users, text=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_runs, "RUN_BYTES", limit)
        patch.setattr(event_runs, "PART_BYTES", limit)
        runs = EventRuns(str(tmp_path_factory.mktemp("runs")), ["user", "time", "line"])
        for part in np.array_split(np.random.default_rng(seed).permutation(rows), pieces):
            runs.add(events.take(pa.array(part)))
        parts = runs.parts(least)
        found = [runs.read(part) for part in parts]
    order = [(name, "ascending") for name in ("user", "time", "line")]
    assert pa.concat_tables(found).equals(events.sort_by(order))
    seen = [set(part["user"].to_pylist()) for part in found]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert all(seen)


def test_parts_fit_the_limit_and_are_as_many_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(event_runs, "RUN_BYTES", 1 << 15)
    monkeypatch.setattr(event_runs, "PART_BYTES", 1 << 14)
    events = events_of(0, 20_000, 5000, text=False)
    events = events.set_column(0, "user", pa.array(np.random.default_rng(0).permutation(20_000)))
    runs = EventRuns(str(tmp_path), ["user", "time", "line"])
    for start in range(0, 20_000, 1000):
        runs.add(events.slice(start, 1000))
    sizes = [runs.read(part).nbytes for part in runs.parts(1)]
    assert len(sizes) == -(-events.nbytes // (1 << 14))
    assert max(sizes) < 1.5 * (1 << 14)
    few = EventRuns(str(tmp_path), ["user", "time", "line"])
    few.add(events.slice(0, 100))
    assert len(few.parts(4)) == 4
