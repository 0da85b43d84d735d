"""A whole run."""

from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.config.data import DataConfig
from torchrec_hilomoe.config.model import ModelConfig
from torchrec_hilomoe.config.sharding import ShardingConfig
from torchrec_hilomoe.config.train import TrainConfig

__all__ = ["CheckpointConfig", "RunConfig"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run.

    Attributes:
        every_steps: Steps between two checkpoints; null saves at the end only.
        keep: Checkpoints that stay; older ones are removed.
        best: Validation metric (``auc``, ``gauc``, ``logloss`` or ``ne``) whose best step is saved
            and kept as well, and is the one that is tested at the end; null tests the last.
        asynchronous: Whether training goes on while a checkpoint is written; this takes memory
            for a copy.
        folder: Where they go, local or remote; null is ``checkpoints`` in ``out_dir``.
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
        data: Where rows come from.
        model: The ranker.
        train: How it learns.
        sharding: Where tables may live.
        checkpoint: What is kept.
        out_dir: Folder of the run, a local one; null makes ``runs/RECIPE-TIME``.
        seed: Of everything random.
        resume: ``auto`` goes on from the newest checkpoint in ``out_dir`` if there is one,
            ``never`` starts afresh in an empty folder, a path goes on from that checkpoint.
        init_from: A plain model's checkpoint to start from: without stage ``backbone_warmup``, and
            with fresh experts. A run that is resumed has started already.
        allow_missing: Patterns of tensors' names, such as ``optimizer.*``, that a checkpoint may
            lack, or have besides, or in another size; they keep their fresh values.
        stall_seconds: Seconds in which no step ends after which a run does, with the stacks of
            every rank; null waits for ever.
        dry_run: Build, count and report; read no data.
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
