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
        prefetch: Batches made ahead in the background; 0 reads in the training thread.
        max_bad_rows: Bad records of a rank that are skipped before it is fatal.
    """

    path: str | None = None
    world: Literal["composed", "tree", "smooth"] = "composed"
    train_rows: int = 1_536_000
    eval_rows: int = 131_072
    data_schema: Schema | None = None
    max_history: int | None = None
    prefetch: int = 4
    max_bad_rows: int = 100
