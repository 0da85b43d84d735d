"""MovieLens-1M's movies and users, by line of their files."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from torchrec_hilomoe.data.prepare.counting import by_frequency
from torchrec_hilomoe.data.prepare.encoding import encoder_of

__all__ = ["PROFILE", "Movies", "Users"]

PROFILE = ("gender", "age", "occupation", "zip")


class _Keys:
    """Which line has a key.

    Args:
        keys: Of each line, any order; of a key that occurs twice, the first line counts.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.lines = len(keys)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def line_of(self, wanted_N: np.ndarray) -> np.ndarray:
        """Return the line that has each wanted key; ``lines`` where none has."""
        at_N = np.minimum(np.searchsorted(self._keys, wanted_N), self.lines - 1)
        return np.where(self._keys[at_N] == wanted_N, self._order[at_N], self.lines)


@dataclass(frozen=True, kw_only=True)
class Movies:
    """The genres of each movie.

    One line more than there are stands for a movie that is on no line: it has no genre.

    Attributes:
        keys: Movies.
        genre_set: Of each line, a number that is the same for the same genres.
        genres: Ids of all lines' genres.
        genres_begin: Where those of each line begin, and those of the last one end.
        genre_rows: Of the genres' table.
    """

    keys: _Keys
    genre_set: np.ndarray
    genres: np.ndarray
    genres_begin: np.ndarray
    genre_rows: int

    @classmethod
    def of(cls, lines: pl.DataFrame) -> "Movies":
        """Take the lines of movies.dat."""
        lists = [sorted(set(text.split("|")) - {""}) for text in lines["genres"]]
        sets = np.array(["|".join(names) for names in lists] + [""], dtype=str)
        names = pl.Series([name for names in lists for name in names], dtype=pl.String)
        ids, rows = _ids(names)
        return cls(
            keys=_Keys(lines["movie"].to_numpy()),
            genre_set=np.unique(sets, return_inverse=True)[1],
            genres=ids,
            genres_begin=np.cumsum([0, *map(len, lists), 0]),
            genre_rows=rows,
        )


@dataclass(frozen=True, kw_only=True)
class Users:
    """The profile of each user, as ids.

    Attributes:
        keys: Users.
        profiles: For each attribute, the id of each line, and after the last a 0 for "no such
            line".
        rows: Of each attribute's table.
    """

    keys: _Keys
    profiles: Mapping[str, np.ndarray]
    rows: Mapping[str, int]

    @classmethod
    def of(cls, lines: pl.DataFrame) -> "Users":
        """Take the lines of users.dat."""
        found = {name: _ids(lines[name].cast(pl.String)) for name in PROFILE}
        return cls(
            keys=_Keys(lines["user"].to_numpy()),
            profiles={name: np.append(ids, np.int32(0)) for name, (ids, _) in found.items()},
            rows={name: rows for name, (_, rows) in found.items()},
        )


def _ids(values: pl.Series) -> tuple[np.ndarray, int]:
    """Return ids by frequency, int32, and how many rows their table has."""
    ranked = by_frequency(values.alias("value").value_counts(name="count"))
    return encoder_of(ranked, 0).encode(values).to_numpy().astype(np.int32), len(ranked) + 1
