"""Generated rows as a prepared folder, for those who ask for files."""

import os

import pyarrow.parquet as pq

from torchrec_hilomoe.data.schema import SCHEMA_FILE
from torchrec_hilomoe.data.synthetic.source import SPLITS, SyntheticSource
from torchrec_hilomoe.data.synthetic.worlds import WorldName
from torchrec_hilomoe.runtime.paths import open_binary, open_text, path_manager

__all__ = ["write_synthetic"]


def write_synthetic(
    out_dir: str,
    *,
    world: WorldName = "composed",
    train_rows: int = 1_536_000,
    eval_rows: int = 131_072,
    seed: int = 0,
) -> None:
    """Write epoch 0 of every split in the layout of a prepared data set.

    ``_SUCCESS`` comes last, so a stopped run leaves nothing that looks whole. A block is a row
    group; the true ``probability`` rides along.

    Args:
        out_dir: A folder that does not exist or is empty.
        world: One of ``WORLDS``.
        train_rows: Rows of the training split.
        eval_rows: Rows of each of the other two.
        seed: As in :class:`SyntheticSource`.

    Raises:
        ValueError: If ``out_dir`` holds anything.
    """
    if path_manager.exists(out_dir) and path_manager.ls(out_dir):
        raise ValueError(
            f"write_synthetic: out_dir {out_dir!r} is not empty; name a new folder or remove it."
        )
    for split in SPLITS:
        rows = train_rows if split == "train" else eval_rows
        source = SyntheticSource(world=world, split=split, rows=rows, seed=seed)
        folder = os.path.join(out_dir, split)
        path_manager.mkdirs(folder)
        if split == "train":
            source.schema.save(os.path.join(out_dir, SCHEMA_FILE))
        first = source.read(epoch=0, block=0)
        with (
            open_binary(os.path.join(folder, "part-00000.parquet"), "wb") as sink,
            pq.ParquetWriter(sink, first.schema) as writer,
        ):
            writer.write_table(first)
            for block in range(1, len(source.block_rows)):
                writer.write_table(source.read(epoch=0, block=block))
    with open_text(os.path.join(out_dir, "_SUCCESS"), "w"):
        pass
