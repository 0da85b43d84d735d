"""A whole run as frozen dataclasses: what recipes fill and the command line overrides.

Modules take plain arguments; only ``models/build.py`` and the apps know this tree.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.training.stages import Stage

__all__ = [
    "BSTConfig",
    "CheckpointConfig",
    "DataConfig",
    "InjectionConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
]


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


@dataclass(frozen=True, kw_only=True)
class InjectionConfig(HiLoMoEConfig):
    """HiLoMoE's options and where its experts go.

    Attributes:
        sites: Groups that the backbone declares (``head``, ``ffn``, ``attention``), ``all`` of
            them, or name patterns of linear maps.
    """

    sites: tuple[str, ...] = ("head",)


@dataclass(frozen=True, kw_only=True)
class BSTConfig:
    """Options of :class:`torchrec_hilomoe.backbones.bst.BST`.

    Attributes:
        num_layers: Transformer layers.
        num_heads: Attention heads.
        residual: Whether attention and feed-forward add to their inputs.
        layer_norm: Whether they are normalised.
        pooling: ``target`` or ``mean``.
    """

    num_layers: int = 1
    num_heads: int = 4
    residual: bool = True
    layer_norm: bool = False
    pooling: Literal["target", "mean"] = "target"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ranker.

    Attributes:
        backbone: A name in :data:`torchrec_hilomoe.models.build.BUILDERS`.
        embedding_dim: Width of every embedding; a multiple of 4.
        head: Hidden widths of the MLP head.
        dropout: In the backbone and the head.
        batch_norm: Whether the head is normalised.
        bst: Options of BST.
        hilomoe: Experts; null is the plain backbone.
    """

    backbone: str = "bst"
    embedding_dim: int = 16
    head: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    batch_norm: bool = False
    bst: BSTConfig = field(default_factory=BSTConfig)
    hilomoe: InjectionConfig | None = field(default_factory=InjectionConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it learns.

    Attributes:
        max_steps: Optimizer steps of the run; null trains ``epochs`` epochs.
        epochs: Passes over the training split, when ``max_steps`` is null.
        batch_size: Rows of a global batch, over all ranks.
        learning_rate: Adam's, for everything that is not a table.
        table_optimizer: Fused into the tables' backward pass.
        table_learning_rate: Its rate.
        decay: How the rates fall over the run, to zero: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: Linear warm-up of the first stage; expert stages take a tenth.
        backbone_share: Share of the run in stage ``backbone_warmup``.
        frozen_share: Share of the run in all stages ``expert_warmup`` together.
        expert_rate: The experts' factor on ``learning_rate``.
        stages: A schedule of one's own; replaces the four options above.
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; null validates at the end only.
        device: ``auto`` takes a GPU when there is one.
    """

    max_steps: int | None = None
    epochs: int = 1
    batch_size: int = 1024
    learning_rate: float = 1e-3
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    table_learning_rate: float = 0.05
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 100
    backbone_share: float = 0.2
    frozen_share: float = 0.06
    expert_rate: float = 5.0
    stages: tuple[Stage, ...] | None = None
    log_every: int = 50
    evaluate_every: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "table_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be above 0, got {getattr(self, name)}.")
        for name in ("max_steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1 or null, got {value}.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run.

    Attributes:
        every_steps: Steps between two checkpoints; null saves at the end only.
        keep: Checkpoints that stay; older ones are removed.
    """

    every_steps: int | None = None
    keep: int = 3

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
        checkpoint: What is kept.
        out_dir: Folder of the run; null makes ``runs/RECIPE-TIME``.
        seed: Of everything random.
        resume: ``auto`` goes on from the newest checkpoint in ``out_dir`` if there is one,
            ``never`` starts afresh in an empty folder, a path goes on from that checkpoint.
        dry_run: Build, count and report; read no data.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    out_dir: str | None = None
    seed: int = 0
    resume: str = "auto"
    dry_run: bool = False
