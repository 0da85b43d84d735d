"""MovieLens-1M: a click is a rating of four stars or more.

The history is what the user rated before, movie by movie, with genres and stars. Each user's
ratings are cut in the order of time: the first 80 % train, the next 10 % validate, the last
10 % test. Everything in a row but its label is known before the rating is given.

Shape legend:
    N  ratings, sorted by user and time
    M  ratings that become rows of a table
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import EncodedLog, history_group, prepare_log, ReadLog
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw, read_records
from torchrec_hilomoe.data.prepare.runs import runs
from torchrec_hilomoe.data.prepare.timelines import Timelines
from torchrec_hilomoe.data.prepare.vocabulary import Vocabulary
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema

__all__ = ["prepare_movielens"]

SOURCE = (
    "Get MovieLens-1M (ml-1m.zip) from https://grouplens.org/datasets/movielens/1m/, unpack it, "
    "and name its folder with --raw."
)
ENCODING = "latin-1"
NUMBER = "[0-9]{1,18}"
PATTERNS = {
    "ratings.dat": f"(?P<user>{NUMBER})::(?P<movie>{NUMBER})::(?P<stars>[1-5])::(?P<time>{NUMBER})",
    "movies.dat": f"(?P<movie>{NUMBER})::(?P<title>.*)::(?P<genres>[^:]*)",
    "users.dat": f"(?P<user>{NUMBER})::(?P<gender>[MF])::(?P<age>{NUMBER})"
    f"::(?P<occupation>{NUMBER})::(?P<zip>[0-9A-Za-z -]*)",
}
CLICK_STARS = 4
MAX_STARS = 5
ZIP_DIGITS = 3  # an area of the United States; the whole code is close to being the user
TRAIN_PERCENT, VALID_PERCENT = 80, 10


def prepare_movielens(
    *,
    raw: str,
    out: str,
    max_history: int = 50,
    max_liked: int = 100,
    seed: int = 0,
    max_bad_rows: int = 100,
    overwrite: bool = False,
) -> Report:
    """Prepare MovieLens-1M: predict whether a user gives a movie four stars or more.

    Args:
        raw: Folder with ratings.dat, movies.dat and users.dat, each plain or gzipped (.gz).
        out: Folder to make.
        max_history: How many of the user's last ratings a row keeps; a run can cut further.
        max_liked: How many of the user's last liked movies a row keeps, as a bag.
        seed: Of the order in which training rows are written.
        max_bad_rows: Malformed raw lines that are skipped before it is fatal.
        overwrite: Replace prepared data that is in the way.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """

    def read(bad: BadRecords) -> ReadLog:
        tables = {name: _read(raw, name, bad) for name in PATTERNS}
        return ReadLog(
            log=_Ratings(tables, max_history=max_history, max_liked=max_liked),
            rows_read=sum(table.num_rows for table in tables.values()),
        )

    return prepare_log(
        read,
        out=out,
        lengths={"max_history": max_history, "max_liked": max_liked},
        seed=seed,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )


def _read(raw: str, name: str, bad: BadRecords) -> pa.Table:
    path = find_raw(raw, name, SOURCE)
    tables = list(read_records(path, PATTERNS[name], bad, encoding=ENCODING))
    if not sum(table.num_rows for table in tables):
        raise DataError(f"{path} has no good line. {SOURCE}")
    return pa.concat_tables(tables)


def _ints(table: pa.Table, name: str) -> np.ndarray:
    return pc.cast(table.column(name), pa.int64()).to_numpy()


def _texts(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table.column(name).to_pylist(), dtype=str)


def _repeated(ratings: pa.Table) -> np.ndarray:
    """Mark a user's later ratings of the same movie: the history would hold the answer."""
    user, movie, time = (_ints(ratings, name) for name in ("user", "movie", "time"))
    order = np.lexsort((time, movie, user))
    again = np.zeros(len(order), dtype=bool)
    same_user = user[order[1:]] == user[order[:-1]]
    again[order[1:]] = same_user & (movie[order[1:]] == movie[order[:-1]])
    return again


def _codes(values: np.ndarray) -> np.ndarray:
    """Return the ids of one attribute, one a line, with 0 after the last for "no such line"."""
    return np.append(Vocabulary.count(values).encode(values), np.int32(0))


def _line_of(keys: np.ndarray, wanted_N: np.ndarray) -> np.ndarray:
    """Return the line that has each wanted key; ``len(keys)`` where none has."""
    order = np.argsort(keys, kind="stable")
    at_N = order[np.minimum(np.searchsorted(keys, wanted_N, sorter=order), len(keys) - 1)]
    return np.where(keys[at_N] == wanted_N, at_N, len(keys))


class _Ratings(EncodedLog):
    """The ratings as ids, and the rows they become.

    Args:
        tables: The raw files.
        max_history: Events of a history.
        max_liked: Events of the bag of liked movies.
    """

    def __init__(self, tables: dict[str, pa.Table], *, max_history: int, max_liked: int) -> None:
        ratings, movies, users = (tables[name] for name in PATTERNS)
        repeated = _repeated(ratings)
        ratings = ratings.filter(pa.array(~repeated))
        user_N, movie_N = _ints(ratings, "user"), _ints(ratings, "movie")
        self._times = Timelines(user_N, _ints(ratings, "time"))
        user_N, movie_N = user_N[self._times.order], movie_N[self._times.order]
        self._split_N = self._times.split(TRAIN_PERCENT, VALID_PERCENT)
        train_N = self._split_N == 0

        # A user is known by being there; a movie or a set of genres only by a training row.
        user_ids = Vocabulary.count(user_N)
        movie_ids = Vocabulary.count(movie_N[train_N])
        self._user_N, self._movie_N = user_ids.encode(user_N), movie_ids.encode(movie_N)
        self._stars_N = _ints(ratings, "stars")[self._times.order].astype(np.int32)
        self._liked_N = self._stars_N >= CLICK_STARS
        self._liked_before_N = self._times.chosen_before(self._liked_N)
        self._liked_movie = self._movie_N[self._liked_N]

        genre_lists = [
            sorted(set(text.split("|")) - {""}) for text in movies.column("genres").to_pylist()
        ]
        self._movie_line_N = _line_of(_ints(movies, "movie"), movie_N)
        sets = np.array(["|".join(names) for names in genre_lists] + [""], dtype=str)
        set_N = np.unique(sets, return_inverse=True)[1][self._movie_line_N]
        known_N = self._movie_line_N < len(genre_lists)
        set_ids = Vocabulary.count(set_N[train_N & known_N])
        self._genre_set_N = np.where(known_N, set_ids.encode(set_N), 0).astype(np.int32)
        names = np.array([name for names in genre_lists for name in names], dtype=str)
        genre_ids = Vocabulary.count(names)
        self._genres = genre_ids.encode(names)
        self._genres_begin = np.cumsum([0, *map(len, genre_lists), 0])

        self._user_line_N = _line_of(_ints(users, "user"), user_N)
        profiles = {name: _texts(users, name) for name in ("gender", "age", "occupation", "zip")}
        profiles["zip"] = profiles["zip"].astype(f"<U{ZIP_DIGITS}")
        self._profiles = {name: _codes(values) for name, values in profiles.items()}
        self._notes = {
            "repeated_ratings_dropped": int(repeated.sum()),
            "ratings_of_movies_not_in_movies.dat": int((~known_N).sum()),
            "ratings_of_users_not_in_users.dat": int((self._user_line_N == users.num_rows).sum()),
        }
        self._max_history, self._max_liked = max_history, max_liked
        self._schema = _schema(
            {
                "movie": movie_ids.size,
                "genre_set": set_ids.size,
                "rating": MAX_STARS + 1,
                "liked_movie": movie_ids.size,
                "genre": genre_ids.size,
                "user": user_ids.size,
                **{name: int(codes.max()) + 1 for name, codes in self._profiles.items()},
            },
            max_history=max_history,
            max_liked=max_liked,
        )

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    @property
    def split_N(self) -> np.ndarray:
        """Index into ``SPLITS`` of each rating."""
        return self._split_N

    @property
    def notes(self) -> dict[str, int]:
        """What was dropped or unknown."""
        return self._notes

    def rows(self, rows_M: np.ndarray) -> pa.Table:
        """Return the rows that predict the given ratings."""
        history = self._times.earlier(rows_M, self._max_history)
        liked = self._times.earlier_chosen(self._liked_before_N, rows_M, self._max_liked)
        line_M = self._movie_line_N[rows_M]
        begin_M = self._genres_begin[line_M]
        genres = runs(begin_M, self._genres_begin[line_M + 1] - begin_M)
        position_M = self._times.position[rows_M]
        liked_M = self._liked_before_N[rows_M] - self._liked_before_N[self._times.begin[rows_M]]
        user_line_M = self._user_line_N[rows_M]
        columns = {
            "movie": self._movie_N[rows_M],
            "genre_set": self._genre_set_N[rows_M],
            "history_movie": history.lists(self._movie_N),
            "history_genre_set": history.lists(self._genre_set_N),
            "history_rating": history.lists(self._stars_N),
            "user": self._user_N[rows_M],
            **{name: codes[user_line_M] for name, codes in self._profiles.items()},
            "genres": genres.lists(self._genres),
            "liked_movies": liked.lists(self._liked_movie),
            "history_length": np.log1p(position_M).astype(np.float32),
            "like_rate": ((liked_M + 1) / (position_M + 2)).astype(np.float32),
            "label": self._liked_N[rows_M].astype(np.int8),
        }
        return pa.table(columns)


def _schema(tables: dict[str, int], *, max_history: int, max_liked: int) -> Schema:
    history = {"movie": "movie", "genre_set": "genre_set", "rating": "rating"}
    return Schema(
        dataset="movielens-1m",
        tables=tables,
        candidate=(
            IdFeature(name="movie", table="movie"),
            IdFeature(name="genre_set", table="genre_set"),
        ),
        sequences=(history_group(history, max_history),),
        pooled=(
            *(
                PooledFeature(name=name, table=name)
                for name in ("user", "gender", "age", "occupation", "zip")
            ),
            PooledFeature(name="genres", table="genre", max_length=max(2, tables["genre"] - 1)),
            PooledFeature(name="liked_movies", table="liked_movie", max_length=max_liked),
        ),
        dense=("history_length", "like_rate"),
        label="label",
        group="user",
    )
