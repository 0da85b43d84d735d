"""Amazon purchase sequences, by the protocol of AmazonElectronics_x1.

Each purchase but a user's first is a click, and gets one negative: an item that the user never
bought, drawn uniformly among the items of training rows. The history is what the user bought
before. A user's last purchase is for testing, the one before for validation. The user is only the
group of GAUC, not a feature.

Shape legend:
    N  purchases of some users, sorted by user and time
    P  purchases with a history
    K  items that may be drawn as negatives
    M  rows of a table: row 2p is purchase p, row 2p + 1 its negative
"""

from collections.abc import Mapping
from itertools import chain
from typing import Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.counting import by_frequency, ValueCounts
from torchrec_hilomoe.data.prepare.encoding import encoder_of
from torchrec_hilomoe.data.prepare.event_log import (
    Counting,
    EncodedEvents,
    Encoding,
    EventLog,
    Read,
    Tally,
)
from torchrec_hilomoe.data.prepare.folder import Report, vocabulary_file
from torchrec_hilomoe.data.prepare.log import history_group, prepare_log
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, read_json
from torchrec_hilomoe.data.prepare.sources import LineFile, MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import ranges, Timelines
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, VocabularyRule

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
        self.columns = self.file.columns()
        self.nothing = f"{path} has no good line. {SOURCE}"
        self._name, self._max_history, self._seed = name, max_history, seed
        self._attributes = find_raw(raw, f"{name}_item2attributes.json", SOURCE)

    def read(self, batch: pl.DataFrame) -> Read:
        """Take lines apart: a user and the bought items, in the order of time."""
        good = batch.filter(pl.col(MALFORMED).is_null())
        items = pl.col("items").str.strip_prefix(" ").str.split(" ").cast(pl.List(pl.Int64))
        events = good.select(pl.col("user").cast(pl.Int64), line=ROW, item=items).with_columns(
            place=pl.int_ranges(pl.col("item").list.len())
        )
        bad = batch.filter(pl.col(MALFORMED).is_not_null()).select(PLACE, MALFORMED)
        return Read(events=events.explode("place", "item"), good=good.height, bad=bad.rows())

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
    """Counts items: all of them, and those of training rows, of which negatives are drawn."""

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
        items = pl.Series(events["item"])
        self._sold.add(items)
        self._trained.add(items.filter(trained_N))
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
            self._sold.at_least(1)["value"].sort().to_numpy(),
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
        trained: pl.DataFrame,
        attributes: dict[int, list[int]],
        *,
        max_history: int,
        seed: int,
    ) -> None:
        self._items, self._max_history, self._seed = items, max_history, seed
        lists = [attributes.get(item, []) for item in items.tolist()]
        last = pl.Series([values[-1] if values else None for values in lists], dtype=pl.Int64)
        begins = np.cumsum([0, *map(len, lists)])
        flat = pl.Series(list(chain.from_iterable(lists)), dtype=pl.Int64)
        # Only items of training rows say what is known: their categories as often as they were
        # bought, their attributes once each.
        bought = pl.DataFrame({"value": items}).join(trained, "value", "left")["count"]
        item_N = np.repeat(np.arange(len(items)), np.diff(begins))
        counts = pl.DataFrame({"value": flat, "count": bought[item_N].is_not_null().cast(pl.Int64)})
        self._vocabularies = {
            "item": by_frequency(trained),
            "category": _ranked(pl.DataFrame({"value": last, "count": bought})),
            "attribute": _ranked(counts),
        }
        encode = {t: encoder_of(values, 0).encode for t, values in self._vocabularies.items()}
        self._item = encode["item"](pl.Series(items)).to_numpy().astype(np.int32)
        self._known = np.flatnonzero(self._item)
        self._category = encode["category"](last).to_numpy().astype(np.int32)
        self._attributes = encode["attribute"](flat).to_numpy().astype(np.int32)
        self._attributes_begin = begins
        self._notes = {"items_without_attributes": sum(not values for values in lists)}
        self._schema = _schema(
            f"amazon-{name}",
            {table: len(values) + 1 for table, values in self._vocabularies.items()},
            max_history=max_history,
            max_attributes=max(2, *map(len, lists)),
        )

    @property
    def vocabularies(self) -> Mapping[str, pl.Series]:
        """Raw values."""
        return self._vocabularies

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
        negative_N = _draw_negatives(user_N, code_N, self._known, self._seed)
        event_P = np.flatnonzero(times.position > 0)
        split_P = np.array([2, 1, 0])[np.minimum(_left(times), 2)][event_P]
        item_N, category_N = self._item[code_N], self._category[code_N]

        def rows(rows_M: np.ndarray) -> pa.Table:
            event_M, label_M = event_P[rows_M // 2], 1 - rows_M % 2
            history = times.earlier(event_M, self._max_history)
            code_M = np.where(label_M, code_N[event_M], negative_N[event_M])
            begin_M = self._attributes_begin[code_M]
            attributes = ranges(begin_M, self._attributes_begin[code_M + 1] - begin_M)
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
        vocabularies={
            table: VocabularyRule(kind="counted", file=vocabulary_file(table)) for table in tables
        },
    )


def _ranked(values: pl.DataFrame) -> pl.Series:
    """Return each value once, that of the largest sum of counts first."""
    counts = values.drop_nulls().group_by("value").agg(pl.col("count").sum())
    return by_frequency(counts.filter(pl.col("count") > 0))


def _draw_negatives(
    user_N: np.ndarray, code_N: np.ndarray, known_K: np.ndarray, seed: int
) -> np.ndarray:
    """Draw, for each event, a known item that its user never had, each with the same chance.

    All other items share id 0: as negatives they would teach a model that id 0 is never clicked,
    and a new item that is bought later has id 0, too. A draw is a hash of the seed, the user, the
    event's place and the attempt, so it does not depend on which other users are looked at.

    Args:
        user_N: Whose event; all events of these users are there.
        code_N: The item of each event, a number from 0.
        known_K: The items that may be drawn, rising; at least one.
        seed: Of the draws.

    Returns:
        The item that is drawn for each event, ``(N,)``.

    Raises:
        DataError: If a user has every known item.
    """
    times = Timelines(user_N)
    items = len(known_K)
    # Among users and known items alone; other items cannot be drawn.
    place_N = np.minimum(np.searchsorted(known_K, code_N), items - 1)
    had = np.unique((times.user * items + place_N)[known_K[place_N] == code_N])
    full = np.bincount(had // items, minlength=times.users) == items
    if full.any():
        user = user_N[times.user == np.argmax(full)][0]
        raise DataError(
            f"user {user} has bought all {items} items of the training rows, so no item is left "
            "to draw a negative from; take a larger data set."
        )
    salt_N = mix64(mix64(np.full(len(user_N), seed)) ^ user_N.astype(np.uint64))
    keys_N = mix64(salt_N + times.position.astype(np.uint64))
    drawn_N = np.empty(len(user_N), dtype=np.int64)
    open_N, attempt = np.arange(len(user_N)), 0
    while len(open_N):
        drawn = mix64(keys_N[open_N] + np.uint64(attempt)) % np.uint64(items)
        drawn_N[open_N] = drawn.astype(np.int64)
        open_N = open_N[np.isin(times.user[open_N] * items + drawn_N[open_N], had)]
        attempt += 1
    return known_K[drawn_N]
