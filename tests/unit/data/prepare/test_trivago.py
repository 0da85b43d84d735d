"""trivago: rows against a slow definition, no leaks, and what bad raw rows get."""

from collections import Counter, defaultdict
from math import log1p
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.prepare.trivago import prepare_trivago

REAL = Path(__file__).parents[4].parent / "shared" / "data" / "trivago"
SPLITS = ("train", "valid", "test")
ACTIONS = ("interaction item image", "search for item", "filter selection", "clickout item")


def random_actions(seed, count=120):
    """Actions of four users in no order, at moments that several of them may share."""
    rng = np.random.default_rng(seed)
    actions = []
    for step, moment in enumerate(sorted(rng.integers(0, 60, size=count).tolist())):
        kind = ACTIONS[rng.integers(4)]
        hotels = rng.permutation(30)[: rng.integers(1, 5)].tolist()
        request = kind == "clickout item"
        reference = str(rng.choice(hotels if rng.random() < 0.9 else [99]))
        actions.append(
            {
                "user_id": f"U{rng.integers(4)}",
                "session_id": "S",
                "timestamp": 1_541_000_000 + moment,
                "step": step,
                "action_type": kind,
                "reference": "Focus on Rating" if kind == "filter selection" else reference,
                "platform": str(rng.choice(["FR", "DE"])),
                "city": ("Paris", "Rome", None)[rng.integers(3)],
                "device": "mobile",
                "current_filters": (None, "Wifi", "Wifi|Pool")[rng.integers(3)]
                if request
                else None,
                "impressions": "|".join(map(str, hotels)) if request else None,
                "prices": "|".join(str(10 * hotel) for hotel in hotels) if request else None,
            }
        )
    return [actions[at] for at in rng.permutation(count)]


def write_raw(folder, actions):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(actions), folder / "sessions.parquet")
    return str(folder)


def rows_of(folder, split):
    return pq.read_table(folder / split).to_pylist()


def ids_by_count(values):
    counts = Counter(values)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    return defaultdict(int, {value: 1 + rank for rank, value in enumerate(ranked)})


def parts(text):
    return text.split("|") if text else []


def expected_rows(actions, max_history):
    """The definition of the rows, one request at a time: ``{split: [row]}``."""
    requests = [action for action in actions if action["action_type"] == "clickout item"]
    moments = sorted(request["timestamp"] for request in requests)
    borders = [moments[len(moments) * percent // 100] for percent in (80, 90)]
    hotel_actions = [action for action in actions if action["action_type"] != "filter selection"]
    trained = [request for request in requests if request["timestamp"] < borders[0]]
    known = [action for action in hotel_actions if action["timestamp"] < borders[0]]
    shown = [int(hotel) for request in trained for hotel in parts(request["impressions"])]
    items = ids_by_count([*shown, *(int(action["reference"]) for action in known)])
    kinds = ids_by_count(action["action_type"] for action in known)
    filters = ids_by_count(name for r in trained for name in parts(r["current_filters"]))
    cities = ids_by_count(request["city"] for request in trained if request["city"])
    rows = {split: [] for split in SPLITS}
    for request in requests:
        history = sorted(
            (
                action
                for action in hotel_actions
                if action["user_id"] == request["user_id"]
                and (action["timestamp"], action["step"]) < (request["timestamp"], request["step"])
            ),
            key=lambda action: (action["timestamp"], action["step"]),
        )[-max_history:]
        prices = [log1p(int(price)) for price in parts(request["prices"])]
        split = SPLITS[sum(request["timestamp"] >= border for border in borders)]
        for rank, hotel in enumerate(parts(request["impressions"])):
            rows[split].append(
                {
                    "item": items[int(hotel)],
                    "history_item": [items[int(action["reference"])] for action in history],
                    "history_action": [kinds[action["action_type"]] for action in history],
                    "rank": rank + 1,
                    "city": cities[request["city"]],
                    "filters": [filters[name] for name in parts(request["current_filters"])],
                    "log_price": round(prices[rank], 4),
                    "relative_price": round(prices[rank] - sum(prices) / len(prices), 4),
                    "label": int(hotel == request["reference"]),
                }
            )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_the_definitions(tmp_path, seed):
    actions = random_actions(seed)
    out = tmp_path / "out"
    raw = write_raw(tmp_path / "raw", actions)
    report = prepare_trivago(raw=raw, out=str(out), max_history=4)
    want = expected_rows(actions, max_history=4)
    for split in SPLITS:
        rows = [
            {**row, **{name: round(row[name], 4) for name in ("log_price", "relative_price")}}
            for row in rows_of(out, split)
        ]
        assert report.splits[split].rows == len(rows)
        got = Counter(str([row[name] for name in want["train"][0]]) for row in rows)
        assert got == Counter(str(list(row.values())) for row in want[split])


def test_a_request_is_a_group_of_its_own_with_one_click(tmp_path):
    actions = random_actions(7)
    out = tmp_path / "out"
    report = prepare_trivago(raw=write_raw(tmp_path / "raw", actions), out=str(out))
    groups = defaultdict(list)
    for split in SPLITS:
        for row in rows_of(out, split):
            groups[row["request"]].append((split, row["rank"], row["label"]))
    requests = [action for action in actions if action["action_type"] == "clickout item"]
    assert len(groups) == len(requests) == report.notes["requests"]
    without = 0
    for shown in groups.values():
        assert len({split for split, *_ in shown}) == 1
        assert sorted(rank for _, rank, _ in shown) == list(range(1, len(shown) + 1))
        without += sum(label for *_, label in shown) == 0
    assert without == report.notes["requests_without_a_click_in_the_list"]


BAD = {
    "no prices": {"prices": None},
    "one price too few": {"prices": "1", "impressions": "1|2"},
    "not a hotel": {"prices": "1|2", "impressions": "1|x"},
    "an empty list": {"prices": "", "impressions": ""},
    "no user": {"user_id": None},
    "no time": {"timestamp": None},
}


def assert_prepared_as(actions, folder):
    """What was prepared in ``folder / "out"`` is what these actions alone give."""
    prepare_trivago(raw=write_raw(folder / "clean", actions), out=str(folder / "other"))
    for split in SPLITS:
        assert rows_of(folder / "out", split) == rows_of(folder / "other", split)


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_malformed_rows_are_counted_reported_and_skipped(tmp_path, caplog, change):
    good = random_actions(0)
    at = next(n for n, action in enumerate(good) if action["action_type"] == "clickout item")
    actions = [*good[:5], {**good[at], **change}, *good[5:]]
    raw = write_raw(tmp_path / "raw", actions)
    report = prepare_trivago(raw=raw, out=str(tmp_path / "out"))
    assert report.rows_bad == {"sessions.parquet": 1}
    assert f"{raw}/sessions.parquet row 5: malformed" in caplog.text
    assert_prepared_as(good, tmp_path)
    with pytest.raises(DataError, match=r"more than max_bad_rows 0 malformed"):
        prepare_trivago(raw=raw, out=str(tmp_path / "third"), max_bad_rows=0)


@pytest.mark.parametrize("column", ["city", "impressions"])
def test_bytes_that_are_no_text_make_a_bad_row(tmp_path, caplog, column):
    good = random_actions(0)
    raw = write_raw(tmp_path / "raw", [*good[:5], good[5], *good[5:]])
    path = Path(raw, "sessions.parquet")
    table = pq.read_table(path)
    values = table[column].cast(pa.binary()).to_pylist()
    values[5] = b"\xff"
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values, pa.binary())), path)
    report = prepare_trivago(raw=raw, out=str(tmp_path / "out"))
    assert report.rows_bad == {"sessions.parquet": 1}
    assert f"{path} row 5: malformed: '{column} holds bytes that are no UTF-8'" in caplog.text
    assert_prepared_as(good, tmp_path)


def test_broken_raw_files_are_named(tmp_path):
    raw = write_raw(tmp_path / "raw", random_actions(0))
    path = Path(raw, "sessions.parquet")
    table = pq.read_table(path)

    def refused(match):
        with pytest.raises(DataError, match=match):
            prepare_trivago(raw=raw, out=str(tmp_path / "out"))

    pq.write_table(table.drop_columns(["prices"]), path)
    refused(r"sessions\.parquet cannot be read .*prices")
    strings = pa.array(["soon"] * table.num_rows)
    pq.write_table(table.drop_columns(["step"]).append_column("step", strings), path)
    refused(r"sessions\.parquet: column 'step' is string and cannot be read as int64 .*soon")
    pq.write_table(table.filter(pc.field("action_type") != "clickout item"), path)
    refused(r"has no good row of the action 'clickout item'")
    path.write_bytes(b"PAR1")
    refused(r"sessions\.parquet cannot be read")
    path.unlink()
    refused(r"neither sessions\.parquet nor sessions\.parquet\.gz")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs trivago's sessions at {REAL}")
def test_the_real_set(tmp_path):
    out = tmp_path / "out"
    report = prepare_trivago(raw=str(REAL), out=str(out))
    raw = pq.read_table(REAL / "sessions.parquet", columns=["action_type", "impressions"])
    lists = [
        shown
        for kind, shown in zip(*(raw[name].to_pylist() for name in raw.column_names), strict=True)
        if kind == "clickout item"
    ]
    assert report.notes["requests"] == len(lists)
    assert report.rows_kept == sum(len(shown.split("|")) for shown in lists)
    assert report.rows_bad == {}
    for split in SPLITS:
        loader = Loader(ParquetSource(str(out), split), batch_size=4096, epochs=1, max_bad_rows=0)
        assert sum(int(batch.weights.sum()) for batch in loader) == report.splits[split].rows
