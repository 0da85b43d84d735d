"""Where rows come from."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.data.schema import Schema

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from.

    Attributes:
        path: Folder that ``apps/prepare.py`` made; null trains on generated data.
        world: The generated world: ``composed``, ``tree`` or ``smooth``.
        train_rows: Generated rows of an epoch; every epoch's are fresh.
        eval_rows: Generated rows of the validation split and of the test split.
        data_schema: The schema, for a dry run without files; a folder's own must equal it.
        max_history: Cut histories to this many events; null keeps the schema's length.
        workers: Threads of each rank that read and decode ahead; 0 leaves it to the thread that
            makes batches.
        prefetch: Batches made ahead in a thread of their own; 0 makes each when training asks.
        pin_memory: Whether batches come in page-locked memory; null does so for a GPU.
        bucket_by_length: Batches in a window within which rows are sorted by the length of their
            longest history, to pad less; 0 sorts nothing.
        lanes: The parts of an epoch that every batch takes its rows from are a multiple of this. A
            run goes on with any number of ranks that divides them, so an elastic one names a
            common multiple of all that it may have; null is one of the ranks it starts with.
        max_bad_rows: Bad records of a rank that are skipped before it is fatal.
    """

    path: str | None = None
    world: Literal["composed", "tree", "smooth"] = "composed"
    train_rows: int = 1_536_000
    eval_rows: int = 131_072
    data_schema: Schema | None = None
    max_history: int | None = None
    workers: int = 2
    prefetch: int = 4
    pin_memory: bool | None = None
    bucket_by_length: int = 0
    lanes: int | None = None
    max_bad_rows: int = 100

    def __post_init__(self) -> None:
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"data.lanes must be at least 1 or null, got {self.lanes}.")
