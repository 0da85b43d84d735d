"""MovieLens: rows against a slow definition, no leaks, and what bad raw files get."""

import gzip
from collections import Counter, defaultdict
from math import log1p
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.prepare.check import check_prepared
from torchrec_hilomoe.data.prepare.movielens import prepare_movielens
from torchrec_hilomoe.data.schema import Schema

REPOSITORY = Path(__file__).parents[4]
REAL = REPOSITORY.parent / "shared" / "data" / "ml-1m"
SPLITS = ("train", "valid", "test")
FILES = ("ratings.dat", "movies.dat", "users.dat")
MOVIES = {
    10: "Animation|Children's",
    20: "Children's|Animation",
    30: "Drama",
    40: "Action|Drama|War",
    50: "Thriller",
    60: "Comedy",
}
USERS = {1: "F::1::10::48067", 2: "M::56::16::70072-1234", 3: "M::25::16::48000"}


def random_ratings(seed):
    """Ratings in no order of time: ``(user, movie, stars, time)``."""
    rng = np.random.default_rng(seed)
    ratings = []
    for user, count in ((1, 6), (2, 5), (3, 1)):
        movies = rng.permutation(list(MOVIES))[:count].tolist()
        times = rng.permutation(10)[:count].tolist()
        stars = rng.integers(1, 6, size=count).tolist()
        ratings += [(user, *rest) for rest in zip(movies, stars, times, strict=True)]
    return [ratings[at] for at in rng.permutation(len(ratings))]


def write_raw(folder, ratings, *, zipped=False, extra=None):
    """Write the three files; ``extra`` has more lines by file name."""
    lines = {
        "ratings.dat": ["::".join(map(str, rating)) for rating in ratings],
        "movies.dat": [f"{movie}::T\xeftre: {movie} (1999)::{g}" for movie, g in MOVIES.items()],
        "users.dat": [f"{user}::{profile}" for user, profile in USERS.items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        text = "".join(f"{line}\n" for line in [*lines[name], *(extra or {}).get(name, [])])
        raw = text.encode("latin-1")
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return str(folder)


def ids_by_count(values):
    """The ids of a vocabulary: the most frequent value is 1, then by value."""
    counts = Counter(values)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    return defaultdict(int, {value: 1 + rank for rank, value in enumerate(ranked)})


def genre_set(movie):
    return tuple(sorted(MOVIES[movie].split("|")))


def expected_rows(ratings, *, max_history, max_liked):
    """The definition of every column, one rating at a time: ``{split: [row]}``."""
    timelines = defaultdict(list)
    for user, movie, stars, time in ratings:
        timelines[user].append((time, movie, stars))
    split_of = {}
    for user, events in timelines.items():
        for place, (_, movie, _) in enumerate(sorted(events)):
            percent = [len(events) * share // 100 for share in (80, 90)]
            split_of[user, movie] = SPLITS[sum(place >= border for border in percent)]
    trained = [movie for user, movie, *_ in ratings if split_of[user, movie] == "train"]
    movie_ids = ids_by_count(trained)
    user_ids = ids_by_count(user for user, *_ in ratings)
    genre_ids = ids_by_count(name for movie in MOVIES for name in genre_set(movie))
    profiles = {user: profile.split("::") for user, profile in USERS.items()}
    rows = {split: [] for split in SPLITS}
    for user, movie, stars, time in ratings:
        before = [event for event in sorted(timelines[user]) if event[0] < time]
        liked = [movie_ids[event[1]] for event in before if event[2] >= 4]
        row = {
            "movie": movie_ids[movie],
            "history_movie": [movie_ids[event[1]] for event in before][-max_history:],
            "history_rating": [event[2] for event in before][-max_history:],
            "genres": [genre_ids[name] for name in genre_set(movie)],
            "liked_movies": liked[-max_liked:],
            "user": user_ids[user],
            "history_length": np.float32(log1p(len(before))),
            "like_rate": np.float32((len(liked) + 1) / (len(before) + 2)),
            "label": int(stars >= 4),
        }
        for place, name in enumerate(("gender", "age", "occupation", "zip")):
            ids = ids_by_count(profile[place][:3] for profile in profiles.values())
            row[name] = ids[profiles[user][place][:3]]
        rows[split_of[user, movie]].append(row)
    return rows


def prepared_rows(folder, split):
    files = sorted((folder / split).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zipped", [False, True])
def test_rows_are_the_definitions(tmp_path, seed, zipped):
    ratings = random_ratings(seed)
    raw = write_raw(tmp_path / "raw", ratings, zipped=zipped)
    out = tmp_path / "out"
    report = prepare_movielens(raw=raw, out=str(out), max_history=3, max_liked=2)
    want = expected_rows(ratings, max_history=3, max_liked=2)

    def place(row):
        return row["user"], row["history_length"]

    for split in SPLITS:
        got = sorted(prepared_rows(out, split), key=place)
        assert report.splits[split].rows == len(got)
        for row, other in zip(got, sorted(want[split], key=place), strict=True):
            assert {name: row[name] for name in other} == other
            assert len(row["history_genre_set"]) == len(row["history_movie"])


def test_genre_sets_are_ids_whatever_their_order(tmp_path):
    """A set's id is the same for candidate and history, and 10 and 20 have the same set."""
    ratings = [(1, movie, 5, time) for time, movie in enumerate([10, 20, 30, 40, 50, 60])]
    raw = write_raw(tmp_path / "raw", ratings)
    prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    rows = [row for split in SPLITS for row in prepared_rows(tmp_path / "out", split)]
    sets = {row["movie"]: row["genre_set"] for row in rows if row["movie"]}
    rows.sort(key=lambda row: len(row["history_movie"]))
    assert rows[0]["genre_set"] == rows[1]["genre_set"] != rows[2]["genre_set"]
    for row in rows:
        assert row["history_genre_set"] == [sets.get(movie, 0) for movie in row["history_movie"]]
    assert rows[-1]["genre_set"] == 0  # no training row has Comedy


def write_movie_vectors(path, movies):
    """Write vectors that begin with their movie's number."""
    values = pa.array(
        [[float(movie), 1.0, 0.0, 0.0] for movie in movies], pa.list_(pa.float32(), 4)
    )
    pq.write_table(pa.table({"key": pa.array(movies), "value": values}), path)
    return str(path)


def test_vectors_become_a_frozen_table_of_candidate_and_history(tmp_path):
    """One movie has no vector, one vector no movie; rows held out get theirs, too."""
    ratings = random_ratings(0)
    raw, out = write_raw(tmp_path / "raw", ratings), tmp_path / "out"
    given = write_movie_vectors(tmp_path / "movies.parquet", [10, 70, 30, 20, 50, 60])
    prepare_movielens(raw=raw, out=str(out), max_history=3, vectors=given)
    assert check_prepared(str(out)).faults == ()
    schema = Schema.load(str(out / "schema.json"))
    assert schema.frozen["movie_vector"].width == 4
    numbers = np.load(out / schema.frozen["movie_vector"].file)[:, 0].astype(int).tolist()
    timelines = defaultdict(list)
    for user, movie, *_ in sorted(ratings, key=lambda rating: rating[3]):
        timelines[user].append(movie if movie != 40 else 0)  # 0 begins the vector of padding
    users = ids_by_count(user for user, *_ in ratings)
    rows = [row for split in SPLITS for row in prepared_rows(out, split)]
    assert len(rows) == len(ratings)
    for row in rows:
        (timeline,) = (timelines[user] for user, id_ in users.items() if id_ == row["user"])
        place = round(np.expm1(row["history_length"]))
        assert numbers[row["movie_vector"]] == timeline[place]
        before = [numbers[id_] for id_ in row["history_movie_vector"]]
        assert before == timeline[:place][-3:]


def test_vectors_of_texts_are_refused(tmp_path):
    raw = write_raw(tmp_path / "raw", random_ratings(0))
    table = pa.table({"key": ["ten"], "value": [[1.0, 2.0, 3.0, 4.0]]})
    pq.write_table(table, tmp_path / "movies.parquet")
    with pytest.raises(DataError, match="texts as keys; key must hold the movies' numbers"):
        prepare_movielens(
            raw=raw, out=str(tmp_path / "out"), vectors=str(tmp_path / "movies.parquet")
        )


def assert_no_leaks(folder, ratings, every=1):
    """Rebuild rows from their users' timelines: what they know ends before their own event.

    Every row of every ``every``-th user is rebuilt.
    """
    user_ids = ids_by_count(user for user, *_ in ratings)
    timelines = defaultdict(list)
    for user, movie, stars, time in ratings:
        if user % every == 0:
            timelines[user_ids[user]].append((time, movie, stars))
    timelines = {user: sorted(events) for user, events in timelines.items()}
    found = Counter()
    for split in SPLITS:
        rows = pq.read_table(folder / split, filters=[("user", "in", list(timelines))])
        places = np.expm1(rows["history_length"].to_numpy()).round().astype(int).tolist()
        for row, place in zip(rows.to_pylist(), places, strict=True):
            events = timelines[row["user"]]
            found[row["user"], place] += 1
            before = [stars for _, _, stars in events[:place]]
            assert row["history_rating"] == before[-50:]
            assert len(row["liked_movies"]) == min(100, sum(stars >= 4 for stars in before))
            assert row["label"] == (events[place][2] >= 4)
            assert row["movie"] not in {*row["history_movie"], *row["liked_movies"]} - {0}
            borders = [len(events) * percent // 100 for percent in (80, 90)]
            assert split == SPLITS[sum(place >= border for border in borders)]
    assert set(found.values()) == {1}
    assert len(found) == sum(map(len, timelines.values()))


def test_no_history_holds_its_own_or_a_later_event(tmp_path):
    rng = np.random.default_rng(0)
    ratings = [
        (user, movie, int(rng.integers(1, 6)), int(time))
        for user in (1, 2, 3)
        for movie, time in zip(range(1, 81), rng.permutation(80), strict=True)
    ]
    raw = write_raw(tmp_path / "raw", ratings)
    prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    assert_no_leaks(tmp_path / "out", ratings)


def test_simultaneous_ratings_keep_the_order_of_the_file(tmp_path):
    ratings = [(1, movie, stars, 7) for stars, movie in enumerate((30, 10, 20, 40, 50), 1)]
    ratings.append((1, 60, 1, 7))
    raw = write_raw(tmp_path / "raw", ratings)
    prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    rows = [row for split in SPLITS for row in prepared_rows(tmp_path / "out", split)]
    assert max((row["history_rating"] for row in rows), key=len) == [1, 2, 3, 4, 5]


def test_only_the_train_split_is_shuffled_and_the_seed_decides(tmp_path):
    ratings = [(1, movie, 5, movie) for movie in range(1, 101)]
    raw = write_raw(tmp_path / "raw", ratings)
    orders = {}
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        prepare_movielens(raw=raw, out=str(out), seed=seed)
        orders[seed] = [
            [row["history_length"] for row in prepared_rows(out, split)] for split in SPLITS
        ]
    assert orders[0][0] != orders[1][0]
    assert sorted(orders[0][0]) == sorted(orders[1][0]) != orders[0][0]
    assert orders[0][1:] == orders[1][1:] == [sorted(order) for order in orders[0][1:]]


def test_preparing_twice_writes_the_same_bytes(tmp_path):
    raw = write_raw(tmp_path / "raw", random_ratings(0))
    contents = []
    for _ in range(2):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"), overwrite=True)
        files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        contents.append({str(path): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6


BAD_LINES = {
    "ratings.dat": ["1::10::6::3", "1::10::4", "a::10::4::1", "1::10::4::1::9", "", "1:10:4:1"],
    "movies.dat": ["x::Title::Drama", "70::No genres"],
    "users.dat": ["4::X::1::1::12345"],
}


def test_malformed_lines_are_counted_reported_and_skipped(tmp_path, caplog):
    ratings = random_ratings(0)
    raw = write_raw(tmp_path / "raw", ratings, extra=BAD_LINES)
    report = prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    assert report.rows_bad == {"ratings.dat": 6, "movies.dat": 2, "users.dat": 1}
    assert report.rows_read == len(ratings) + len(MOVIES) + len(USERS) + 9
    assert report.rows_kept == len(ratings)
    told = [record.message for record in caplog.records]
    first = len(ratings) + 1
    assert f"{raw}/ratings.dat line {first}: malformed: '1::10::6::3'; skipped" in told
    assert f"{raw}/movies.dat line 8: malformed: '70::No genres'; skipped" in told
    assert sum("ratings.dat" in text for text in told) == 3  # the rest are counted only
    prepare_movielens(raw=write_raw(tmp_path / "clean", ratings), out=str(tmp_path / "other"))
    for split in SPLITS:
        assert prepared_rows(tmp_path / "out", split) == prepared_rows(tmp_path / "other", split)


def test_too_many_malformed_lines_are_fatal_and_leave_nothing(tmp_path):
    raw = write_raw(tmp_path / "raw", random_ratings(0), extra=BAD_LINES)
    message = r"more than max_bad_rows 8 malformed.*users\.dat line 4.*--max_bad_rows"
    with pytest.raises(DataError, match=message):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"), max_bad_rows=8)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_repeated_ratings_are_dropped_and_counted(tmp_path):
    ratings = [(1, movie, 5, movie) for movie in (10, 20, 30, 40, 50, 60)]
    raw = write_raw(tmp_path / "raw", [*ratings, (1, 10, 1, 50)])
    report = prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    assert report.notes["repeated_ratings_dropped"] == 1
    assert report.rows_kept == 6
    assert_no_leaks(tmp_path / "out", ratings)


def test_unknown_movies_and_users_get_the_unknown_id(tmp_path):
    ratings = [(9, movie, 5, time) for time, movie in enumerate([77, 10, 20, 30, 40, 50])]
    raw = write_raw(tmp_path / "raw", ratings)
    report = prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    assert report.notes["ratings_of_movies_not_in_movies.dat"] == 1
    assert report.notes["ratings_of_users_not_in_users.dat"] == 6
    (first,) = [
        row
        for split in SPLITS
        for row in prepared_rows(tmp_path / "out", split)
        if not row["history_movie"]
    ]
    assert (first["genre_set"], first["genres"], first["gender"], first["zip"]) == (0, [], 0, 0)
    assert first["movie"] > 0


@pytest.mark.parametrize("name", FILES)
def test_a_missing_raw_file_is_named_with_its_source(tmp_path, name):
    raw = write_raw(tmp_path / "raw", random_ratings(0))
    Path(raw, name).unlink()
    with pytest.raises(DataError, match=rf"neither {name} nor {name}\.gz.*https://grouplens"):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"there is no folder .*/nowhere.*https://grouplens"):
        prepare_movielens(raw=f"{raw}/nowhere", out=str(tmp_path / "out"))


@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_truncated_gzip_file_is_named(tmp_path, kept):
    raw = write_raw(tmp_path / "raw", random_ratings(0), zipped=True)
    path = Path(raw, "ratings.dat.gz")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=r"ratings\.dat\.gz cannot be read .*Download it again"):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"))


@pytest.mark.parametrize("name", FILES)
def test_an_empty_raw_file_is_named(tmp_path, name):
    raw = write_raw(tmp_path / "raw", random_ratings(0))
    Path(raw, name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name} has no good line"):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_history", 1, r"--max_history must be at least 2, got 1"),
        ("max_liked", 0, r"--max_liked must be at least 2, got 0"),
        ("seed", -1, r"--seed must be at least 0, got -1"),
        ("max_bad_rows", -1, r"--max_bad_rows must be at least 0, got -1"),
    ],
)
def test_refuses_options_out_of_range(tmp_path, option, value, message):
    raw = write_raw(tmp_path / "raw", random_ratings(0))
    with pytest.raises(ValueError, match=message):
        prepare_movielens(raw=raw, out=str(tmp_path / "out"), **{option: value})


def test_the_loader_reads_what_is_written(tmp_path):
    raw = write_raw(tmp_path / "raw", random_ratings(1))
    report = prepare_movielens(raw=raw, out=str(tmp_path / "out"), max_history=3, max_liked=2)
    source = ParquetSource(str(tmp_path / "out"), "train")
    batches = list(Loader(source, batch_size=4, epochs=1, max_bad_rows=0))
    assert sum(int(batch.weights.sum()) for batch in batches) == report.splits["train"].rows
    assert source.schema.tables == report.vocabularies


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs MovieLens-1M at {REAL}")
def test_the_real_set(tmp_path):
    out = tmp_path / "out"
    report = prepare_movielens(raw=str(REAL), out=str(out))
    lines = (REAL / "ratings.dat").read_text("latin-1").splitlines()
    ratings = [tuple(map(int, line.split("::"))) for line in lines]
    assert report.rows_kept == len(ratings)
    assert report.rows_bad == {}
    assert set(report.notes.values()) == {0}
    assert_no_leaks(out, ratings, every=50)
    for split in SPLITS:
        loader = Loader(ParquetSource(str(out), split), batch_size=4096, epochs=1, max_bad_rows=0)
        batches = list(loader)
        assert sum(int(batch.weights.sum()) for batch in batches) == report.splits[split].rows
        clicks = sum(int(batch.labels.sum()) for batch in batches)
        assert clicks / report.splits[split].rows == report.splits[split].label_rate
