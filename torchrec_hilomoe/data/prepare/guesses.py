"""What each column of somebody's table may be for, guessed from its name and its values."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from torchrec_hilomoe.data.prepare.seen_columns import SeenColumn
from torchrec_hilomoe.data.schema_parts import TABLE_NAME, TAKEN

__all__ = ["Guess", "Guesses", "guess"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LABELS = _words("label click clicked target converted conversion purchase purchased y")
USERS = _words("user member customer visitor uid account reader viewer session")
ITEMS = _words(
    "item product ad advert video movie news article sku creative song track doc document post "
    "listing hotel book game app"
)
EVENTS = _words(
    "history hist clicked viewed seen watched bought purchased past last recent previous sequence "
    "seq click view"
)
TIMES = _words("time timestamp ts date datetime at when ms")
IDS = _words(
    "id code type category cat kind class brand zip city country region hour day weekday month os "
    "browser device gender page site slot position rank channel campaign store shop language"
)
QUANTITIES = _words(
    "price count cnt num number amount score rate ratio age duration length size total avg mean "
    "log days hours minutes seconds weight distance percent share"
)
SECONDS, MILLISECONDS = (10**8, 4 * 10**9), (10**11, 4 * 10**12)
FEW = 100  # different whole numbers that are rather names than quantities
ENOUGH = 100  # rows from which it means something that all values differ
SHARED = 0.3  # of a history's values, from which it shares the table of a column


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A column and why it stands where it does.

    Attributes:
        column: What was seen of it.
        why: In words.
        table: The embedding table; empty for numbers that are no lists.
        bucketed: Whether its values are numbers, which that table has buckets of.
    """

    column: SeenColumn
    why: str
    table: str = ""
    bucketed: bool = False


@dataclass(kw_only=True)
class Guesses:
    """A schema in the making; its parts are those of :class:`~torchrec_hilomoe.data.schema.Schema`.

    Attributes:
        label: None if no column holds 0 and 1.
        group: None where nothing is a user; GAUC then averages over the candidate's values.
        time: None if nothing is.
        candidate: The first is the item.
        history: Lists of equal lengths.
        history_time: When each event happened.
        pooled: One id a row, or a list.
        dense: Numbers.
        left_out: Columns that no part of a schema is made of.
    """

    label: Guess | None = None
    group: Guess | None = None
    time: Guess | None = None
    candidate: list[Guess]
    history: list[Guess]
    history_time: Guess | None = None
    pooled: list[Guess]
    dense: list[Guess]
    left_out: list[Guess]


def guess(columns: Sequence[SeenColumn]) -> Guesses:
    """Give every column its place."""
    found = Guesses(candidate=[], history=[], pooled=[], dense=[], left_out=[])
    rest = [column for column in columns if not _place_special(column, columns, found)]
    ids = _of_one_separator([column for column in rest if _place_plain(column, found)], found)
    items = [c for c in ids if not c.is_list and c.words & ITEMS and not c.words & USERS]
    others = [c for c in ids if not c.is_list and not c.words & USERS]
    if items or others:
        item = max(items or others, key=lambda c: len(c.distinct))
        why = "its name says an item" if items else "has the most values of all ids"
        found.candidate = [Guess(column=item, why=f"{why}; {_count(item)}", table=_table(item))]
    _place_lists([c for c in ids if c.is_list], ids, found)
    shared = {field.table for field in found.history}
    placed = {g.column.name for g in (*found.candidate, *found.history, *found.pooled)}
    for column in ids:
        if column.name in placed or column.is_list:
            continue
        one = Guess(column=column, why=_count(column), table=_table(column))
        (found.candidate if one.table in shared else found.pooled).append(one)
    users = [g for g in found.pooled if g.column.words & USERS and not g.column.is_list]
    if users:
        found.group = Guess(column=users[0].column, why="its name says a user")
    return found


def _place_special(column: SeenColumn, columns: Sequence[SeenColumn], found: Guesses) -> bool:
    """Place label, time, and what is of no use; say whether it was one of them."""
    clicks = [c for c in columns if c.is_click()]
    named = [c for c in clicks if c.words & LABELS]
    if (named[:1] or (clicks if len(clicks) == 1 else [])) == [column]:
        rate = float(column.values.cast(pl.Float64).sum()) / len(column.values)
        found.label = Guess(column=column, why=f"only 0 and 1; {rate:.1%} are 1")
        return True
    if reason := _useless(column):
        found.left_out.append(Guess(column=column, why=reason))
        return True
    if column.is_list or not (column.kind == "moment" or column.words & TIMES):
        return False
    low, high = (column.entries.min(), column.entries.max())
    if column.kind == "integer" and isinstance(low, int) and isinstance(high, int):
        if MILLISECONDS[0] <= low and high <= MILLISECONDS[1]:
            reason = "looks like milliseconds; divide by 1000 and name it as time"
            found.left_out.append(Guess(column=column, why=reason))
            return True
        if not (SECONDS[0] <= low and high <= SECONDS[1]):
            return False
    elif column.kind != "moment":
        return False
    if found.time is None:
        found.time = Guess(column=column, why=f"a time, {low} to {high}")
    else:
        found.left_out.append(Guess(column=column, why="a second time; a schema has one"))
    return True


def _useless(column: SeenColumn) -> str | None:
    if column.kind == "unreadable":
        return f"its type {column.stored} is none that a feature can have"
    if len(column.distinct) < 2:
        return "has the same value in every row" if len(column.distinct) else "has no value"
    own = not column.is_list and column.kind in ("text", "integer")
    own = own and len(column.distinct) == len(column.values) >= ENOUGH
    if own and not column.words & (ITEMS | USERS | QUANTITIES | TIMES):
        return "every row has a value of its own, which tells nothing about another"
    return None


def _place_plain(column: SeenColumn, found: Guesses) -> bool:
    """Place a number; say whether it is an id instead."""
    if column.is_list or column.kind in ("text", "fingerprint"):
        return True
    names = column.words & (IDS | ITEMS | USERS)
    quantity = column.words & QUANTITIES and "id" not in column.words
    if column.kind == "integer" and not quantity and (names or len(column.distinct) <= FEW):
        return True
    why = f"numbers, {column.entries.min()} to {column.entries.max()}"
    if column.kind == "integer" and not quantity:
        why += "; if they are names of something, make it a pooled feature"
    if column.missing:
        why += f"; {column.missing:.1%} are missing: prepare with --fill_dense 0"
    found.dense.append(Guess(column=column, why=why))
    return False


def _of_one_separator(ids: Sequence[SeenColumn], found: Guesses) -> list[SeenColumn]:
    """Leave out lists in text that are separated otherwise than most of them."""
    counts = Counter(column.separator for column in ids if column.separator)
    most = max(counts, key=lambda it: counts[it], default="")
    for column in ids:
        if column.separator not in ("", most):
            why = (
                f"its entries are separated by {column.separator!r}, but preparing takes one "
                f"separator, and {most!r} is that of most lists"
            )
            found.left_out.append(Guess(column=column, why=why))
    return [column for column in ids if column.separator in ("", most)]


def _place_lists(lists: Sequence[SeenColumn], ids: Sequence[SeenColumn], found: Guesses) -> None:
    """Lists that compare with the candidate are its history; those as long go with it."""
    scalars = [c for c in ids if not c.is_list]
    item = found.candidate[0].column if found.candidate else None
    lengths: pl.Series | None = None
    # Numbers go with the events of ids that are as many.
    ordered = sorted(lists, key=lambda c: (_is_amount(c), item is None or not _share(c, item)))
    for column in ordered:
        own = column.values.list.len().fill_null(0)
        alike = lengths is not None and own.equals(lengths)
        numbers = _is_amount(column)
        if alike and not numbers and (column.kind == "moment" or column.words & TIMES):
            found.history_time = Guess(column=column, why="when each event happened")
            continue
        of = [c for c in scalars if c is item or c.words & column.words - EVENTS]
        best = max(of, key=lambda c: _share(column, c), default=None)
        share = 0.0 if best is None else _share(column, best)
        shares = best is not None and share >= SHARED
        events = (shares and best is item) or column.words & EVENTS
        table = _table(best) if best is not None and shares else _table(column)
        why = f"up to {column.longest} entries"
        if numbers:
            why += f", numbers from {column.entries.min()} to {column.entries.max()}"
        if best is not None and shares:
            why += f", {share:.0%} of whose values are those of {best.name}"
        if numbers and not alike:
            why = f"{why}, which are as many as no history's events; such lists may be pooled"
            found.left_out.append(Guess(column=column, why=why))
            continue
        place = found.history if alike or (events and lengths is None) else found.pooled
        if place is found.history and lengths is None:
            lengths = own
        place.append(Guess(column=column, why=why, table=table, bucketed=numbers))


def _is_amount(column: SeenColumn) -> bool:
    """Say whether a list holds numbers that are no names of anything, such as dwell times."""
    whole = column.kind == "integer" and column.words & QUANTITIES and "id" not in column.words
    return column.kind == "number" or bool(whole and len(column.distinct) > FEW)


def _share(column: SeenColumn, other: SeenColumn) -> float:
    """Of the values of one, those that the other has, too."""
    if column.kind != other.kind or not len(column.distinct):
        return 0.0
    return float(column.distinct.is_in(other.distinct.implode()).to_numpy().mean())


def _count(column: SeenColumn) -> str:
    return f"{len(column.distinct):,} values"


def _table(column: SeenColumn) -> str:
    """Name a table as the column, without the id at its end."""
    name = re.sub(r"[^\w -]", "_", re.sub(r"(?i)[_ -]?id$", "", column.name) or column.name)
    name = name[:90] if TABLE_NAME.fullmatch(name[:90]) else f"table_{name.strip()[:80]}"
    return f"{name}_table" if name in TAKEN else name
