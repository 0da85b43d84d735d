"""A whole run: its data, model, training, sharding and checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.config.model import ModelConfig
from torchrec_hilomoe.config.sharding import ShardingConfig
from torchrec_hilomoe.config.train import TrainConfig
from torchrec_hilomoe.data.schema import Schema

__all__ = ["CheckpointConfig", "DataConfig", "RunConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from, and how they are read.

    Attributes:
        path: Folder of prepared data, as ``prepare`` writes it; null trains on generated data.
        synthetic: Name of the generated data set: ``composed``, ``tree`` or ``smooth``.
        train_rows: Length of an epoch of generated data, in rows; every epoch's are fresh.
        eval_rows: Length of each generated validation and test split, in rows.
        data_schema: Schema of the data, for a dry run without files; a folder's own must equal it.
        max_history: Longest history that is kept, in events; null keeps the schema's length.
        workers: Number of threads of each rank that read and decode ahead; 0 leaves it to the
            thread that makes batches.
        prefetch: Number of batches made ahead in a thread of their own; 0 makes each when training
            asks.
        pin_memory: Whether batches come in page-locked memory; null does so for a GPU.
        bucket_by_length: Length of a window within which rows are sorted by their longest history,
            to pad less, in batches; 0 sorts nothing.
        num_canonical_shards: Number of shards of an epoch from which every batch takes equally
            many rows, or a divisor of it. A run can resume on any number of ranks that divides the
            shards, so an elastic run names a common multiple of the numbers that it may have; null
            chooses by the ranks that it starts with.
        max_bad_rows: Number of invalid rows that a rank may skip in an epoch before the run fails.
    """

    path: str | None = None
    synthetic: Literal["composed", "tree", "smooth"] = "composed"
    train_rows: int = 1_536_000
    eval_rows: int = 131_072
    data_schema: Schema | None = None
    max_history: int | None = None
    workers: int = 2
    prefetch: int = 4
    pin_memory: bool | None = None
    bucket_by_length: int = 0
    num_canonical_shards: int | None = None
    max_bad_rows: int = 100

    def __post_init__(self) -> None:
        if self.num_canonical_shards is not None and self.num_canonical_shards < 1:
            raise ValueError(
                "data.num_canonical_shards must be at least 1 or null, got "
                f"{self.num_canonical_shards}."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run.

    Attributes:
        every_steps: Number of steps between two checkpoints; null saves at the end only.
        keep: Number of latest checkpoints that are kept; older ones are removed.
        best: Validation metric (``auc``, ``gauc``, ``logloss`` or ``ne``) whose best step is saved
            and kept as well, and is the one that is tested at the end; null tests the last.
        asynchronous: Whether training goes on while a checkpoint is written; this takes memory
            for a copy.
        folder: Folder of the checkpoints, local or remote; null is ``checkpoints`` in ``out_dir``.
    """

    every_steps: int | None = None
    keep: int = 3
    best: Literal["auc", "gauc", "logloss", "ne"] | None = None
    asynchronous: bool = True
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(
                f"checkpoint.every_steps must be at least 1 or null, got {self.every_steps}."
            )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {self.keep}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
        data: Rows: where they come from and how they are read.
        model: Ranker: embeddings, backbone, head and experts.
        train: Training: lengths, optimizers, stages and pipeline.
        sharding: Constraints of the sharding planner, and the machine's numbers.
        checkpoint: Checkpoints: when they are written, and which are kept.
        out_dir: Folder of the run, a local one; null makes ``runs/RECIPE-TIME``.
        seed: Seed of every random number.
        resume: Checkpoint to resume: ``auto`` is the newest in ``out_dir`` if there is one,
            ``never`` starts afresh in an empty folder, a path is that checkpoint.
        init_from: Checkpoint of a model to start from: without stage ``backbone_warmup``, and with
            fresh experts, unless it has the same ones. A run that is resumed has started already.
        allow_missing: Patterns of tensors' names, such as ``optimizer.*``, that a checkpoint may
            lack, or have besides, or in another size; they keep their fresh values.
        stall_seconds: Seconds without a finished step after which the run is ended, with the
            stacks of every rank; null waits for ever.
        dry_run: Whether the run is only built, counted and reported; no data is read.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    out_dir: str | None = None
    seed: int = 0
    resume: str = "auto"
    init_from: str | None = None
    allow_missing: tuple[str, ...] = ()
    stall_seconds: float | None = 600.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.stall_seconds is not None and not self.stall_seconds > 0:
            raise ValueError(f"stall_seconds must be above 0 or null, got {self.stall_seconds}.")
        if self.out_dir is not None and "://" in self.out_dir:
            raise ValueError(
                f"out_dir must be a local folder, got {self.out_dir!r}: files there are appended "
                "to. Checkpoints may be remote: give their place as --checkpoint.folder."
            )
