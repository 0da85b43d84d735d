"""What each rank holds: tables, their optimizer's state and the dense part counted to the byte.

A table's shard and its optimizer's state are counted from the plan, as FBGEMM allocates them, and
the dense part with its gradients and optimizers as training builds it. What a batch of ids and
vectors needs on the way is TorchRec's estimate, and so is a cache of rows in host memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Shard, ShardingOption, Storage

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.inputs import schedule_of
from torchrec_hilomoe.training.optimizers.dense import ExpertLayers, family_of

__all__ = ["DenseMemory", "RankMemory", "dense_memory", "table_memory"]

FLOAT = 4
MOMENTS = {"adam": 2, "adagrad": 1, "sgd": 0}  # numbers for each of a parameter, momentum aside
STEPS = ("adam", "adagrad")  # families that count the steps of each tensor, in a float


@dataclass(frozen=True, kw_only=True)
class DenseMemory:
    """Bytes of what every rank has a copy of.

    Attributes:
        parameters: Bytes of parameters and buffers.
        gradients: Bytes of gradients of the parameters that learn.
        state: Bytes of the optimizers' state of backbone and experts.
    """

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.state


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank's part of the tables.

    Attributes:
        tables: Bytes of shards in the device's memory; exact.
        state: Bytes of their fused optimizer's state; exact.
        caches: Bytes of caches for rows in host memory; TorchRec's estimate.
        lookups: Bytes of a batch's ids and vectors on their way; TorchRec's estimate.
        host: Bytes of shards in host memory with their optimizer's state, on GPUs; exact.
    """

    tables: int = 0
    state: int = 0
    caches: int = 0
    lookups: int = 0
    host: int = 0

    def __add__(self, other: "RankMemory") -> "RankMemory":
        names = [field.name for field in fields(self)]
        return RankMemory(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def device(self) -> int:
        """All that is in the device's memory."""
        return self.tables + self.state + self.caches + self.lookups


def table_memory(
    chosen: Sequence[ShardingOption],
    doubled: Sequence[ShardingOption],
    sparse: SparseArch,
    *,
    device: str,
    optimizer: str,
) -> list[dict[int, RankMemory]]:
    """What each table needs of each rank that has a shard of it.

    Args:
        chosen: How each table is cut.
        doubled: The same with the estimates for twice the batch: the difference is a batch's.
        sparse: Knows which tables are frozen, and have no optimizer.
        device: ``cpu`` or ``cuda``.
        optimizer: Of the tables.
    """
    frozen = {name.split(".")[-2] for name, _ in sparse.given.named_parameters()}
    found = []
    for option, twice in zip(chosen, doubled, strict=True):
        on_device = option.compute_kernel == EmbeddingComputeKernel.FUSED.value
        ranks: dict[int, RankMemory] = {}
        for shard, more in zip(option.shards, twice.shards, strict=True):
            assert shard.rank is not None
            held = _in_memory(shard, device)
            lookups = _in_memory(more, device) - held
            weights = FLOAT * shard.size[0] * shard.size[1]
            state = 0 if option.name in frozen else _state(shard, optimizer)
            part = RankMemory(
                tables=weights if on_device else 0,
                state=state if on_device else 0,
                caches=0 if on_device else held - lookups,
                lookups=lookups,
                host=0 if on_device else weights + state,
            )
            ranks[shard.rank] = ranks.get(shard.rank, RankMemory()) + part
        found.append(ranks)
    return found


def dense_memory(task: TrainTask, config: RunConfig) -> DenseMemory:
    """Count what is replicated, before it is: as training builds it."""
    tables = set(task.model.sparse.tables)
    dense = {name: p for name, p in task.named_parameters() if p not in tables}
    learning = [p for p in dense.values() if p.requires_grad]
    held = [*dense.values(), *task.buffers()]
    experts = expert_parameters(task)
    tensors = len(dense) - len(experts) + len(ExpertLayers(experts).views)
    stages = schedule_of(config).stages
    families = {family_of(stage.optimizer or config.train.optimizer) for stage in stages}
    families.add(family_of(config.train.optimizer))
    numbers = sum(p.numel() for p in learning)
    moments = sum(MOMENTS[family] for family in families)
    moments += "sgd" in families and config.train.momentum > 0
    steps = sum(family in STEPS for family in families)
    return DenseMemory(
        parameters=sum(tensor.numel() * tensor.element_size() for tensor in held),
        gradients=FLOAT * numbers,
        state=FLOAT * (numbers * moments + tensors * steps),
    )


def _state(shard: Shard, optimizer: str) -> int:
    """Bytes of the state of a fused optimizer."""
    rows, width = shard.size
    numbers: Mapping[str, int] = {
        "rowwise_adagrad": rows,
        "adagrad": rows * width,
        "adam": 2 * rows * width,
        "sgd": 0,
    }
    return FLOAT * numbers[optimizer]


def _in_memory(shard: Shard, device: str) -> int:
    storage: Storage | None = shard.storage
    assert storage is not None
    return storage.hbm if device == "cuda" else storage.ddr
