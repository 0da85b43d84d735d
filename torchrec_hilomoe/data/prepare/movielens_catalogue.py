"""What MovieLens says of movies and of users, one line each: small beside the ratings.

Shape legend:
    N  keys that are asked about
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.prepare.arrow import call
from torchrec_hilomoe.data.prepare.vocabulary import Vocabulary

__all__ = ["Keys", "Movies", "Users"]

ZIP_DIGITS = 3  # an area of the United States; the whole code is close to being the user
PROFILE = ("gender", "age", "occupation", "zip")


class Keys:
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

    keys: Keys
    genre_set: np.ndarray
    genres: np.ndarray
    genres_begin: np.ndarray
    genre_rows: int

    @classmethod
    def of(cls, lines: pa.Table) -> "Movies":
        """Take the lines of movies.dat."""
        lists = [sorted(set(text.split("|")) - {""}) for text in lines["genres"].to_pylist()]
        sets = np.array(["|".join(names) for names in lists] + [""], dtype=str)
        names = np.array([name for names in lists for name in names], dtype=str)
        ids = Vocabulary.count(names)
        return cls(
            keys=Keys(pc.cast(lines["movie"], pa.int64()).to_numpy()),
            genre_set=np.unique(sets, return_inverse=True)[1],
            genres=ids.encode(names),
            genres_begin=np.cumsum([0, *map(len, lists), 0]),
            genre_rows=ids.size,
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

    keys: Keys
    profiles: Mapping[str, np.ndarray]
    rows: Mapping[str, int]

    @classmethod
    def of(cls, lines: pa.Table) -> "Users":
        """Take the lines of users.dat, as :meth:`piece` made them."""
        lines = lines.unify_dictionaries().combine_chunks()
        profiles, rows = {}, {}
        for name in PROFILE:
            coded = lines[name].chunk(0)
            codes = coded.indices.to_numpy()
            values = np.array(coded.dictionary.to_pylist(), dtype=str)
            counts = np.bincount(codes, minlength=len(values))
            ids = Vocabulary.of(values, counts)
            profiles[name] = np.append(ids.encode(values)[codes], np.int32(0))
            rows[name] = ids.size
        return cls(keys=Keys(lines["user"].to_numpy()), profiles=profiles, rows=rows)

    @staticmethod
    def piece(lines: pa.Table) -> pa.Table:
        """Return some lines in less memory: there may be many users."""
        zips = pc.call_function(
            "utf8_slice_codeunits", [lines["zip"]], pc.SliceOptions(0, ZIP_DIGITS)
        )
        lines = lines.set_column(lines.schema.get_field_index("zip"), "zip", zips)
        coded = {name: call("dictionary_encode", lines[name]) for name in PROFILE}
        return pa.table({"user": pc.cast(lines["user"], pa.int64()), **coded})
