"""Amazon purchase sequences, by the protocol of AmazonElectronics_x1.

Each purchase but a user's first is a click, and gets one negative: an item that the user never
bought, drawn uniformly. The history is what the user bought before. A user's last purchase is for
testing, the one before for validation. The user is only the group of GAUC, not a feature.

Shape legend:
    N  purchases, sorted by user and time
    P  purchases with a history
    M  rows of a table: row 2p is purchase p, row 2p + 1 its negative
"""

from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import EncodedLog, history_group, prepare_log, ReadLog
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, read_json, read_records
from torchrec_hilomoe.data.prepare.runs import runs
from torchrec_hilomoe.data.prepare.timelines import Timelines
from torchrec_hilomoe.data.prepare.vocabulary import Vocabulary
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema

__all__ = ["prepare_amazon_sequences"]

SOURCE = (
    "Get NAME.txt and NAME_item2attributes.json from the folder data/ of "
    "https://github.com/RUCAIBox/CIKM2020-S3Rec, and name their folder with --raw."
)
PATTERN = "(?P<user>[0-9]{1,18})(?P<items>(?: [0-9]{1,18})+)"


def prepare_amazon_sequences(
    *,
    raw: str,
    out: str,
    name: str = "Toys_and_Games",
    max_history: int = 100,
    seed: int = 0,
    max_bad_rows: int = 100,
    overwrite: bool = False,
) -> Report:
    """Prepare Amazon purchases: tell a user's next item from a random one.

    Args:
        raw: Folder with NAME.txt and NAME_item2attributes.json, each plain or gzipped (.gz).
        out: Folder to make.
        name: Which category's files, for example Toys_and_Games or Beauty.
        max_history: How many of the user's last items a row keeps; a run can cut further.
        seed: Of the negatives, and of the order in which training rows are written.
        max_bad_rows: Malformed raw lines that are skipped before it is fatal.
        overwrite: Replace prepared data that is in the way.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """

    def read(bad: BadRecords) -> ReadLog:
        path = find_raw(raw, f"{name}.txt", SOURCE)
        lines = list(read_records(path, PATTERN, bad, encoding="latin-1"))
        if not sum(table.num_rows for table in lines):
            raise DataError(f"{path} has no good line. {SOURCE}")
        attributes = _attributes(find_raw(raw, f"{name}_item2attributes.json", SOURCE))
        log = _Purchases(name, pa.concat_tables(lines), attributes, max_history, seed)
        return ReadLog(log=log, rows_read=sum(table.num_rows for table in lines))

    return prepare_log(
        read,
        out=out,
        lengths={"max_history": max_history},
        seed=seed,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
        options={"name": name},
    )


def _attributes(path: str) -> dict[int, list[int]]:
    """Read the attributes of each item, the most particular one last."""
    raw = read_json(path)
    try:
        return {int(item): [int(attribute) for attribute in raw[item]] for item in raw}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not item -> list of integers ({error}). {SOURCE}") from error


class _Purchases(EncodedLog):
    """The purchases as ids, and the rows they become.

    Args:
        name: Of the data set.
        lines: A user and the bought items a line, in the order of time.
        attributes: Of each item.
        max_history: Events of a history.
        seed: Of the negatives.
    """

    def __init__(
        self,
        name: str,
        lines: pa.Table,
        attributes: dict[int, list[int]],
        max_history: int,
        seed: int,
    ) -> None:
        bought = [np.array(items.split(), np.int64) for items in lines["items"].to_pylist()]
        counts = np.array([len(items) for items in bought])
        user_N = np.repeat(pc.cast(lines["user"], pa.int64()).to_numpy(), counts)
        self._times = Timelines(user_N, np.concatenate([np.arange(n) for n in counts]))
        user_N, item_N = user_N[self._times.order], np.concatenate(bought)[self._times.order]
        left_N = self._times.count - 1 - self._times.position
        self._event_P = np.flatnonzero(self._times.position > 0)
        self._split_N = np.repeat(np.array([2, 1, 0])[np.minimum(left_N, 2)][self._event_P], 2)
        trained_N = left_N >= 2

        items, item_code_N = np.unique(item_N, return_inverse=True)
        self._negative_P = _negatives(user_N, item_code_N, len(items), seed)[self._event_P]
        self._item_code_N = item_code_N
        item_ids = Vocabulary.count(item_N[trained_N])
        self._item = item_ids.encode(items)
        lists = [attributes.get(item, []) for item in items.tolist()]
        last = np.array([values[-1] if values else -1 for values in lists])
        last_N = last[item_code_N]
        category_ids = Vocabulary.count(last_N[trained_N & (last_N >= 0)])
        self._category = category_ids.encode(last)
        flat = np.array(list(chain.from_iterable(lists)), dtype=np.int64)
        attribute_ids = Vocabulary.count(flat)
        self._attributes = attribute_ids.encode(flat)
        self._attributes_begin = np.cumsum([0, *map(len, lists)])
        self._group_N = np.unique(user_N, return_inverse=True)[1]
        self._notes = {"items_without_attributes": sum(not values for values in lists)}
        self._max_history = max_history
        self._schema = _schema(
            f"amazon-{name}",
            {"item": item_ids.size, "category": category_ids.size, "attribute": attribute_ids.size},
            max_history=max_history,
            max_attributes=max(2, *map(len, lists)),
        )

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    @property
    def split_N(self) -> np.ndarray:
        """Index into ``SPLITS`` of each row."""
        return self._split_N

    @property
    def notes(self) -> dict[str, int]:
        """What was unknown."""
        return self._notes

    def rows(self, rows_M: np.ndarray) -> pa.Table:
        """Return purchases and negatives."""
        purchase_M, label_M = rows_M // 2, 1 - rows_M % 2
        event_M = self._event_P[purchase_M]
        history = self._times.earlier(event_M, self._max_history)
        code_M = np.where(label_M, self._item_code_N[event_M], self._negative_P[purchase_M])
        begin_M = self._attributes_begin[code_M]
        attributes = runs(begin_M, self._attributes_begin[code_M + 1] - begin_M)
        columns = {
            "item": self._item[code_M],
            "category": self._category[code_M],
            "history_item": history.lists(self._item[self._item_code_N]),
            "history_category": history.lists(self._category[self._item_code_N]),
            "attributes": attributes.lists(self._attributes),
            "label": label_M.astype(np.int8),
            "user": self._group_N[event_M],
        }
        return pa.table(columns)


def _negatives(user_N: np.ndarray, item_N: np.ndarray, items: int, seed: int) -> np.ndarray:
    """Draw, for each purchase, an item that its user never bought.

    Raises:
        DataError: If a user has bought every item.
    """
    rng = np.random.default_rng(seed)
    users, user_code_N = np.unique(user_N, return_inverse=True)
    pairs = np.unique(user_code_N * items + item_N)
    full = np.bincount(pairs // items, minlength=len(users)) == items
    if full.any():
        raise DataError(
            f"user {users[full][0]} has bought all {items} items, so there is no negative for "
            "them; take a larger data set."
        )
    drawn_N = np.empty(len(user_N), dtype=np.int64)
    open_N = np.arange(len(user_N))
    while len(open_N):
        drawn_N[open_N] = rng.integers(0, items, size=len(open_N))
        open_N = open_N[np.isin(user_code_N[open_N] * items + drawn_N[open_N], pairs)]
    return drawn_N


def _schema(
    dataset: str, tables: dict[str, int], *, max_history: int, max_attributes: int
) -> Schema:
    fields = ("item", "category")
    return Schema(
        dataset=dataset,
        tables=tables,
        candidate=tuple(IdFeature(name=name, table=name) for name in fields),
        sequences=(history_group({name: name for name in fields}, max_history),),
        pooled=(PooledFeature(name="attributes", table="attribute", max_length=max_attributes),),
        label="label",
        group="user",
    )
