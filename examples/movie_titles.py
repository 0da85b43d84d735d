"""Vectors of MovieLens-1M's titles, for ``prepare movielens --vectors``: items that have a text.

    pip install "scikit-learn>=1.4,<2"
    python examples/movie_titles.py ml-1m --out titles.parquet
    python apps/prepare.py movielens --raw ml-1m --vectors titles.parquet --out data/titles

A title is the character n-grams of its words, hashed and weighted by how rare they are; a truncated
singular value decomposition makes few numbers of the many. No rating is looked at. Any other model
of texts or images does as well: what matters is the file, which has a ``key`` and a ``value``, the
vector, for each item.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer


def title_vectors(titles: list[str], width: int) -> np.ndarray:
    """Return a vector of length 1 of each title, float32: ``(titles, width)``."""
    model = make_pipeline(
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=1 << 18),
        TfidfTransformer(),
        TruncatedSVD(width, random_state=0),
        Normalizer(),
    )
    return model.fit_transform(titles).astype(np.float32)


def main() -> None:
    """Read movies.dat, write Parquet."""
    parser = argparse.ArgumentParser(description="Make vectors of MovieLens-1M's titles.")
    parser.add_argument("raw", type=Path, help="folder with movies.dat")
    parser.add_argument("--out", required=True, help="Parquet file of vectors to write")
    parser.add_argument("--width", type=int, default=32, help="numbers of a vector, by fours")
    parser.add_argument("--random", action="store_true", help="draw them, for comparison")
    args = parser.parse_args()
    lines = (args.raw / "movies.dat").read_text("latin-1").splitlines()
    movies, titles, _ = zip(*(line.split("::") for line in lines), strict=True)
    vectors = title_vectors([*titles], args.width)
    if args.random:
        drawn = np.random.default_rng(0).normal(size=vectors.shape)
        vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    values = pa.FixedSizeListArray.from_arrays(vectors.ravel(), args.width)
    keys = pa.array([int(movie) for movie in movies])
    pq.write_table(pa.table({"key": keys, "value": values}), args.out)
    print(f"{args.out}: {len(titles)} vectors of width {args.width}")


if __name__ == "__main__":
    main()
