"""MovieLens-1M: a click is a rating of four stars or more.

The history is what the user rated before, movie by movie, with genres and stars. Each user's
ratings are cut in the order of time: the first 80 % train, the next 10 % validate, the last
10 % test. Everything in a row but its label is known before the rating is given.

Shape legend:
    N  ratings of some users, sorted by user and time
    M  ratings that become rows of a table
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.counting import ValueCounts
from torchrec_hilomoe.data.prepare.encoding import encoder_of
from torchrec_hilomoe.data.prepare.event_log import (
    Counting,
    EncodedEvents,
    Encoding,
    EventLog,
    Read,
    Tally,
)
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import history_group, prepare_log
from torchrec_hilomoe.data.prepare.movielens_catalogue import Movies, PROFILE, Users
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw
from torchrec_hilomoe.data.prepare.sources import LineFile, MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import ranges, Timelines
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
TRAIN_PERCENT, VALID_PERCENT = 80, 10
ZIP_DIGITS = 3  # an area of the United States; the whole code is close to being the user


def prepare_movielens(
    *,
    raw: str,
    max_history: int = 50,
    max_liked: int = 100,
    **common: Unpack[Common],
) -> Report:
    """Prepare MovieLens-1M: predict whether a user gives a movie four stars or more.

    Args:
        raw: Folder with ratings.dat, movies.dat and users.dat, each plain or gzipped (.gz).
        max_history: How many of the user's last ratings a row keeps; a run can cut further.
        max_liked: How many of the user's last liked movies a row keeps, as a bag.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda *_: _Ratings(raw, _Lengths(history=max_history, liked=max_liked)),
        lengths={"max_history": max_history, "max_liked": max_liked},
        **common,
    )


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """The most events of a history, and of the bag of liked movies."""

    history: int
    liked: int


class _Ratings(EventLog):
    """The raw files.

    Args:
        raw: Their folder.
        lengths: Of lists.
    """

    order = ("user", "time", "line")

    def __init__(self, raw: str, lengths: _Lengths) -> None:
        self._paths = {name: find_raw(raw, name, SOURCE) for name in PATTERNS}
        path = self._paths["ratings.dat"]
        self.file = LineFile(path, PATTERNS["ratings.dat"], encoding=ENCODING)
        self.columns = self.file.columns()
        self.nothing = f"{path} has no good line. {SOURCE}"
        self._lengths = lengths

    def read(self, batch: pl.DataFrame) -> Read:
        """Take lines apart."""
        good = batch.filter(pl.col(MALFORMED).is_null())
        numbers = pl.col("user", "time", "movie").cast(pl.Int64)
        events = good.select(numbers, pl.col("stars").cast(pl.Int8), line=ROW)
        bad = batch.filter(pl.col(MALFORMED).is_not_null()).select(PLACE, MALFORMED)
        return Read(events=events, good=good.height, bad=bad.rows())

    def counting(self, scratch: str, bad: BadRecords) -> Counting:
        """Read movies and users."""
        movies = self._small("movies.dat", [pl.col("movie").cast(pl.Int64), pl.col("genres")], bad)
        # In less memory: there may be many users.
        profile = [pl.col("zip").str.head(ZIP_DIGITS), *PROFILE[:-1]]
        profile = [column.cast(pl.Categorical) for column in map(_column, profile)]
        users = self._small("users.dat", [pl.col("user").cast(pl.Int64), *profile], bad)
        counting = _Counting(Movies.of(movies), Users.of(users), self._lengths, scratch)
        counting.records = movies.height + users.height
        return counting

    def _small(self, name: str, keep: list[pl.Expr], bad: BadRecords) -> pl.DataFrame:
        file = LineFile(self._paths[name], PATTERNS[name], encoding=ENCODING)
        batches = []
        for batch in file.batches(file.columns()):
            wrong = batch.filter(pl.col(MALFORMED).is_not_null())
            for place, text in wrong.select(PLACE, MALFORMED).iter_rows():
                bad.add(file.path, file.unit, place, text)
            batches.append(batch.filter(pl.col(MALFORMED).is_null()).select(keep))
        found = pl.concat(batches) if batches else pl.DataFrame()
        if not found.height:
            raise DataError(f"{file.path} has no good line. {SOURCE}")
        return found


def _column(column: str | pl.Expr) -> pl.Expr:
    return pl.col(column) if isinstance(column, str) else column


class _Timelines:
    """Some users' ratings, each movie once.

    Args:
        events: Sorted.
        movies: Their genres.
        users: Their profiles.
        lengths: Of lists.
    """

    def __init__(self, events: pa.Table, movies: Movies, users: Users, lengths: _Lengths) -> None:
        repeated = _repeated(events)
        events = events.filter(pa.array(~repeated))
        self.user_N, self.movie_N = events["user"].to_numpy(), events["movie"].to_numpy()
        self.stars_N = events["stars"].to_numpy().astype(np.int32)
        self.times = Timelines(self.user_N)
        self.split_N = self.times.split(TRAIN_PERCENT, VALID_PERCENT)
        self.liked_N = self.stars_N >= CLICK_STARS
        self.liked_before_N = self.times.chosen_before(self.liked_N)
        # How many movies the user liked before.
        self.likes_N = self.liked_before_N - self.liked_before_N[self.times.begin]
        self.movie_line_N = movies.keys.line_of(self.movie_N)
        self.user_line_N = users.keys.line_of(self.user_N)
        self.known_N = self.movie_line_N < movies.keys.lines
        self.genre_set_N = movies.genre_set[self.movie_line_N]
        self.notes = Counter(
            {
                "repeated_ratings_dropped": int(repeated.sum()),
                "ratings_of_movies_not_in_movies.dat": int((~self.known_N).sum()),
                "ratings_of_users_not_in_users.dat": int(
                    (self.user_line_N == users.keys.lines).sum()
                ),
            }
        )
        self._movies, self._lengths = movies, lengths

    def tally(self) -> Tally:
        """Count rows and their entries."""
        begin = self._movies.genres_begin
        genres_N = begin[self.movie_line_N + 1] - begin[self.movie_line_N]
        history_N = np.minimum(self.times.position, self._lengths.history)
        liked_N = np.minimum(self.likes_N, self._lengths.liked)
        return Tally(
            rows=len(self.user_N),
            trained=int((self.split_N == 0).sum()),
            entries=int((3 * history_N + liked_N + genres_N).sum()),
            notes=self.notes,
        )


def _repeated(events: pa.Table) -> np.ndarray:
    """Mark a user's later ratings of the same movie: the history would hold the answer."""
    user, movie = events["user"].to_numpy(), events["movie"].to_numpy()
    order = np.lexsort((movie, user))  # keeps the order of time
    again = np.zeros(len(order), dtype=bool)
    same_user = user[order[1:]] == user[order[:-1]]
    again[order[1:]] = same_user & (movie[order[1:]] == movie[order[:-1]])
    return again


class _Counting(Counting):
    """Counts users, movies and sets of genres.

    A user is known by being there; a movie or a set of genres only by a training row.
    """

    def __init__(self, movies: Movies, users: Users, lengths: _Lengths, scratch: str) -> None:
        self._movies, self._users, self._lengths = movies, users, lengths
        names = ("user", "movie", "genre_set")
        self._counts = {name: ValueCounts(scratch, name) for name in names}

    def count(self, events: pa.Table) -> Tally:
        """Count some users' ratings."""
        found = _Timelines(events, self._movies, self._users, self._lengths)
        train_N = found.split_N == 0
        self._counts["user"].add(pl.Series(found.user_N))
        self._counts["movie"].add(pl.Series(found.movie_N[train_N]))
        self._counts["genre_set"].add(pl.Series(found.genre_set_N[train_N & found.known_N]))
        return found.tally()

    def encoding(self) -> Encoding:
        """Return what encodes."""
        ranked = {name: counts.ranked() for name, counts in self._counts.items()}
        return _Encoding(self._movies, self._users, self._lengths, ranked)


class _Encoding(Encoding):
    """Ids of everything.

    Args:
        movies: Their genres.
        users: Their profiles.
        lengths: Of lists.
        ranked: Known values, the one with id 1 first.
    """

    notes: Mapping[str, int] = {}

    def __init__(
        self, movies: Movies, users: Users, lengths: _Lengths, ranked: Mapping[str, pl.Series]
    ) -> None:
        self._movies, self._users, self._lengths = movies, users, lengths
        self._encoders = {name: encoder_of(values, 0) for name, values in ranked.items()}
        rows = {name: len(values) + 1 for name, values in ranked.items()}
        self._schema = _schema(
            {
                "movie": rows["movie"],
                "genre_set": rows["genre_set"],
                "rating": MAX_STARS + 1,
                "liked_movie": rows["movie"],
                "genre": movies.genre_rows,
                "user": rows["user"],
                **users.rows,
            },
            max_history=lengths.history,
            max_liked=lengths.liked,
        )

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    def encode(self, events: pa.Table, before: Tally) -> EncodedEvents:
        """Encode some users' ratings."""
        found = _Timelines(events, self._movies, self._users, self._lengths)
        times, movies, users = found.times, self._movies, self._users
        user_N, movie_N = self._ids("user", found.user_N), self._ids("movie", found.movie_N)
        genre_set_N = np.where(found.known_N, self._ids("genre_set", found.genre_set_N), 0)
        genre_set_N = genre_set_N.astype(np.int32)
        liked_movie = movie_N[found.liked_N]

        def rows(rows_M: np.ndarray) -> pa.Table:
            history = times.earlier(rows_M, self._lengths.history)
            liked = times.earlier_chosen(found.liked_before_N, rows_M, self._lengths.liked)
            line_M = found.movie_line_N[rows_M]
            begin_M = movies.genres_begin[line_M]
            genres = ranges(begin_M, movies.genres_begin[line_M + 1] - begin_M)
            position_M = times.position[rows_M]
            columns = {
                "movie": movie_N[rows_M],
                "genre_set": genre_set_N[rows_M],
                "history_movie": history.lists(movie_N),
                "history_genre_set": history.lists(genre_set_N),
                "history_rating": history.lists(found.stars_N),
                "user": user_N[rows_M],
                **{name: users.profiles[name][found.user_line_N[rows_M]] for name in PROFILE},
                "genres": genres.lists(movies.genres),
                "liked_movies": liked.lists(liked_movie),
                "history_length": np.log1p(position_M).astype(np.float32),
                "like_rate": ((found.likes_N[rows_M] + 1) / (position_M + 2)).astype(np.float32),
                "label": found.liked_N[rows_M].astype(np.int8),
            }
            return pa.table(columns)

        return EncodedEvents(split_R=found.split_N, rows=rows)

    def _ids(self, table: str, values_N: np.ndarray) -> np.ndarray:
        return self._encoders[table].encode(pl.Series(values_N)).to_numpy().astype(np.int32)


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
