"""MovieLens-1M: a click is a rating of four stars or more.

The history is what the user rated before, movie by movie, with genres and stars. Each user's
ratings are cut in the order of time: the first 80 % train, the next 10 % validate, the last
10 % test. Everything in a row but its label is known before the rating is given.

Vectors of movies, such as of their titles, become a frozen table beside those that are trained.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.counting import by_frequency
from torchrec_hilomoe.data.prepare.encoding import encode_lists, Encoder, encoder_of
from torchrec_hilomoe.data.prepare.folder import Report, vectors_file, vocabulary_file
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
from torchrec_hilomoe.data.prepare.records import BadRecords, find_raw
from torchrec_hilomoe.data.prepare.sources import LineFile, MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.prepare.timelines import earlier, Lines, split_of
from torchrec_hilomoe.data.prepare.vectors import Vectors
from torchrec_hilomoe.data.schema import (
    FrozenTable,
    IdFeature,
    PooledFeature,
    Schema,
    VocabularyRule,
)

__all__ = ["prepare_movielens"]

SOURCE = (
    "Get MovieLens-1M (ml-1m.zip) from https://grouplens.org/datasets/movielens/1m/, unpack it, "
    "and name its folder with --raw."
)
NUMBER = "[0-9]{1,18}"
PATTERNS = {
    "ratings.dat": f"(?P<user>{NUMBER})::(?P<movie>{NUMBER})::(?P<stars>[1-5])::(?P<time>{NUMBER})",
    "movies.dat": f"(?P<movie>{NUMBER})::(?P<title>.*)::(?P<genres>[^:]*)",
    "users.dat": f"(?P<user>{NUMBER})::(?P<gender>[MF])::(?P<age>{NUMBER})"
    f"::(?P<occupation>{NUMBER})::(?P<zip>[0-9A-Za-z -]*)",
}
PROFILE = ("gender", "age", "occupation", "zip")
CLICK_STARS = 4
MAX_STARS = 5
VECTOR, HISTORY = "movie_vector", "history_movie_vector"  # the first names the table, too
ZIP_DIGITS = 3  # an area of the United States; the whole code is close to being the user
GENRES = (
    pl.col("genres")
    .str.split("|")
    .list.eval(pl.element().filter(pl.element() != ""))
    .list.unique()
    .list.sort()
)


def prepare_movielens(
    *,
    raw: str,
    max_history: int = 50,
    max_liked: int = 100,
    vectors: str | None = None,
    **common: Unpack[Common],
) -> Report:
    """Prepare MovieLens-1M: predict whether a user gives a movie four stars or more.

    Args:
        raw: Folder with ratings.dat, movies.dat and users.dat, each plain or gzipped (.gz).
        max_history: How many of the user's last ratings a row keeps; a run can cut further.
        max_liked: How many of the user's last liked movies a row keeps, as a bag.
        vectors: A file of vectors of movies, which become a frozen table: Parquet, .npz or .h5
            with key, the movies' numbers, and value.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda *_: _Ratings(raw, max_history, max_liked, vectors),
        lengths={"max_history": max_history, "max_liked": max_liked},
        named={} if vectors is None else {"vectors": vectors},
        **common,
    )


class _Ratings(EventLog):
    """The raw files.

    A user is known by being there; a movie or a set of genres only by a training row.

    Args:
        raw: Their folder.
        max_history: Events of a history.
        max_liked: Movies of the bag of liked ones.
        vectors: A file of movies' vectors, if there are any.
    """

    order = ("user", "time", "line")
    counted = {"user": pl.Int64, "movie": pl.Int64, "genre_set": pl.String}

    def __init__(self, raw: str, max_history: int, max_liked: int, vectors: str | None) -> None:
        paths = {name: find_raw(raw, name, SOURCE) for name in PATTERNS}
        self._files = {n: LineFile(paths[n], PATTERNS[n], encoding="latin-1") for n in PATTERNS}
        self.file = self._files["ratings.dat"]
        self.columns = self.file.columns()
        self.nothing = f"{self.file.path} has no good line. {SOURCE}"
        self._max_history, self._max_liked = max_history, max_liked
        self._vectors = None if vectors is None else Vectors(vectors)
        if self._vectors is not None and not pa.types.is_integer(self._vectors.keys.type):
            raise DataError(f"{vectors} has texts as keys; key must hold the movies' numbers.")

    def read(self, batch: pl.DataFrame) -> Read:
        """Take lines apart."""
        good = batch.filter(pl.col(MALFORMED).is_null())
        numbers = pl.col("user", "time", "movie").cast(pl.Int64)
        events = good.select(numbers, pl.col("stars").cast(pl.Int8), line=ROW)
        bad = batch.filter(pl.col(MALFORMED).is_not_null()).select(PLACE, MALFORMED)
        return Read(events=events, good=good.height, bad=bad.rows())

    def finish_reading(self, bad: BadRecords) -> None:
        """Read movies and users."""
        movies = self._small("movies.dat", [pl.col("movie").cast(pl.Int64), GENRES], bad)
        genres = movies["genres"]
        genre, self._genre_rows = _encoder(genres.explode(empty_as_null=False))
        self._movie_lines = movies.select(
            "movie", genre_set=genres.list.join("|"), genres=encode_lists(genre, genres)
        )
        self._movies = Lines(self._movie_lines, "movie")
        profile = [*PROFILE[:-1], pl.col("zip").str.head(ZIP_DIGITS)]
        # In less memory: there may be many users.
        profile = [pl.col(it) if isinstance(it, str) else it for it in profile]
        users = self._small(
            "users.dat",
            [pl.col("user").cast(pl.Int64), *(c.cast(pl.Categorical) for c in profile)],
            bad,
        )
        encoders = {name: _encoder(users[name].cast(pl.String)) for name in PROFILE}
        self._profile_rows = {name: rows for name, (_, rows) in encoders.items()}
        ids = [encoders[name][0].encode(users[name]).cast(pl.Int32) for name in PROFILE]
        self._users = Lines(users.with_columns(ids), "user")
        self.records = movies.height + users.height

    def _small(self, name: str, keep: list[pl.Expr], bad: BadRecords) -> pl.DataFrame:
        file = self._files[name]
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

    def _follow(self, events: pl.DataFrame) -> pl.DataFrame:
        """Say of each rating what came before it.

        A user's later ratings of a movie are left out: the history would hold the answer.
        """
        found = events.unique(["user", "movie"], keep="first", maintain_order=True)
        found = found.hstack(self._movies.of(found["movie"])).hstack(self._users.of(found["user"]))
        liked = pl.col("stars") >= CLICK_STARS
        liked_before = liked.cast(pl.Int64).cum_sum() - liked
        return found.with_columns(
            split=split_of("user"),
            position=pl.int_range(pl.len()).over("user"),
            liked=liked,
            liked_before=liked_before,
            # Of the same user.
            likes=liked_before.over("user"),
        )

    def count(self, events: pl.DataFrame) -> Counted:
        """Count some users' ratings."""
        found = self._follow(events)
        trained = found.filter(pl.col("split") == 0)
        history = pl.col("position").clip(upper_bound=self._max_history)
        liked = pl.col("likes").clip(upper_bound=self._max_liked)
        genres = pl.col("genres").list.len().cast(pl.Int64).fill_null(0)
        lists = 3 if self._vectors is None else 4
        tally = Tally(
            rows=found.height,
            trained=trained.height,
            entries=int(found.select((lists * history + liked + genres).sum()).item()),
            notes=Counter(
                {
                    "repeated_ratings_dropped": events.height - found.height,
                    "ratings_of_movies_not_in_movies.dat": found["genre_set"].null_count(),
                    "ratings_of_users_not_in_users.dat": found["gender"].null_count(),
                }
            ),
        )
        values = {name: trained[name] for name in self.counted} | {"user": found["user"]}
        return Counted(tally=tally, values=values)

    def learn(self, ranked: Mapping[str, pl.Series], total: Tally) -> Learned:
        """Give values their ids."""
        self._encoders = {name: encoder_of(values, 0) for name, values in ranked.items()}
        sets = self._encoders["genre_set"].encode(self._movie_lines["genre_set"])
        self._movies = Lines(self._movie_lines.with_columns(sets.cast(pl.Int32)), "movie")
        rows = {name: len(values) + 1 for name, values in ranked.items()}
        tables = {
            "movie": rows["movie"],
            "genre_set": rows["genre_set"],
            "rating": MAX_STARS + 1,
            "liked_movie": rows["movie"],
            "genre": self._genre_rows,
            "user": rows["user"],
            **self._profile_rows,
        }
        schema = _schema(tables, self._max_history, self._max_liked)
        if self._vectors is None:
            return Learned(schema=schema)
        keys = pl.Series(VECTOR, self._vectors.keys)
        self._encoders[VECTOR] = encoder_of(keys, 0)
        return Learned(
            schema=_with_vectors(schema, self._vectors),
            vocabularies={VECTOR: keys},
            vectors={VECTOR: self._vectors},
        )

    def encode(self, events: pl.DataFrame, before: Tally) -> Encoded:
        """Encode some users' ratings."""
        found = self._follow(events).with_columns(pl.col("stars").cast(pl.Int32))
        encoded = {"user": found["user"], "movie": found["movie"]}
        if VECTOR in self._encoders:
            encoded[VECTOR] = found["movie"]
        found = found.with_columns(
            self._encoders[name].encode(raw).cast(pl.Int32).alias(name)
            for name, raw in encoded.items()
        ).with_columns(pl.col("genre_set", *PROFILE).fill_null(0), pl.col("genres").fill_null([]))
        liked_movie = found.filter("liked")["movie"]

        def rows(start: int, stop: int) -> dict[str, Any]:
            part = found[start:stop]
            position_M, likes_M = part["position"], part["likes"]
            here_M = pl.Series(np.arange(start, stop))
            history = earlier(here_M, position_M, self._max_history)
            liked = earlier(part["liked_before"], likes_M, self._max_liked)
            return {
                "movie": part["movie"].to_numpy(),
                "genre_set": part["genre_set"].to_numpy(),
                "history_movie": history.lists(found["movie"]),
                "history_genre_set": history.lists(found["genre_set"]),
                "history_rating": history.lists(found["stars"]),
                **{name: part[name].to_numpy() for name in ("user", *PROFILE)},
                "genres": part["genres"].to_arrow(),
                "liked_movies": liked.lists(liked_movie),
                "history_length": np.log1p(position_M.to_numpy()),
                "like_rate": ((likes_M + 1) / (position_M + 2)).to_numpy(),
                "label": part["liked"].to_numpy(),
                **(
                    {VECTOR: part[VECTOR].to_numpy(), HISTORY: history.lists(found[VECTOR])}
                    if VECTOR in self._encoders
                    else {}
                ),
            }

        return Encoded(split_R=found["split"].to_numpy(), rows=rows)


def _encoder(values: pl.Series) -> tuple[Encoder, int]:
    """Return what gives values their ids, by frequency, and how many rows their table has."""
    ranked = by_frequency(values.alias("value").value_counts(name="count"))
    return encoder_of(ranked, 0), len(ranked) + 1


def _schema(tables: dict[str, int], max_history: int, max_liked: int) -> Schema:
    return Schema(
        dataset="movielens-1m",
        tables=tables,
        candidate=tuple(IdFeature(name=name, table=name) for name in ("movie", "genre_set")),
        sequences=(history_group(("movie", "genre_set", "rating"), max_history),),
        pooled=(
            *(PooledFeature(name=name, table=name) for name in ("user", *PROFILE)),
            PooledFeature(name="genres", table="genre", max_length=max(2, tables["genre"] - 1)),
            PooledFeature(name="liked_movies", table="liked_movie", max_length=max_liked),
        ),
        dense=("history_length", "like_rate"),
        label="label",
        group="user",
    )


def _with_vectors(schema: Schema, vectors: Vectors) -> Schema:
    """Give the candidate and each event of the history a frozen vector."""
    (history,) = schema.sequences
    event = IdFeature(name=HISTORY, table=VECTOR)
    return replace(
        schema,
        tables={**schema.tables, VECTOR: len(vectors.keys) + 1},
        candidate=(*schema.candidate, IdFeature(name=VECTOR, table=VECTOR)),
        sequences=(replace(history, fields=(*history.fields, event)),),
        frozen={VECTOR: FrozenTable(width=vectors.width, file=vectors_file(VECTOR))},
        vocabularies={VECTOR: VocabularyRule(kind="given", file=vocabulary_file(VECTOR))},
    )
