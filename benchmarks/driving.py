"""The product's own training, one step at a time: what benchmarks of it share.

A model is assembled, wrapped for one stage and stepped by the product's pipeline, exactly as its
trainer does; only what the trainer does between steps (logs, metrics, checkpoints) is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from benchmarks.rounding import off_by
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, PipelineOptions
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

__all__ = [
    "ALL",
    "BY_ROW",
    "LONG",
    "Driven",
    "assembled",
    "check_same_state",
    "copy_state",
    "fill_table",
    "local_parts",
]

ALL = Stage(name="all")
# Options of a run whose experts are there from the start; the default recipe's are yet to be found.
BY_ROW = ("--model.hilomoe.routing=row", "--model.hilomoe.route_by=null")
LONG = 10**6  # steps of the stage, for rates that do not change


class Driven:
    """A model in one stage, under the product's pipeline.

    Args:
        assembly: The model, in no pipeline yet.
        batches: What it trains on.
        stage: Who computes and learns.
        options: How steps are driven.

    Attributes:
        assembly: As given.
        model: Wrapped for the stage.
    """

    def __init__(
        self,
        assembly: Assembly,
        batches: Iterator[CTRBatch],
        *,
        stage: Stage = ALL,
        options: PipelineOptions | None = None,
    ) -> None:
        self.assembly = assembly
        self.model = enter_stage(assembly.model, stage)
        assembly.optimizers.enter(stage)
        assembly.optimizers.set_rates(StageSpan(stage=stage, start=0, stop=LONG), 0, decay=1.0)
        self._batches = batches
        self._pipeline = Pipeline(
            self.model, assembly.optimizers.stage_optimizer, self.model.device, options
        )

    def step(self) -> TaskOutput:
        """Train one step."""
        return self._pipeline.step(self._batches)

    def detach(self) -> None:
        """Give the model its own forward back."""
        self._pipeline.detach()


def assembled(config: RunConfig, schema: Schema, context: DistributedContext) -> Assembly:
    """Return the model of a configuration, the same every time; a collective call."""
    torch.manual_seed(config.seed)
    return assemble(config, build_task(config.model, schema), context)


@torch.no_grad()
def copy_state(source: Assembly, target: Assembly) -> None:
    """Give ``target`` every tensor of the model that ``source`` has by the same name."""
    state = target.model.state_dict()
    for name, tensor in source.model.state_dict().items():
        for mine, its in zip(local_parts(state[name]), local_parts(tensor), strict=True):
            mine.copy_(its)


def check_same_state(one: Assembly, other: Assembly, *, bitwise: bool) -> None:
    """Refuse to time one of two ways to train that did not come to the same model.

    Args:
        one: A model, with its optimizers.
        other: Its twin, which began with the same tensors and has seen the same batches.
        bitwise: Whether to the bit; or to rounding, where a device adds up in any order.
    """
    state, twin = (_flat(training_state(it.model, it.optimizers)) for it in (one, other))
    assert state.keys() == twin.keys()
    for name, tensor in state.items():
        for mine, its in zip(local_parts(tensor), local_parts(twin[name]), strict=True):
            same = torch.equal(mine, its) if bitwise else off_by(mine, its, mine.numel()) <= 1
            assert same, f"two ways to train came to another {name}"


@torch.no_grad()
def fill_table(table: ShardedTensor, whole: Tensor) -> None:
    """Copy a whole table into what this rank holds of it, in whatever pieces."""
    for shard, part in zip(table.local_shards(), local_parts(table), strict=True):
        where = zip(shard.metadata.shard_offsets, part.shape, strict=True)
        part.copy_(whole[tuple(slice(at, at + length) for at, length in where)])


def local_parts(tensor: Tensor | ShardedTensor) -> list[Tensor]:
    """Return what this rank holds of a tensor."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor]


def _flat(state: Any, prefix: str = "") -> dict[str, Tensor | ShardedTensor]:
    """Nested state by dotted names."""
    found: dict[str, Tensor | ShardedTensor] = {}
    for name, value in state.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
