"""The log of the RecSys Challenge 2019: which of the hotels shown does a user click on?

Each "clickout item" with its list of impressions is a request: a row for every hotel shown, of
which one is a click. The history is the user's earlier actions on hotels, each with its kind. The
split is by time, and GAUC groups the rows of a request.

Shape legend:
    N  requests and actions on hotels of some users, sorted by user, time and step
    C  requests
    R  rows: impressions of all requests
    M  rows that are asked for
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.counting import ValueCounts
from torchrec_hilomoe.data.prepare.encoding import encoder_of
from torchrec_hilomoe.data.prepare.event_log import (
    Counting,
    EncodedEvents,
    Encoding,
    EventLog,
    Read,
    Tally,
)
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import history_group, prepare_log
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.order_statistics import OrderStatistics
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw
from torchrec_hilomoe.data.prepare.sources import ParquetFile, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import ranges, Timelines
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema

__all__ = ["prepare_trivago"]

SOURCE = (
    "It holds the sessions of the RecSys Challenge 2019 (https://recsys.trivago.cloud) as one "
    "Parquet file; name its folder with --raw."
)
FILE = "sessions.parquet"
NUMBERS = {"timestamp": pa.int64(), "step": pa.int64()}
TEXTS = (
    "user_id",
    "action_type",
    "reference",
    "platform",
    "city",
    "device",
    "current_filters",
    "impressions",
    "prices",
)
REQUEST = "clickout item"
ITEM_ACTIONS = "^(clickout item|search for item|interaction item .*)$"
LIST_OF_NUMBERS = r"^[0-9]{1,18}(\|[0-9]{1,18})*$"
HOTEL = "^[0-9]{1,18}$"
TYPES = pa.schema([*NUMBERS.items(), *((name, pa.large_string()) for name in TEXTS)])
CONTEXT = ("platform", "city", "device")
MAX_RANK = 25  # lists are that long; what would follow shares the last rank
TRAIN_PERCENT, VALID_PERCENT = 80, 10
REQUESTED = (pl.col("action_type") == REQUEST).fill_null(False)
ACTED = (
    pl.col("reference").str.contains(HOTEL) & pl.col("action_type").str.contains(ITEM_ACTIONS)
).fill_null(False)
# What every row needs; requests, lists of hotels and of their prices, too.
GOOD = pl.all_horizontal(
    *(pl.col(name).is_not_null() for name in ("user_id", "timestamp", "step", "action_type"))
) & (
    ~REQUESTED
    | (
        pl.col("impressions").str.contains(LIST_OF_NUMBERS)
        & pl.col("prices").str.contains(LIST_OF_NUMBERS)
        & (
            pl.col("impressions").str.count_matches("|", literal=True)
            == pl.col("prices").str.count_matches("|", literal=True)
        )
    ).fill_null(False)
)


def prepare_trivago(
    *,
    raw: str,
    max_history: int = 50,
    **common: Unpack[Common],
) -> Report:
    """Prepare trivago's sessions: predict which hotel of a list is clicked.

    Args:
        raw: Folder with sessions.parquet.
        max_history: How many of the user's last actions a row keeps; a run can cut further.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If the raw file is missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda scratch, _: _Sessions(raw, max_history, scratch),
        lengths={"max_history": max_history},
        **common,
    )


class _Sessions(EventLog):
    """The raw file.

    Args:
        raw: Its folder.
        max_history: Events of a history.
        scratch: A local folder.
    """

    columns = TYPES
    order = ("user_id", "timestamp", "step", "row")

    def __init__(self, raw: str, max_history: int, scratch: str) -> None:
        path = find_raw(raw, FILE, SOURCE)
        self.file = ParquetFile(path)
        self.nothing = f"{path} has no good row of the action {REQUEST!r}. {SOURCE}"
        self._max_history = max_history
        self._moments = OrderStatistics(scratch, "moments")

    def read(self, batch: pl.DataFrame) -> Read:
        """Tell good rows from bad ones, and keep those of requests and of actions on hotels."""
        batch = batch.with_columns(good=GOOD, request=REQUESTED, acted=ACTED)
        wanted = batch.filter(pl.col("good") & (pl.col("request") | pl.col("acted")))
        self._moments.add(wanted.filter("request")["timestamp"].to_numpy())
        bad = batch.filter(~pl.col("good"))
        texts = [str(row) for row in bad.select(TYPES.names).to_dicts()]
        return Read(
            events=wanted.select(*TYPES.names, "request", "acted", row=ROW),
            good=batch.height - bad.height,
            bad=list(zip(bad[PLACE].to_list(), texts, strict=True)),
        )

    def counting(self, scratch: str, bad: BadRecords) -> Counting:
        """Find the moments that separate the splits."""
        moments = self._moments
        if not moments.count:
            raise DataError(self.nothing)
        # A border is a moment, not a row: whatever happens at the same time is in one split.
        valid_from, test_from = (
            moments.at(moments.count * percent // 100)
            for percent in (TRAIN_PERCENT, TRAIN_PERCENT + VALID_PERCENT)
        )
        return _Counting(valid_from, test_from, self._max_history, scratch)


class _Timelines:
    """Some users' requests, and their actions on hotels.

    Args:
        events: Sorted.
        valid_from: When validation begins.
        test_from: When the test begins.
    """

    def __init__(self, events: pa.Table, valid_from: int, test_from: int) -> None:
        self.times = Timelines(pl.Series(events["user_id"]).rle_id().to_numpy())
        timestamp_N = events["timestamp"].to_numpy()
        self.event_C = np.flatnonzero(events["request"])
        self.requests = pl.DataFrame(events.take(self.event_C))
        timestamp_C = timestamp_N[self.event_C]
        split_C = (timestamp_C >= valid_from) + (timestamp_C >= test_from).astype(int)

        shown = _parts(self.requests, "impressions")
        self.item_R = shown.values.cast(pl.Int64)
        self.request_R = np.repeat(np.arange(len(split_C)), shown.counts)
        self.split_R, self.begin = split_C[self.request_R], shown.begin
        self.filters = _parts(self.requests, "current_filters")

        self.acted_N = np.asarray(events["acted"])
        acted = pl.DataFrame(events.filter(pa.array(self.acted_N)))
        self.acted_hotel = acted["reference"].cast(pl.Int64)
        self.acted_kind = acted["action_type"]
        self.acted_before_N = self.times.chosen_before(self.acted_N)
        hotel_N = np.full(len(timestamp_N), -1)
        hotel_N[self.acted_N] = self.acted_hotel.to_numpy()
        self.label_R = self.item_R.to_numpy() == hotel_N[self.event_C][self.request_R]

        # What happens before validation begins is known.
        self.trained_C = split_C == 0
        self.trained_acted = timestamp_N[self.acted_N] < valid_from

    def context(self, name: str) -> pl.Series:
        """Return what a request says, or null."""
        return self.requests.select(pl.when(pl.col(name) != "").then(name))[name]


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """``|``-joined texts, taken apart.

    Attributes:
        values: All parts.
        begin: Where those of each text begin, and those of the last one end.
    """

    values: pl.Series
    begin: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How many parts each text has."""
        return np.diff(self.begin)


def _parts(table: pl.DataFrame, name: str) -> _Parts:
    lists = table.select(
        pl.col(name).fill_null("").str.split("|").list.eval(pl.element().filter(pl.element() != ""))
    )[name]
    return _Parts(
        values=lists.explode(empty_as_null=False),
        begin=np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)]),
    )


class _Counting(Counting):
    """Counts hotels, kinds of actions, filters and contexts.

    Args:
        valid_from: When validation begins.
        test_from: When the test begins.
        max_history: Events of a history.
        scratch: A local folder.
    """

    def __init__(self, valid_from: int, test_from: int, max_history: int, scratch: str) -> None:
        self._borders, self._max_history = (valid_from, test_from), max_history
        kinds = {"item": pl.Int64, **dict.fromkeys(("action", "filter", *CONTEXT), pl.String)}
        self._counts = {name: ValueCounts(scratch, name, kind=kind) for name, kind in kinds.items()}
        self._lock = Lock()
        self._max_filters = 2

    def count(self, events: pa.Table) -> Tally:
        """Count some users' actions."""
        found = _Timelines(events, *self._borders)
        trained_R = found.split_R == 0
        hotels = [found.item_R.filter(trained_R), found.acted_hotel.filter(found.trained_acted)]
        self._counts["item"].add(pl.concat(hotels))
        self._counts["action"].add(found.acted_kind.filter(found.trained_acted))
        of_trained = np.repeat(found.trained_C, found.filters.counts)
        self._counts["filter"].add(found.filters.values.filter(of_trained))
        for name in CONTEXT:
            self._counts[name].add(found.context(name).filter(found.trained_C))
        with self._lock:
            self._max_filters = max(self._max_filters, found.filters.counts.max(initial=0))
        requests, clicked = len(found.event_C), len(np.unique(found.request_R[found.label_R]))
        ends_C = found.acted_before_N[found.event_C]
        histories_C = ends_C - found.acted_before_N[found.times.begin[found.event_C]]
        entries_C = 2 * np.minimum(histories_C, self._max_history) + found.filters.counts
        return Tally(
            rows=len(found.split_R),
            trained=int((found.split_R == 0).sum()),
            entries=int(entries_C[found.request_R].sum()),
            numbered=requests,
            notes=Counter(
                {"requests": requests, "requests_without_a_click_in_the_list": requests - clicked}
            ),
        )

    def encoding(self) -> Encoding:
        """Return what encodes."""
        ranked = {name: counts.ranked() for name, counts in self._counts.items()}
        return _Encoding(
            self._borders, ranked, max_history=self._max_history, max_filters=int(self._max_filters)
        )


class _Encoding(Encoding):
    """Ids of everything.

    Args:
        borders: When validation and test begin.
        ranked: Known values, the one with id 1 first.
        max_history: Events of a history.
        max_filters: The most filters of a request.
    """

    notes: Mapping[str, int] = {}

    def __init__(
        self,
        borders: tuple[int, int],
        ranked: Mapping[str, pl.Series],
        *,
        max_history: int,
        max_filters: int,
    ) -> None:
        self._borders, self._max_history = borders, max_history
        self._encoders = {name: encoder_of(values, 0) for name, values in ranked.items()}
        tables = {name: len(values) + 1 for name, values in ranked.items()}
        first = {name: tables[name] for name in ("item", "action", "filter")}
        self._schema = _schema(
            {**first, "rank": MAX_RANK + 1, **{name: tables[name] for name in CONTEXT}},
            max_history=max_history,
            max_filters=max_filters,
        )

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    def encode(self, events: pa.Table, before: Tally) -> EncodedEvents:
        """Encode some users' requests, which are numbered in their order."""
        found = _Timelines(events, *self._borders)
        item_R = self._ids("item", found.item_R)
        rank_R = np.minimum(1 + np.arange(len(item_R)) - found.begin[found.request_R], MAX_RANK)
        prices = _parts(found.requests, "prices").values.cast(pl.Int64)
        price_R = np.log1p(prices.to_numpy())
        counts = np.diff(found.begin)
        mean_C = np.add.reduceat(price_R, found.begin[:-1]) / counts if len(counts) else price_R
        relative_R = price_R - mean_C[found.request_R]
        acted_item = self._ids("item", found.acted_hotel)
        acted_kind = self._ids("action", found.acted_kind)
        filter_ids = self._ids("filter", found.filters.values)
        context_C = {name: self._ids(name, found.context(name)) for name in CONTEXT}

        def rows(rows_M: np.ndarray) -> pa.Table:
            request_M = found.request_R[rows_M]
            history = found.times.earlier_chosen(
                found.acted_before_N, found.event_C[request_M], self._max_history
            )
            begin_M = found.filters.begin[request_M]
            filters = ranges(begin_M, found.filters.begin[request_M + 1] - begin_M)
            columns = {
                "item": item_R[rows_M],
                "history_item": history.lists(acted_item),
                "history_action": history.lists(acted_kind),
                "rank": rank_R[rows_M].astype(np.int32),
                **{name: ids_C[request_M] for name, ids_C in context_C.items()},
                "filters": filters.lists(filter_ids),
                "log_price": price_R[rows_M].astype(np.float32),
                "relative_price": relative_R[rows_M].astype(np.float32),
                "label": found.label_R[rows_M].astype(np.int8),
                "request": before.numbered + request_M,
            }
            return pa.table(columns)

        return EncodedEvents(split_R=found.split_R, rows=rows)

    def _ids(self, table: str, values: pl.Series) -> np.ndarray:
        return self._encoders[table].encode(values).to_numpy().astype(np.int32)


def _schema(tables: dict[str, int], *, max_history: int, max_filters: int) -> Schema:
    history = {"item": "item", "action": "action"}
    return Schema(
        dataset="trivago-2019",
        tables=tables,
        candidate=(IdFeature(name="item", table="item"),),
        sequences=(history_group(history, max_history),),
        pooled=(
            *(PooledFeature(name=name, table=name) for name in ("rank", *CONTEXT)),
            PooledFeature(name="filters", table="filter", max_length=max_filters),
        ),
        dense=("log_price", "relative_price"),
        label="label",
        group="request",
    )
