"""The log of the RecSys Challenge 2019: which of the hotels shown does a user click on?

Each "clickout item" with its list of impressions is a request: a row for every hotel shown, of
which one is a click. The history is the user's earlier actions on hotels, each with its kind. The
split is by time, and GAUC groups the rows of a request.

Shape legend:
    C  requests
    R  rows: hotels that are shown, of all requests
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.encoding import encode_lists, encoder_of
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import (
    Counted,
    Encoded,
    EventLog,
    history_group,
    Learned,
    prepare_log,
    Read,
    Tally,
)
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.order_statistics import OrderStatistics
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw
from torchrec_hilomoe.data.prepare.sources import MALFORMED, ParquetFile, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import earlier, TRAIN_PERCENT, VALID_PERCENT
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
    counted = {"item": pl.Int64, **dict.fromkeys(("action", "filter", *CONTEXT), pl.String)}
    order = ("user_id", "timestamp", "step", "row")

    def __init__(self, raw: str, max_history: int, scratch: str) -> None:
        path = find_raw(raw, FILE, SOURCE)
        self.file = ParquetFile(path)
        self.nothing = f"{path} has no good row of the action {REQUEST!r}. {SOURCE}"
        self._max_history = max_history
        self._moments = OrderStatistics(scratch, "moments")

    def read(self, batch: pl.DataFrame) -> Read:
        """Tell good rows from bad ones, and keep those of requests and of actions on hotels."""
        batch = batch.with_columns(
            good=GOOD & pl.col(MALFORMED).is_null(), request=REQUESTED, acted=ACTED
        )
        wanted = batch.filter(pl.col("good") & (pl.col("request") | pl.col("acted")))
        self._moments.add(wanted.filter("request")["timestamp"].to_numpy())
        bad = batch.filter(~pl.col("good"))
        texts = [
            text or str(row)
            for text, row in zip(bad[MALFORMED], bad.select(TYPES.names).to_dicts(), strict=True)
        ]
        return Read(
            events=wanted.select(*TYPES.names, "request", "acted", row=ROW),
            good=batch.height - bad.height,
            bad=list(zip(bad[PLACE].to_list(), texts, strict=True)),
        )

    def finish_reading(self, bad: BadRecords) -> None:
        """Find the moments that separate the splits."""
        moments = self._moments
        if not moments.count:
            raise DataError(self.nothing)
        # A border is a moment, not a row: whatever happens at the same time is in one split.
        self._valid_from, self._test_from = (
            moments.at(moments.count * percent // 100)
            for percent in (TRAIN_PERCENT, TRAIN_PERCENT + VALID_PERCENT)
        )

    def _follow(self, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the actions on hotels, and the requests, with the actions before each."""
        time = pl.col("timestamp")
        before = pl.col("acted").cast(pl.Int64).cum_sum() - pl.col("acted")
        found = events.lazy().with_columns(
            split=(time >= self._valid_from).cast(pl.Int64) + (time >= self._test_from),
            hotel=pl.when("acted").then("reference").cast(pl.Int64),
            acted_before=before,
            acted_before_by_user=before.over("user_id"),
        )
        shown = pl.col("impressions").str.split("|").cast(pl.List(pl.Int64))
        filters = pl.col("current_filters").fill_null("").str.split("|")
        requests = found.filter("request").select(
            "split",
            "acted_before",
            "acted_before_by_user",
            hotel=pl.col("hotel").fill_null(-1),
            item=shown,
            price=pl.col("prices").str.split("|").cast(pl.List(pl.Int64)),
            filter=filters.list.eval(pl.element().filter(pl.element() != "")),
            rank=pl.int_ranges(1, 1 + shown.list.len()),
            **{name: pl.when(pl.col(name) != "").then(name) for name in CONTEXT},
        )
        acted = found.filter("acted").select("split", item="hotel", action="action_type")
        return acted.collect(), requests.collect()

    def count(self, events: pl.DataFrame) -> Counted:
        """Count some users' actions."""
        acted, requests = self._follow(events)
        # What happens before validation begins is known.
        known, trained = (table.filter(pl.col("split") == 0) for table in (acted, requests))
        values = {name: trained[name] for name in CONTEXT}
        values["item"] = pl.concat([trained["item"].explode(empty_as_null=False), known["item"]])
        values["action"] = known["action"]
        values["filter"] = trained["filter"].explode(empty_as_null=False)
        shown, filters = (pl.col(name).list.len().cast(pl.Int64) for name in ("item", "filter"))
        entries = 2 * pl.col("acted_before_by_user").clip(upper_bound=self._max_history) + filters
        clicked = int(requests.select(pl.col("item").list.contains(pl.col("hotel")).sum()).item())
        notes = {
            "requests": requests.height,
            "requests_without_a_click_in_the_list": requests.height - clicked,
        }
        tally = Tally(
            rows=int(requests.select(shown.sum()).item()),
            trained=int(trained.select(shown.sum()).item()),
            entries=int(requests.select((entries * shown).sum()).item()),
            numbered=requests.height,
            longest=int(requests.select(filters.max()).item() or 0),
            notes=Counter(notes),
        )
        return Counted(tally=tally, values=values)

    def learn(self, ranked: Mapping[str, pl.Series], total: Tally) -> Learned:
        """Give values their ids."""
        self._encoders = {name: encoder_of(values, 0) for name, values in ranked.items()}
        tables = {name: len(values) + 1 for name, values in ranked.items()}
        first = {name: tables[name] for name in ("item", "action", "filter")}
        tables = {**first, "rank": MAX_RANK + 1, **{name: tables[name] for name in CONTEXT}}
        return Learned(schema=_schema(tables, self._max_history, max(2, total.longest)))

    def encode(self, events: pl.DataFrame, before: Tally) -> Encoded:
        """Encode some users' requests, which are numbered in their order."""
        acted, requests = self._follow(events)
        acted, requests = self._ids(acted, "item", "action"), self._ids(requests, *CONTEXT)
        filters = encode_lists(self._encoders["filter"], requests["filter"])
        requests = requests.with_columns(filters, number=pl.int_range(pl.len()))
        # A row for each hotel that is shown.
        columns = ("number", "split", "hotel", "item", "price", "rank")
        shown = requests.select(columns).explode("item", "price", "rank")
        shown = shown.with_columns(label=pl.col("item") == pl.col("hotel"))
        price_R, number_R = np.log1p(shown["price"].to_numpy()), shown["number"].to_numpy()
        begin, counts = np.unique(number_R, return_index=True, return_counts=True)[1:]
        mean_C = np.add.reduceat(price_R, begin) / counts if len(counts) else price_R
        prices = {"log_price": price_R, "relative_price": price_R - mean_C[number_R]}
        shown = self._ids(shown, "item").with_columns(
            **{n: pl.Series(p) for n, p in prices.items()}
        )
        requests = requests.drop("item", "price", "rank", "split", "hotel")

        def rows(start: int, stop: int) -> dict[str, Any]:
            part = shown[start:stop]
            request = requests[part["number"]]
            history = earlier(
                request["acted_before"], request["acted_before_by_user"], self._max_history
            )
            return {
                "item": part["item"].to_numpy(),
                "history_item": history.lists(acted["item"]),
                "history_action": history.lists(acted["action"]),
                "rank": part["rank"].clip(upper_bound=MAX_RANK).to_numpy(),
                **{name: request[name].to_numpy() for name in CONTEXT},
                "filters": request["filter"].to_arrow(),
                **{name: part[name].to_numpy() for name in prices},
                "label": part["label"].to_numpy(),
                "request": before.numbered + part["number"].to_numpy(),
            }

        return Encoded(split_R=shown["split"].to_numpy(), rows=rows)

    def _ids(self, found: pl.DataFrame, *names: str) -> pl.DataFrame:
        ids = (self._encoders[name].encode(found[name]).cast(pl.Int32) for name in names)
        return found.with_columns(ids)


def _schema(tables: dict[str, int], max_history: int, max_filters: int) -> Schema:
    return Schema(
        dataset="trivago-2019",
        tables=tables,
        candidate=(IdFeature(name="item", table="item"),),
        sequences=(history_group(("item", "action"), max_history),),
        pooled=(
            *(PooledFeature(name=name, table=name) for name in ("rank", *CONTEXT)),
            PooledFeature(name="filters", table="filter", max_length=max_filters),
        ),
        dense=("log_price", "relative_price"),
        label="label",
        group="request",
    )
