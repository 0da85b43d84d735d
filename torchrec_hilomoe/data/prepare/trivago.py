"""The log of the RecSys Challenge 2019: which of the hotels shown does a user click on?

Each "clickout item" with its list of impressions is a request: a row for every hotel shown, of
which one is a click. The history is the user's earlier actions on hotels, each with its kind. The
split is by time, and GAUC groups the rows of a request.

Shape legend:
    N  actions, sorted by user, time and step
    C  requests
    R  rows: impressions of all requests
    M  rows that are asked for
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import EncodedLog, history_group, prepare_log, ReadLog
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, which
from torchrec_hilomoe.data.prepare.runs import runs
from torchrec_hilomoe.data.prepare.timelines import Timelines
from torchrec_hilomoe.data.prepare.vocabulary import Vocabulary
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.runtime.paths import open_binary

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
CONTEXT = ("platform", "city", "device")
MAX_RANK = 25  # lists are that long; what would follow shares the last rank
TRAIN_PERCENT, VALID_PERCENT = 80, 10


def prepare_trivago(
    *,
    raw: str,
    out: str,
    max_history: int = 50,
    seed: int = 0,
    max_bad_rows: int = 100,
    overwrite: bool = False,
) -> Report:
    """Prepare trivago's sessions: predict which hotel of a list is clicked.

    Args:
        raw: Folder with sessions.parquet.
        out: Folder to make.
        max_history: How many of the user's last actions a row keeps; a run can cut further.
        seed: Of the order in which training rows are written.
        max_bad_rows: Malformed raw rows that are skipped before it is fatal.
        overwrite: Replace prepared data that is in the way.

    Returns:
        The report that is also written.

    Raises:
        DataError: If the raw file is missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """

    def read(bad: BadRecords) -> ReadLog:
        actions = _read(find_raw(raw, FILE, SOURCE), bad)
        return ReadLog(log=_Requests(actions, max_history), rows_read=actions.num_rows)

    return prepare_log(
        read,
        out=out,
        lengths={"max_history": max_history},
        seed=seed,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )


def _read(path: str, bad: BadRecords) -> pa.Table:
    """Read the actions, without the malformed ones."""
    try:
        with open_binary(path) as source:
            table = pq.read_table(source, columns=[*NUMBERS, *TEXTS])
        table = table.cast(pa.schema([*NUMBERS.items(), *((name, pa.string()) for name in TEXTS)]))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())}). {SOURCE}"
        ) from error
    good = np.ones(table.num_rows, dtype=bool)
    for name in ("user_id", "timestamp", "step", "action_type"):
        good &= which("is_valid", table[name])
    request = which("equal", table["action_type"], pa.scalar(REQUEST))
    lists = [table[name] for name in ("impressions", "prices")]
    fits = which("equal", *(_count_bars(texts) for texts in lists))
    for texts in lists:
        fits &= which("match_substring_regex", texts, pattern=LIST_OF_NUMBERS)
    good &= fits | ~request
    for row in np.flatnonzero(~good).tolist():
        bad.add(path, f"row {row}", str(table.slice(row, 1).to_pylist()[0]))
    if not (request & good).any():
        raise DataError(f"{path} has no good row of the action {REQUEST!r}. {SOURCE}")
    return table.filter(pa.array(good))


def _count_bars(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.call_function("count_substring", [texts], pc.MatchSubstringOptions("|"))


def _texts(table: pa.Table, name: str) -> np.ndarray:
    return np.array(pc.fill_null(table[name], "").to_pylist(), dtype=str)


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take ``|``-joined texts apart: all parts, and where those of each text begin and end."""
    lists = [[part for part in value.split("|") if part] for value in values.tolist()]
    parts = np.array([part for parts in lists for part in parts], dtype=str)
    return parts, np.cumsum([0, *map(len, lists)])


class _Requests(EncodedLog):
    """The impressions as ids, and the rows they become.

    Args:
        actions: Good ones, in any order.
        max_history: Events of a history.
    """

    def __init__(self, actions: pa.Table, max_history: int) -> None:
        timestamp, step = actions["timestamp"].to_numpy(), actions["step"].to_numpy()
        users = np.unique(_texts(actions, "user_id"), return_inverse=True)[1]
        rank = np.empty(len(users), dtype=np.int64)
        rank[np.lexsort((step, timestamp))] = np.arange(len(users))
        self._times = Timelines(users, rank)
        actions = actions.take(pa.array(self._times.order))
        timestamp_N = timestamp[self._times.order]

        kind_N = _texts(actions, "action_type")
        self._event_C = np.flatnonzero(kind_N == REQUEST)
        requests = actions.take(pa.array(self._event_C))
        timestamp_C = timestamp_N[self._event_C]
        # A border is a moment, not a row: whatever happens at the same time is in one split.
        at = len(timestamp_C) * np.array([TRAIN_PERCENT, TRAIN_PERCENT + VALID_PERCENT]) // 100
        valid_from, test_from = np.sort(timestamp_C)[at]
        split_C = (timestamp_C >= valid_from) + (timestamp_C >= test_from).astype(int)
        trained_C, trained_N = split_C == 0, timestamp_N < valid_from

        shown, begin = _split(_texts(requests, "impressions"))
        item_R, price_R = shown.astype(np.int64), np.log1p(self._prices(requests))
        self._request_R = np.repeat(np.arange(len(split_C)), np.diff(begin))
        self._split_R = split_C[self._request_R]
        self._rank_R = np.minimum(1 + np.arange(len(item_R)) - begin[self._request_R], MAX_RANK)
        mean_C = np.add.reduceat(price_R, begin[:-1]) / np.diff(begin)
        self._price_R, self._relative_R = price_R, price_R - mean_C[self._request_R]

        reference_N, is_hotel_N = self._references(actions)
        acted_N = is_hotel_N & which(
            "match_substring_regex", actions["action_type"], pattern=ITEM_ACTIONS
        )
        self._label_R = item_R == reference_N[self._event_C][self._request_R]
        item_ids = Vocabulary.count(
            np.concatenate([item_R[self._split_R == 0], reference_N[acted_N & trained_N]])
        )
        kind_ids = Vocabulary.count(kind_N[acted_N & trained_N])
        self._item_R = item_ids.encode(item_R)
        self._acted_before_N = self._times.chosen_before(acted_N)
        self._acted_item = item_ids.encode(reference_N[acted_N])
        self._acted_kind = kind_ids.encode(kind_N[acted_N])

        filters, self._filters_begin = _split(_texts(requests, "current_filters"))
        filter_request = np.repeat(np.arange(len(split_C)), np.diff(self._filters_begin))
        filter_ids = Vocabulary.count(filters[trained_C[filter_request]])
        self._filters = filter_ids.encode(filters)
        tables = {
            "item": item_ids.size,
            "action": kind_ids.size,
            "filter": filter_ids.size,
            "rank": MAX_RANK + 1,
        }
        self._context_C = {}
        for name in CONTEXT:
            values_C = _texts(requests, name)
            ids = Vocabulary.count(values_C[trained_C & (values_C != "")])
            self._context_C[name] = ids.encode(values_C)
            tables[name] = ids.size
        self._notes = {
            "requests": len(split_C),
            "requests_without_a_click_in_the_list": len(split_C) - self._clicked(),
        }
        self._max_history = max_history
        self._schema = _schema(
            tables,
            max_history=max_history,
            max_filters=max(2, int(np.diff(self._filters_begin).max())),
        )

    @staticmethod
    def _prices(requests: pa.Table) -> np.ndarray:
        return _split(_texts(requests, "prices"))[0].astype(np.int64)

    @staticmethod
    def _references(actions: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the hotel that each action refers to, and whether it does refer to one."""
        texts_N = _texts(actions, "reference")
        is_hotel_N = which("match_substring_regex", actions["reference"], pattern=HOTEL)
        return np.where(is_hotel_N, texts_N, "-1").astype(np.int64), is_hotel_N

    def _clicked(self) -> int:
        return len(np.unique(self._request_R[self._label_R]))

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    @property
    def split_N(self) -> np.ndarray:
        """Index into ``SPLITS`` of each row."""
        return self._split_R

    @property
    def notes(self) -> dict[str, int]:
        """Requests, and those whose click is not among the impressions."""
        return self._notes

    def rows(self, rows_M: np.ndarray) -> pa.Table:
        """Return impressions."""
        request_M = self._request_R[rows_M]
        event_M = self._event_C[request_M]
        history = self._times.earlier_chosen(self._acted_before_N, event_M, self._max_history)
        begin_M = self._filters_begin[request_M]
        filters = runs(begin_M, self._filters_begin[request_M + 1] - begin_M)
        columns = {
            "item": self._item_R[rows_M],
            "history_item": history.lists(self._acted_item),
            "history_action": history.lists(self._acted_kind),
            "rank": self._rank_R[rows_M].astype(np.int32),
            **{name: ids_C[request_M] for name, ids_C in self._context_C.items()},
            "filters": filters.lists(self._filters),
            "log_price": self._price_R[rows_M].astype(np.float32),
            "relative_price": self._relative_R[rows_M].astype(np.float32),
            "label": self._label_R[rows_M].astype(np.int8),
            "request": request_M,
        }
        return pa.table(columns)


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
