"""What every pair has, and the proof that its two models are one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast, ClassVar

import torch
from torch import nn, Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.driving import fill_table
from benchmarks.fuxictr_pairs.size import CLIP, ITEM, PLAIN, Size
from benchmarks.rounding import of_sums
from torchrec_hilomoe.config import InjectionConfig, RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["Pair", "mlp_weights", "padded"]

Weights = Iterator[tuple[Tensor, Tensor]]  # ours, and what it shall be


class Pair(ABC):
    """Ours and FuxiCTR's of one backbone.

    Args:
        size: Of both.

    Attributes:
        size: As given.
        theirs: FuxiCTR's model, ready to train: dense Adam over all parameters, gradients clipped.
        PADS_BEHIND: Whether theirs takes a history's events first and its padding last.
    """

    PADS_BEHIND: ClassVar[bool] = False

    def __init__(self, size: Size) -> None:
        self.size = size
        self.theirs = self.build()
        self.theirs._max_gradient_norm, self.theirs._batch_index = CLIP, 0
        self.theirs.train()

    @abstractmethod
    def config(self, hilomoe: InjectionConfig = PLAIN) -> RunConfig:
        """Return ours of the same widths."""

    @abstractmethod
    def build(self) -> Any:
        """Return theirs."""

    @abstractmethod
    def weights(self, backbone: nn.Module) -> Weights:
        """Yield each tensor of ours outside the tables, with theirs in our form."""

    def batch(self, batch: CTRBatch) -> Any:
        """Return the same rows as their loader for long histories gives them.

        They are padded to the longest, on the side that the model asks for, and the target is a
        row's last item.
        """
        ids = {
            name: torch.cat(
                [
                    padded(batch.unpooled, f"{name}_history", behind=self.PADS_BEHIND),
                    batch.unpooled[name].values()[:, None],
                ],
                dim=1,
            )
            for name in ITEM
        }
        mask = (ids["item"][:, :-1] > 0).float()
        return {"label": batch.labels}, {name: drawn.flatten() for name, drawn in ids.items()}, mask

    @torch.no_grad()
    def copy_weights(self, model: DistributedModelParallel | TrainTask) -> None:
        """Copy theirs into ours, whose tables are whole, or in rows of several ranks."""
        task = model if isinstance(model, TrainTask) else cast("TrainTask", model.module)
        for ours, theirs in self.weights(task.model.backbone):
            ours.copy_(theirs)
        for name, value in model.state_dict().items():
            if ".sparse." in name:
                table = self._tables[name.split(".")[-2]].weight
                if isinstance(value, ShardedTensor):
                    fill_table(value, table)
                else:
                    value.copy_(table)

    def check(self, model: DistributedModelParallel, batch: CTRBatch) -> None:
        """Refuse to time another model: with the same weights, the logits are the same."""
        model.eval()
        with torch.no_grad():
            _, output = model(batch)
        self.check_logits(output.logits, batch)
        model.train()

    @torch.no_grad()
    def check_logits(self, logits_B: Tensor, batch: CTRBatch) -> None:
        """Refuse to time a model whose logits are others."""
        self.theirs.eval()
        chance = self.theirs(self.batch(batch))["y_pred"][:, 0].double()
        want = torch.logit(chance)
        # Of sums over the widths of all layers; and a logit of a rounded probability.
        terms = sum(max(p.shape) for p in self.theirs.dnn.parameters())
        amplified = 1 / (chance * (1 - chance)) + want.abs()
        allowed = of_sums(terms) * torch.finfo(torch.float32).eps * amplified
        assert ((logits_B.double() - want).abs() <= allowed).all()
        self.theirs.train()

    @property
    def _tables(self) -> Any:
        layer = self.theirs.embedding_layer
        return getattr(layer, "embedding_layer", layer).embedding_layers


def mlp_weights(ours: nn.Module, theirs: Sequence[nn.Module]) -> Weights:
    """Yield an MLP's tensors by layers; experts are not among theirs, and start at zero."""
    mine = [*ours.get_submodule("hidden").children(), ours.get_submodule("output")]
    for to, source in zip(_layers(mine), _layers(theirs), strict=True):
        state = to.state_dict()
        for name, tensor in source.state_dict().items():
            yield state[name], tensor


def padded(
    ids: KeyedJaggedTensor, key: str, max_seqlen: int | None = None, *, behind: bool = False
) -> Tensor:
    """Return ``(B, longest)`` ids, padded in front or behind with 0, which is no id."""
    lengths, values = ids[key].lengths(), ids[key].values()
    max_seqlen = int(lengths.max()) if max_seqlen is None else max_seqlen
    found = values.new_zeros(len(lengths), max_seqlen)
    place = torch.arange(max_seqlen, device=values.device)
    valid = place < lengths[:, None] if behind else place >= max_seqlen - lengths[:, None]
    found[valid] = values
    return found


def _layers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if list(module.state_dict())]
