"""DLRM twice: in the product's runtime, and in the loop of TorchRec's own example.

Both have TorchRec's dense parts, and one collection of tables, so that what differs is what drives
them. The example's loop: a meta-device collection,
row-wise Adagrad in its backward pass, ``DistributedModelParallel`` with the plan that it makes,
Adagrad for the dense part, ``TrainPipelineSparseDist``. Two things of the example are left out: it
sends vectors as 16-bit numbers, which would not give the same losses, and it hands the tables to
the dense optimizer, too, which only allocates state that nothing uses.

Shape legend:
    B  rows
    F  sparse features
    D  embedding width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import torch
from torch import nn, Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ModuleSharder
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.driving import fill_table
from benchmarks.random_batches import Stream
from torchrec_hilomoe.config import DLRMConfig, InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble, Assembly

__all__ = ["DLRMSize", "TheirLoop", "assemble_dlrm", "copy_weights"]

RATE = 0.01  # of everything, in both
KINDS = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class DLRMSize:
    """Widths of a DLRM, and what it trains on.

    Attributes:
        embedding: Width of a vector.
        bottom: Hidden widths of the part that reads dense features; one of ``embedding`` follows.
        top: Hidden widths of the part that ends it.
        sparse: Sparse features, of one id each, with a table each.
        dense: Dense features.
        rows: Of a table.
        batch_size: Rows of a global batch.
    """

    embedding: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    sparse: int
    dense: int
    rows: int
    batch_size: int

    @property
    def names(self) -> tuple[str, ...]:
        """Sparse features, and their tables."""
        return tuple(f"sparse_{index}" for index in range(self.sparse))

    @property
    def stream(self) -> Stream:
        """Random rows of it."""
        candidate, *pooled = self.names
        schema = Schema(
            dataset="random",
            tables=dict.fromkeys(self.names, self.rows),
            candidate=(IdFeature(name=candidate, table=candidate),),
            pooled=tuple(PooledFeature(name=name, table=name) for name in pooled),
            sequences=(),
            dense=tuple(f"dense_{index}" for index in range(self.dense)),
        )
        return Stream(schema=schema, mean_length=1)

    @property
    def bottom_widths(self) -> list[int]:
        """As TorchRec wants them."""
        return [*self.bottom, self.embedding]

    @property
    def top_widths(self) -> list[int]:
        """As TorchRec wants them."""
        return [*self.top, 1]


class TheirLoop:
    """TorchRec's example, on our batches; made by all ranks together.

    Args:
        size: Widths.
        batches: What it trains on, again and again.
        device: Where this rank computes.

    Attributes:
        model: Sharded.
    """

    def __init__(self, size: DLRMSize, batches: Sequence[CTRBatch], device: torch.device) -> None:
        tables = [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=size.embedding,
                num_embeddings=size.rows,
                feature_names=[name],
            )
            for name in size.names
        ]
        dlrm = DLRM(
            EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            dense_in_features=size.dense,
            dense_arch_layer_sizes=size.bottom_widths,
            over_arch_layer_sizes=size.top_widths,
            dense_device=device,
        )
        apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": RATE})
        self.model = DistributedModelParallel(
            DLRMTrain(dlrm),
            device=device,
            sharders=cast("list[ModuleSharder[nn.Module]]", [EmbeddingBagCollectionSharder()]),
        )
        optimizer = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(self.model.named_parameters())),
            lambda parameters: torch.optim.Adagrad(parameters, lr=RATE),
        )
        self._pipeline = TrainPipelineSparseDist(self.model, optimizer, device)
        self._batches = cycle([_theirs(batch) for batch in batches])

    @property
    def dlrm(self) -> DLRM:
        """The model without its wrappers."""
        task = self.model.module
        assert isinstance(task, DLRMTrain)
        return task.model

    def step(self) -> Tensor:
        """Train one step and return its loss; a collective call."""
        loss, _, _ = self._pipeline.progress(self._batches)
        return loss


def assemble_dlrm(
    size: DLRMSize, hilomoe: InjectionConfig, context: DistributedContext
) -> Assembly:
    """Return ours, sharded; a collective call."""
    config = RunConfig(
        model=ModelConfig(
            backbone="dlrm",
            embedding_dim=size.embedding,
            head=size.top,
            dlrm=DLRMConfig(dense_units=size.bottom),
            hilomoe=hilomoe,
        ),
        train=TrainConfig(
            batch_size=size.batch_size,
            optimizer="adagrad",
            learning_rate=RATE,
            table_learning_rate=RATE,
        ),
    )
    torch.manual_seed(config.seed)
    return assemble(config, build_task(config.model, size.stream.schema), context)


@torch.no_grad()
def copy_weights(size: DLRMSize, theirs: TheirLoop, ours: Sequence[Assembly]) -> None:
    """Give all the same tables, drawn anew, and ours the dense parts of theirs."""
    dense, over = theirs.dlrm.dense_arch.state_dict(), theirs.dlrm.over_arch.state_dict()
    # Ours has an activation between two linear maps, and names its last map.
    layers = {f"model.0._mlp.{i}._linear": f"hidden.{2 * i}" for i in range(len(size.top))}
    layers["model.1"] = "output"
    head = {f"{layers[at]}.{kind}": over[f"{at}.{kind}"] for at in layers for kind in KINDS}
    for assembly in ours:
        task = assembly.model.module
        assert isinstance(task, TrainTask)
        for name, part in {"fields.dense": dense, "head": head}.items():
            # Experts are not among theirs, and start at zero.
            mine = task.model.backbone.get_submodule(name)
            assert not mine.load_state_dict(part, strict=False).unexpected_keys
    models = [theirs.model, *(assembly.model for assembly in ours)]
    tables = [_tables(model) for model in models]
    for index, name in enumerate(size.names):
        rng = torch.Generator().manual_seed(index)
        whole = torch.randn(size.rows, size.embedding, generator=rng) / size.embedding**0.5
        for found in tables:
            fill_table(found[name], whole)


def _tables(model: nn.Module) -> dict[str, ShardedTensor]:
    return {
        name.split(".")[-2]: value
        for name, value in model.state_dict().items()
        if isinstance(value, ShardedTensor)
    }


def _theirs(batch: CTRBatch) -> Batch:
    return Batch(dense_features=batch.dense, sparse_features=batch.pooled, labels=batch.labels)
