"""The ways of cutting a table come in one order, whatever order TorchRec found them in."""

from dataclasses import replace
from itertools import groupby

import torch
from torch import nn
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.distributed.types import ModuleSharder

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import InjectionConfig, ShardingConfig
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.training.sharding.capabilities import Machine
from torchrec_hilomoe.training.sharding.planner import (
    DeterministicEnumerator,
    make_plan,
    topology_of,
)

MACHINE = Machine(world_size=2, local_world_size=2, device="cpu")
WIDE = build_task(replace(MODEL, embedding_dim=128, hilomoe=InjectionConfig(enabled=False)), SCHEMA)


class Backwards(EmbeddingEnumerator):
    """What another hash seed may give: the ways of each table the other way round."""

    def enumerate(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> list[ShardingOption]:
        by_table = groupby(super().enumerate(module, sharders), key=lambda option: option.fqn)
        return [
            option
            for _, sharding_options in by_table
            for option in reversed(list(sharding_options))
        ]


def sharding_options(
    kind: type[EmbeddingEnumerator], topology: Topology
) -> list[tuple[str, str, str]]:
    found = kind(topology, batch_size=32)
    ordered = DeterministicEnumerator(found).enumerate(WIDE, get_default_sharders())
    return [(option.fqn, option.sharding_type, option.compute_kernel) for option in ordered]


def test_the_order_does_not_depend_on_the_one_found():
    topology = topology_of(MACHINE, ShardingConfig())
    own = Backwards(topology, batch_size=32).enumerate(WIDE, get_default_sharders())
    found = sharding_options(EmbeddingEnumerator, topology)
    assert [(option.fqn, option.sharding_type, option.compute_kernel) for option in own] != found
    assert sharding_options(Backwards, topology) == found
    assert len(set(found)) == len(found) > len(SCHEMA.tables)


def test_a_table_is_cut_by_columns_only_where_there_is_something_to_cut():
    """In one piece, it is the same as whole, and which one is taken would be a matter of luck."""
    for width in (64, 128):
        task = build_task(
            replace(MODEL, embedding_dim=width, hilomoe=InjectionConfig(enabled=False)), SCHEMA
        )
        planned = make_plan(task, MACHINE, ShardingConfig(), batch_size=32)
        pieces = {t.table: len(t.ranks) for t in planned.report.tables if t.type == "column_wise"}
        assert all(count > 1 for count in pieces.values()), (width, pieces)
        assert torch.device("meta") in {table.device for table in task.model.sparse.tables}
