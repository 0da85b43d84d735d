"""DIN twice: ours and FuxiCTR's, of the same widths, on the same batches, with the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.driving import local_parts
from benchmarks.random_batches import Stream
from tests.helpers.fuxictr import build_fuxictr
from torchrec_hilomoe.config import DINConfig, InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["DINSize", "TheirBatch", "build_theirs", "check", "copy_weights", "their_batch"]

CATEGORIES = 1000
CLIP = 10.0

TheirBatch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]  # as their model takes it


@dataclass(frozen=True, kw_only=True)
class DINSize:
    """A DIN over item and category, and what it trains on.

    Attributes:
        embedding: Width of a vector.
        attention: Hidden widths of its attention.
        head: Hidden widths of its head.
        items: Rows of the item table.
        max_length: Of a history.
        mean_length: Of histories.
        batch_size: Rows of a global batch.
    """

    embedding: int
    attention: tuple[int, ...]
    head: tuple[int, ...]
    items: int
    max_length: int
    mean_length: int
    batch_size: int

    @property
    def stream(self) -> Stream:
        """Random rows of it."""
        names = ("item", "category")
        fields = tuple(IdFeature(name=f"{name}_history", table=name) for name in names)
        schema = Schema(
            dataset="random",
            tables={"item": self.items, "category": CATEGORIES},
            candidate=tuple(IdFeature(name=name, table=name) for name in names),
            sequences=(SequenceGroup(name="history", fields=fields, max_length=self.max_length),),
        )
        return Stream(schema=schema, mean_length=self.mean_length)

    def config(self, hilomoe: InjectionConfig | None = None) -> RunConfig:
        """Ours of these widths."""
        din = DINConfig(attention_units=self.attention, softmax=True)
        return RunConfig(
            model=ModelConfig(
                backbone="din",
                embedding_dim=self.embedding,
                head=self.head,
                din=din,
                hilomoe=hilomoe,
            ),
            train=TrainConfig(batch_size=self.batch_size, clip_norm=CLIP),
        )


def build_theirs(size: DINSize) -> Any:
    """FuxiCTR's, ready to train: dense Adam over all parameters, gradients clipped."""
    model = build_fuxictr(
        "DIN",
        {"item": size.items, "category": CATEGORIES},
        {},
        size.embedding,
        dnn_hidden_units=list(size.head),
        attention_hidden_units=list(size.attention),
        attention_hidden_activations="Dice",
        din_use_softmax=True,
    )
    model._max_gradient_norm, model._batch_index = CLIP, 0
    return model.train()


def their_batch(batch: CTRBatch) -> TheirBatch:
    """The same rows as their loader gives them: padded in front to the longest, the target last."""
    ids = {
        name: torch.cat(
            [_padded(batch.unpooled, f"{name}_history"), batch.unpooled[name].values()[:, None]],
            dim=1,
        )
        for name in ("item", "category")
    }
    mask = (ids["item"][:, :-1] > 0).float()
    return {"label": batch.labels}, {name: drawn.flatten() for name, drawn in ids.items()}, mask


@torch.no_grad()
def copy_weights(model: DistributedModelParallel, theirs: Any) -> None:
    """FuxiCTR's into ours, whose tables are whole on one rank each, or in rows of several."""
    backbone = _task(model).model.backbone
    attention = theirs.attention_layers.attention_layer.mlp
    for name, mlp in (("attentions.0.mlp", attention), ("head", theirs.dnn.mlp)):
        ours = backbone.get_submodule(name)
        mine = [*ours.get_submodule("hidden").children(), ours.get_submodule("output")]
        for to, source in zip(_layers(iter(mine)), _layers(mlp.children()), strict=True):
            # Experts are not among theirs, and start at zero.
            missing = to.load_state_dict(source.state_dict(), strict=False)
            assert not missing.unexpected_keys
    tables = theirs.embedding_layer.embedding_layer.embedding_layers
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = tables[name.split(".")[-2]].weight
            for shard, part in zip(value.local_shards(), local_parts(value), strict=True):
                where = zip(shard.metadata.shard_offsets, part.shape, strict=True)
                part.copy_(whole[tuple(slice(at, at + length) for at, length in where)])


@torch.no_grad()
def check(model: DistributedModelParallel, theirs: Any, batch: CTRBatch) -> None:
    """Refuse to time another model: with the same weights, the logits are the same."""
    model.eval()
    theirs.eval()
    _, output = model(batch)
    want = torch.logit(theirs(their_batch(batch))["y_pred"][:, 0].double())
    torch.testing.assert_close(output.logits.double(), want, rtol=1e-4, atol=1e-4)
    model.train()
    theirs.train()


def _padded(ids: KeyedJaggedTensor, key: str) -> Tensor:
    lengths, values = ids[key].lengths(), ids[key].values()
    longest = int(lengths.max())
    padded = values.new_zeros(len(lengths), longest)
    padded[torch.arange(longest) >= longest - lengths[:, None]] = values
    return padded


def _layers(modules: Iterator[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if list(module.state_dict())]


def _task(model: DistributedModelParallel) -> TrainTask:
    task = model.module
    assert isinstance(task, TrainTask)
    return task
