"""Amazon purchase sequences, by the protocol of AmazonElectronics_x1.

Each purchase but a user's first is a click, and gets one negative: an item that the user never
bought, drawn uniformly. The history is what the user bought before. A user's last purchase is for
testing, the one before for validation. The user is only the group of GAUC, not a feature.

Shape legend:
    N  purchases of some users, sorted by user and time
    P  purchases with a history
    M  rows of a table: row 2p is purchase p, row 2p + 1 its negative
"""

from collections.abc import Mapping
from itertools import chain
from typing import Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.arrow import call
from torchrec_hilomoe.data.prepare.counting import ValueCounts
from torchrec_hilomoe.data.prepare.event_log import (
    Counting,
    EncodedEvents,
    Encoding,
    EventLog,
    Read,
    Tally,
)
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.lines import LineFile
from torchrec_hilomoe.data.prepare.log import history_group, prepare_log
from torchrec_hilomoe.data.prepare.negatives import draw_negatives
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.raw import Piece
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, good_lines, read_json
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
    name: str = "Toys_and_Games",
    max_history: int = 100,
    **common: Unpack[Common],
) -> Report:
    """Prepare Amazon purchases: tell a user's next item from a random one.

    Args:
        raw: Folder with NAME.txt and NAME_item2attributes.json, each plain or gzipped (.gz).
        name: Which category's files, for example Toys_and_Games or Beauty.
        max_history: How many of the user's last items a row keeps; a run can cut further.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda _, seed: _Purchases(raw, name, max_history, seed),
        lengths={"max_history": max_history},
        named={"name": name},
        **common,
    )


class _Purchases(EventLog):
    """The raw files.

    Args:
        raw: Their folder.
        name: Of the data set.
        max_history: Events of a history.
        seed: Of the negatives.
    """

    order = ("user", "place", "line")

    def __init__(self, raw: str, name: str, max_history: int, seed: int) -> None:
        path = find_raw(raw, f"{name}.txt", SOURCE)
        self.file = LineFile(path, PATTERN, encoding="latin-1")
        self.columns = tuple(self.file.columns().names)
        self.nothing = f"{path} has no good line. {SOURCE}"
        self._name, self._max_history, self._seed = name, max_history, seed
        self._attributes = find_raw(raw, f"{name}_item2attributes.json", SOURCE)

    def read(self, piece: Piece) -> Read:
        """Take lines apart: a user and the bought items, in the order of time."""
        lines = good_lines(piece.load())
        texts = lines.good["items"].combine_chunks()
        lists = call("split_pattern", texts, options=pc.SplitPatternOptions(" "))
        # A space stands before the first item, too.
        counts = call("list_value_length", lists).to_numpy() - 1
        items = lists.flatten().filter(call("not_equal", lists.flatten(), ""))
        ends = np.cumsum(counts)
        events = {
            "user": np.repeat(pc.cast(lines.good["user"], pa.int64()).to_numpy(), counts),
            "place": np.arange(len(items)) - np.repeat(ends - counts, counts),
            "line": np.repeat(piece.first + lines.rows_N, counts),
            "item": pc.cast(items, pa.int64()),
        }
        return Read(events=pa.table(events), good=lines.good.num_rows, bad=lines.bad)

    def counting(self, scratch: str, bad: BadRecords) -> Counting:
        """Read the attributes."""
        attributes = _attributes(self._attributes)
        return _Counting(self._name, attributes, self._max_history, self._seed, scratch)


def _attributes(path: str) -> dict[int, list[int]]:
    """Read the attributes of each item, the most particular one last."""
    raw = read_json(path)
    try:
        return {int(item): [int(attribute) for attribute in raw[item]] for item in raw}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not item -> list of integers ({error}). {SOURCE}") from error


def _left(times: Timelines) -> np.ndarray:
    """Return how many purchases each user makes after each: ``(N,)``."""
    return times.count - 1 - times.position


class _Counting(Counting):
    """Counts items: all of them, of which negatives are drawn, and those of training rows."""

    def __init__(
        self,
        name: str,
        attributes: dict[int, list[int]],
        max_history: int,
        seed: int,
        scratch: str,
    ) -> None:
        self._name, self._attributes = name, attributes
        self._max_history, self._seed = max_history, seed
        self._sold = ValueCounts(scratch, "sold")
        self._trained = ValueCounts(scratch, "trained")

    def count(self, events: pa.Table) -> Tally:
        """Count some users' items."""
        times = Timelines(events["user"].to_numpy())
        trained_N = _left(times) >= 2
        self._sold.add(events["item"])
        self._trained.add(events["item"].filter(pa.array(trained_N)))
        histories_N = np.minimum(times.position, self._max_history)
        return Tally(
            rows=2 * int((times.position > 0).sum()),
            trained=2 * int((trained_N & (times.position > 0)).sum()),
            entries=2 * 2 * int(histories_N.sum()),
            numbered=times.users,
        )

    def encoding(self) -> Encoding:
        """Return what encodes."""
        return _Encoding(
            self._name,
            np.sort(self._sold.at_least(1)["value"].to_numpy()),
            self._trained.at_least(1),
            self._attributes,
            max_history=self._max_history,
            seed=self._seed,
        )


class _Encoding(Encoding):
    """Ids of everything.

    Args:
        name: Of the data set.
        items: All of them, sorted; where one stands is its code.
        trained: ``value`` and ``count`` of the items of training rows.
        attributes: Of each item.
        max_history: Events of a history.
        seed: Of the negatives.
    """

    def __init__(
        self,
        name: str,
        items: np.ndarray,
        trained: pa.Table,
        attributes: dict[int, list[int]],
        *,
        max_history: int,
        seed: int,
    ) -> None:
        self._items, self._max_history, self._seed = items, max_history, seed
        values, counts = (trained[column].to_numpy() for column in ("value", "count"))
        item_ids = Vocabulary.of(values, counts)
        self._item = item_ids.encode(items)

        lists = [attributes.get(item, []) for item in items.tolist()]
        last = np.array([values[-1] if values else -1 for values in lists])
        trained_last = last[np.searchsorted(items, values)]
        category_ids = Vocabulary.weighted(
            trained_last[trained_last >= 0], counts[trained_last >= 0]
        )
        self._category = category_ids.encode(last)
        flat = np.array(list(chain.from_iterable(lists)), dtype=np.int64)
        attribute_ids = Vocabulary.count(flat)
        self._attributes = attribute_ids.encode(flat)
        self._attributes_begin = np.cumsum([0, *map(len, lists)])
        self._notes = {"items_without_attributes": sum(not values for values in lists)}
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
    def notes(self) -> Mapping[str, int]:
        """What was unknown."""
        return self._notes

    def encode(self, events: pa.Table, before: Tally) -> EncodedEvents:
        """Encode some users' purchases; users are numbered in their order."""
        user_N = events["user"].to_numpy()
        times = Timelines(user_N)
        code_N = np.searchsorted(self._items, events["item"].to_numpy())
        negative_N = draw_negatives(user_N, code_N, len(self._items), self._seed)
        event_P = np.flatnonzero(times.position > 0)
        split_P = np.array([2, 1, 0])[np.minimum(_left(times), 2)][event_P]
        item_N, category_N = self._item[code_N], self._category[code_N]

        def rows(rows_M: np.ndarray) -> pa.Table:
            event_M, label_M = event_P[rows_M // 2], 1 - rows_M % 2
            history = times.earlier(event_M, self._max_history)
            code_M = np.where(label_M, code_N[event_M], negative_N[event_M])
            begin_M = self._attributes_begin[code_M]
            attributes = runs(begin_M, self._attributes_begin[code_M + 1] - begin_M)
            columns = {
                "item": self._item[code_M],
                "category": self._category[code_M],
                "history_item": history.lists(item_N),
                "history_category": history.lists(category_N),
                "attributes": attributes.lists(self._attributes),
                "label": label_M.astype(np.int8),
                "user": before.numbered + times.user[event_M],
            }
            return pa.table(columns)

        return EncodedEvents(split_R=np.repeat(split_P, 2), rows=rows)


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
