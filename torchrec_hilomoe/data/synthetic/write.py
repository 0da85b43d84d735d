"""Generated rows as a prepared folder, for those who ask for files."""

import pyarrow as pa

from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report
from torchrec_hilomoe.data.synthetic.source import BLOCK_ROWS, SPLITS, SyntheticSource
from torchrec_hilomoe.data.synthetic.worlds import WorldName

__all__ = ["write_synthetic"]


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
