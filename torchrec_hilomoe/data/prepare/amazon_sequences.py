"""Amazon purchase sequences, by the protocol of AmazonElectronics_x1.

Each purchase but a user's first is a click, and gets one negative: an item that the user never
bought, drawn uniformly among the items of training rows. The history is what the user bought
before. A user's last purchase is for testing, the one before for validation. The user is only the
group of GAUC, not a feature.

Shape legend:
    N  purchases of some users, sorted by user and time
    K  items that may be drawn as negatives
    M  rows of a table: row 2p is purchase p that has a history, row 2p + 1 its negative
"""

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.counting import by_frequency
from torchrec_hilomoe.data.prepare.encoding import encode_lists, encoder_of
from torchrec_hilomoe.data.prepare.folder import Report, vocabulary_file
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
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, read_json
from torchrec_hilomoe.data.prepare.sources import LineFile, MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import earlier, Lines
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

    Only items of training rows say what is known: their categories as often as they were bought,
    their attributes once each.

    Args:
        raw: Their folder.
        name: Of the data set.
        max_history: Events of a history.
        seed: Of the negatives.
    """

    order = ("user", "place", "line")
    counted = dict.fromkeys(("item", "category", "item_without_attributes"), pl.Int64)

    def __init__(self, raw: str, name: str, max_history: int, seed: int) -> None:
        path = find_raw(raw, f"{name}.txt", SOURCE)
        self.file = LineFile(path, PATTERN, encoding="latin-1")
        self.columns = self.file.columns()
        self.nothing = f"{path} has no good line. {SOURCE}"
        self._name, self._max_history, self._seed = name, max_history, seed
        self._path = find_raw(raw, f"{name}_item2attributes.json", SOURCE)

    def read(self, batch: pl.DataFrame) -> Read:
        """Take lines apart: a user and the bought items, in the order of time."""
        good = batch.filter(pl.col(MALFORMED).is_null())
        items = pl.col("items").str.strip_prefix(" ").str.split(" ").cast(pl.List(pl.Int64))
        events = good.select(pl.col("user").cast(pl.Int64), line=ROW, item=items).with_columns(
            place=pl.int_ranges(pl.col("item").list.len())
        )
        bad = batch.filter(pl.col(MALFORMED).is_not_null()).select(PLACE, MALFORMED)
        return Read(events=events.explode("place", "item"), good=good.height, bad=bad.rows())

    def finish_reading(self, bad: BadRecords) -> None:
        """Read the attributes of each item, the most particular one last."""
        raw = read_json(self._path)
        try:
            lists = {int(item): [int(attribute) for attribute in raw[item]] for item in raw}
            attributes = pa.array(lists.values(), pa.large_list(pa.int64()))
            items = pl.DataFrame({"item": pa.array(lists, pa.int64()), "attributes": attributes})
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self._path} is not item -> list of integers ({error}). {SOURCE}"
            ) from error
        self._item_lines = items.with_columns(category=pl.col("attributes").list.last())
        self._items = Lines(self._item_lines, "item")

    def _follow(self, events: pl.DataFrame) -> pl.DataFrame:
        """Say where each purchase stands: what its user bought before, and what is left."""
        position = pl.int_range(pl.len()).over("user")
        left = pl.len().over("user").cast(pl.Int64) - 1 - position
        return events.with_columns(position=position, split=2 - left.clip(upper_bound=2))

    def count(self, events: pl.DataFrame) -> Counted:
        """Count some users' items: those of training rows, of which negatives are drawn."""
        found = self._follow(events)
        found = found.hstack(self._items.of(found["item"]))
        trained, clicks = found.filter(pl.col("split") == 0), found.filter(pl.col("position") > 0)
        lengths = found["attributes"].list.len().fill_null(0)
        tally = Tally(
            rows=2 * clicks.height,
            trained=2 * int((clicks["split"] == 0).sum()),
            entries=2 * 2 * int(found["position"].clip(upper_bound=self._max_history).sum()),
            numbered=found.height - clicks.height,
            longest=int(lengths.to_numpy().max(initial=0)),
        )
        lacking = found["item"].filter(lengths == 0)
        values = {"item": trained["item"], "category": trained["category"]}
        return Counted(tally=tally, values={**values, "item_without_attributes": lacking})

    def learn(self, ranked: Mapping[str, pl.Series], total: Tally) -> Learned:
        """Give values their ids."""
        known, items = ranked["item"], self._item_lines
        attributes = self._items.of(known)["attributes"].explode(empty_as_null=False)
        counts = attributes.alias("value").drop_nulls().value_counts(name="count")
        vocabularies = {
            "item": known,
            "category": ranked["category"],
            "attribute": by_frequency(counts),
        }
        encoders = {table: encoder_of(values, 0) for table, values in vocabularies.items()}
        self._item, self._known = encoders["item"], np.sort(known.to_numpy())
        category = encoders["category"].encode(items["category"]).cast(pl.Int32)
        attributes = encode_lists(encoders["attribute"], items["attributes"])
        self._items = Lines(items.with_columns(category, attributes), "item")
        return Learned(
            schema=_schema(
                f"amazon-{self._name}",
                {table: len(values) + 1 for table, values in vocabularies.items()},
                max_history=self._max_history,
                max_attributes=max(2, total.longest),
            ),
            vocabularies=vocabularies,
            notes={"items_without_attributes": len(ranked["item_without_attributes"])},
        )

    def encode(self, events: pl.DataFrame, before: Tally) -> Encoded:
        """Encode some users' purchases; users are numbered in their order."""
        found = self._follow(events).with_columns(at=pl.int_range(pl.len()))
        user = (pl.col("position") == 0).cast(pl.Int64).cum_sum() - 1
        found = found.with_columns(number=before.numbered + user)
        found = found.with_columns(negative=_draw_negatives(found, self._known, self._seed))
        item_N, category_N = self._facts(found["item"]).select("item", "category")
        clicks = found.filter(pl.col("position") > 0)
        split_R = np.repeat(clicks["split"].to_numpy(), 2)
        clicks = clicks.select("at", "position", "number", "item", "negative")

        def rows(start: int, stop: int) -> dict[str, Any]:
            rows_M = np.arange(start, stop)
            part = clicks[rows_M // 2].with_columns(label=1 - rows_M % 2)
            item = pl.when(pl.col("label") == 1).then("item").otherwise("negative")
            facts = self._facts(part.select(item)["item"])
            history = earlier(part["at"], part["position"], self._max_history)
            return {
                "item": facts["item"].to_numpy(),
                "category": facts["category"].to_numpy(),
                "history_item": history.lists(item_N),
                "history_category": history.lists(category_N),
                "attributes": facts["attributes"].to_arrow(),
                "label": part["label"].to_numpy(),
                "user": part["number"].to_numpy(),
            }

        return Encoded(split_R=split_R, rows=rows)

    def _facts(self, items: pl.Series) -> pl.DataFrame:
        """Return the ids of items, and of what is known of them."""
        return self._items.of(items).select(
            self._item.encode(items).cast(pl.Int32).alias("item"),
            pl.col("category").fill_null(0),
            pl.col("attributes").fill_null([]),
        )


def _schema(
    dataset: str, tables: dict[str, int], *, max_history: int, max_attributes: int
) -> Schema:
    fields = ("item", "category")
    return Schema(
        dataset=dataset,
        tables=tables,
        candidate=tuple(IdFeature(name=name, table=name) for name in fields),
        sequences=(history_group(fields, max_history),),
        pooled=(PooledFeature(name="attributes", table="attribute", max_length=max_attributes),),
        label="label",
        group="user",
        vocabularies={
            table: VocabularyRule(kind="counted", file=vocabulary_file(table)) for table in tables
        },
    )


def _draw_negatives(purchases: pl.DataFrame, known_K: np.ndarray, seed: int) -> pl.Series:
    """Draw, for each purchase, a known item that its user never had, each with the same chance.

    All other items share id 0: as negatives they would teach a model that id 0 is never clicked,
    and a new item that is bought later has id 0, too. A draw is a hash of the seed, the user, the
    event's place and the attempt, so it does not depend on which other users are looked at.

    Args:
        purchases: All of their users: ``user``, ``item``, ``position`` and ``number`` of the user.
        known_K: The items that may be drawn, rising; at least one.
        seed: Of the draws.

    Returns:
        The item that is drawn for each purchase, ``(N,)``.

    Raises:
        DataError: If a user has every known item.
    """
    user_N, item_N = purchases["user"].to_numpy(), purchases["item"].to_numpy()
    number_N = (purchases["number"] - purchases["number"][0]).to_numpy()
    items = len(known_K)
    # Among users and known items alone; other items cannot be drawn.
    place_N = np.minimum(np.searchsorted(known_K, item_N), items - 1)
    had = np.unique((number_N * items + place_N)[known_K[place_N] == item_N])
    full = np.bincount(had // items, minlength=1) == items
    if full.any():
        user = user_N[number_N == np.argmax(full)][0]
        raise DataError(
            f"user {user} has bought all {items} items of the training rows, so no item is left "
            "to draw a negative from; take a larger data set."
        )
    had = np.append(had, np.iinfo(np.int64).max)  # whatever is looked up finds a place
    salt_N = mix64(mix64(np.full(len(user_N), seed)) ^ user_N.astype(np.uint64))
    keys_N = mix64(salt_N + purchases["position"].to_numpy().astype(np.uint64))
    drawn_N = np.empty(len(user_N), dtype=np.int64)
    open_N, attempt = np.arange(len(user_N)), 0
    while len(open_N):
        drawn = mix64(keys_N[open_N] + np.uint64(attempt)) % np.uint64(items)
        drawn_N[open_N] = drawn.astype(np.int64)
        wanted = number_N[open_N] * items + drawn_N[open_N]
        open_N = open_N[had[np.searchsorted(had, wanted)] == wanted]
        attempt += 1
    return pl.Series(known_K[drawn_N])
