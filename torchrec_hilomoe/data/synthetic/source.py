"""Numbered blocks of generated rows: every row of every epoch is fresh.

Shape legend:
    B  rows of a block
"""

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, SequenceGroup
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.data.synthetic.population import (
    DENSE,
    HOURS,
    INTERESTS,
    Ints,
    ITEMS,
    LEAF_ITEMS,
    LEAVES,
    MAX_HISTORY,
    MAX_INTERESTS,
    Population,
    Sessions,
    USERS,
)
from torchrec_hilomoe.data.synthetic.worlds import World, WorldName, WORLDS

__all__ = ["PROBABILITY", "SPLITS", "SyntheticSource", "write_synthetic"]

SPLITS = ("train", "valid", "test")
BLOCK_ROWS = 4096
PROBABILITY = "probability"
DENSE_COLUMNS = tuple(f"dense_{i:02d}" for i in range(DENSE))


class SyntheticSource(BlockSource):
    """A split of a world: visits by the same users to the same items, never the same visit.

    A block depends on ``(seed, world, split, epoch, block)`` alone, so any rank can make any
    block. Beside the schema's columns, :meth:`read` returns ``probability``, the true one.

    Args:
        world: One of ``WORLDS``.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        rows: Rows of an epoch.
        seed: Population, map and rows; sources that differ only in ``split`` share the first two.

    Raises:
        ValueError: If ``world`` or ``split`` is unknown, or ``rows`` or ``seed`` out of range.

    Example:
        >>> source = SyntheticSource(world="tree", split="test", rows=1000, seed=7)
        >>> source.read(epoch=0, block=0).num_rows
        1000
    """

    def __init__(
        self,
        world: WorldName = "composed",
        split: str = "train",
        rows: int = 1_536_000,
        seed: int = 0,
    ) -> None:
        if world not in WORLDS:
            raise ValueError(f"SyntheticSource.world must be one of {WORLDS}, got {world!r}.")
        if split not in SPLITS:
            raise ValueError(f"SyntheticSource.split must be one of {SPLITS}, got {split!r}.")
        if rows < 1:
            raise ValueError(f"SyntheticSource.rows must be at least 1, got {rows}.")
        if seed < 0:
            raise ValueError(f"SyntheticSource.seed must not be negative, got {seed}.")
        self._seed = seed
        self._key = (WORLDS.index(world), SPLITS.index(split))
        self._rows = rows
        self._schema = _schema_of(world)
        self._world = World.draw(world, self._generator(WORLDS.index(world)))

    def _generator(self, *key: int) -> np.random.Generator:
        """Random numbers of their own for every ``key``."""
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Blocks of 4,096 rows; the last may be shorter."""
        full, rest = divmod(self._rows, BLOCK_ROWS)
        return (BLOCK_ROWS,) * full + ((rest,) if rest else ())

    def describe(self, block: int) -> str:
        """Name the world, the split and the block."""
        return f"{self._schema.dataset}, {SPLITS[self._key[1]]} block {block}"

    def read(self, epoch: int, block: int) -> pa.Table:
        """Make a block: the schema's columns and ``probability``."""
        rng = self._generator(*self._key, epoch, block)
        population = self._world.population
        sessions = Sessions.draw(population, self.block_rows[block], rng)
        probability_B = self._world.probabilities(sessions)
        label_B = rng.random(len(probability_B)) < probability_B
        return pa.table(
            {
                **_id_columns(population, sessions),
                **dict(zip(DENSE_COLUMNS, sessions.dense.T, strict=True)),
                "label": label_B.astype(np.int8),
                PROBABILITY: probability_B,
            }
        )


def _schema_of(world: str) -> Schema:
    """The columns, the same in every world; id 0 pads."""
    return Schema(
        dataset=f"synthetic-{world}",
        tables={
            "user": USERS + 1,
            "hour": HOURS + 1,
            "interest": INTERESTS + 1,
            "item": ITEMS + 1,
            "category": LEAVES + 1,
        },
        candidate=(
            IdFeature(name="item", table="item"),
            IdFeature(name="category", table="category"),
        ),
        sequences=(
            SequenceGroup(
                name="history",
                fields=(
                    IdFeature(name="item_history", table="item"),
                    IdFeature(name="category_history", table="category"),
                ),
                max_length=MAX_HISTORY,
            ),
        ),
        pooled=(
            PooledFeature(name="user", table="user"),
            PooledFeature(name="hour", table="hour"),
            PooledFeature(name="interests", table="interest", max_length=MAX_INTERESTS),
        ),
        dense=DENSE_COLUMNS,
    )


def _id_columns(population: Population, sessions: Sessions) -> dict[str, pa.Array]:
    """Columns of ids: what a model sees instead of the population's indices."""
    leaf_of = population.leaf_id[np.arange(ITEMS) // LEAF_ITEMS]
    history_BT, length_B = sessions.history, sessions.history_length
    return {
        "user": pa.array(1 + sessions.user),
        "hour": pa.array(1 + sessions.hour),
        "interests": _lists(
            1 + population.user_interests[sessions.user],
            population.user_interest_count[sessions.user],
        ),
        "item": pa.array(population.item_id[sessions.candidate]),
        "category": pa.array(leaf_of[sessions.candidate]),
        "item_history": _lists(population.item_id[history_BT], length_B),
        "category_history": _lists(leaf_of[history_BT], length_B),
    }


def _lists(padded: Ints, lengths: Ints) -> pa.ListArray:
    """The first ``lengths[i]`` entries of each row of ``padded``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    kept = padded[np.arange(padded.shape[1]) < lengths[:, None]]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept))


def write_synthetic(
    out_dir: str,
    *,
    world: WorldName = "composed",
    train_rows: int = 1_536_000,
    eval_rows: int = 131_072,
    seed: int = 0,
) -> None:
    """Write epoch 0 of every split as a prepared data set, with the true ``probability`` beside.

    Args:
        out_dir: A folder that does not exist or is empty; it appears once it is whole.
        world: One of ``WORLDS``.
        train_rows: Rows of the training split.
        eval_rows: Rows of each of the other two.
        seed: As in :class:`SyntheticSource`.

    Raises:
        ValueError: If ``out_dir`` holds anything.
    """
    rows = {split: train_rows if split == "train" else eval_rows for split in SPLITS}
    sources = {split: SyntheticSource(world, split, rows[split], seed) for split in SPLITS}
    schema = sources["train"].schema
    with prepared_folder(out_dir, overwrite=False) as folder:
        folder.write_schema(schema)
        written = {
            split: folder.write_split(split, rows[split], _Rows(source), label=schema.label)
            for split, source in sources.items()
        }
        folder.write_report(
            Report(
                dataset=schema.dataset,
                options={"world": world, "seed": seed},
                rows_read=sum(rows.values()),
                rows_kept=sum(rows.values()),
                rows_bad={},
                vocabularies=dict(schema.tables),
                splits=written,
                notes={},
            )
        )


class _Rows:
    """Rows of epoch 0, by whole blocks."""

    def __init__(self, source: SyntheticSource) -> None:
        self._source = source

    def __call__(self, start: int, stop: int) -> pa.Table:
        assert start % BLOCK_ROWS == 0, "the folder asks for whole blocks"
        first, last = start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)
        if first == last:
            return self._source.read(0, 0).slice(0, 0)
        return pa.concat_tables([self._source.read(0, block) for block in range(first, last)])
