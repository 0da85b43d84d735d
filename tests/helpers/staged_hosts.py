"""TorchRec's own models in somebody else's loop, driven through stages."""

import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

# TorchRec's own name for it is deprecated in favour of this one.
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_hilomoe import (
    HiLoMoEConfig,
    inject_hilomoe,
    inject_shared_router,
    Stage,
    StageDriver,
    StageSchedule,
)
from torchrec_hilomoe.hilomoe.inject import expert_parameters

__all__ = [
    "BOUNDARIES",
    "SCHEDULE",
    "STEPS",
    "Looks",
    "assert_only_what_learns_changes",
    "batches",
    "digests",
    "distributed",
    "driver_of",
    "host",
    "owner",
]

Looks = list[tuple[str, dict[str, str]]]

ROWS, VALUES, WIDTH, DENSE = 8, 20, 4, 3
STEPS, BOUNDARIES = 10, (2, 4, 6, 8)
FROZEN: dict[str, Any] = {"train_backbone": False, "train_tables": False}
SCHEDULE = StageSchedule(
    stages=(
        Stage(name="plain", steps=2, active_layers=0, warmup_steps=2),
        Stage(name="layer 1", steps=2, active_layers=1, **FROZEN),
        Stage(name="layer 2 alone", steps=2, learning_layers=(2,), **FROZEN),
        Stage(name="tables alone", steps=2, active_layers=0, train_backbone=False),
        Stage(name="all"),
    )
)
# What learns, by :func:`owner`. Plain AdamW decays what has a gradient, be it zero.
LEARN = {
    "plain": {"tables", "base"},
    "layer 1": {"experts 1", "router"},
    "layer 2 alone": {"experts 2", "router"},
    "tables alone": {"tables"},
    "all": {"tables", "base", "experts 1", "experts 2", "router"},
}


def host(kind: type[DLRM] = DLRM, shared: bool = False, device: str = "cpu") -> DLRMTrain:
    """A model of TorchRec's with experts on the maps of its head."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=name, embedding_dim=WIDTH, num_embeddings=VALUES, feature_names=[name]
        )
        for name in ("item", "hour")
    ]
    extra: dict[str, Any] = {"dcn_num_layers": 1, "dcn_low_rank_dim": 3} if kind is DLRM_DCN else {}
    model = kind(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device(device)),
        dense_in_features=DENSE,
        dense_arch_layer_sizes=[8, WIDTH],
        over_arch_layer_sizes=[8, 6, 1],
        **extra,
    )
    config, sites = HiLoMoEConfig(num_layers=2, num_experts=4), ["over_arch*_linear"]
    if shared:
        inject_shared_router(
            model, config, sites, query_module="sparse_arch", query_width=2 * WIDTH
        )
    else:
        inject_hilomoe(model, config, sites)
    return DLRMTrain(model)


def distributed(task: DLRMTrain, sharding: str) -> DistributedModelParallel:
    """The host under DMP, with row-wise Adagrad fused into its tables, but for "not fused"."""
    collection = task.model.sparse_arch.embedding_bag_collection
    if sharding != "not fused":
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.1})
    how = {
        "table_wise": lambda at: table_wise(rank=at % dist.get_world_size()),
        "not fused": lambda at: table_wise(rank=at % dist.get_world_size()),
        "column_wise": lambda at: column_wise(ranks=[0] if dist.get_world_size() == 1 else [0, 1]),
        "data_parallel": lambda at: data_parallel(),
    }[sharding]
    plan = construct_module_sharding_plan(
        collection,
        per_param_sharding={name: how(at) for at, name in enumerate(("item", "hour"))},
        sharder=cast(ModuleSharder[nn.Module], EmbeddingBagCollectionSharder()),
        local_size=dist.get_world_size(),
        world_size=dist.get_world_size(),
        device_type="cpu",
    )
    return DistributedModelParallel(
        task,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"model.sparse_arch.embedding_bag_collection": plan}),
    )


def driver_of(model: nn.Module, **options: Any) -> StageDriver:
    """A driver as a host has it, by AdamW."""
    return StageDriver(
        model,
        SCHEDULE,
        lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
        total_steps=STEPS,
        **options,
    )


def batches(start: int = 0, rank: int = 0) -> Iterator[Batch]:
    """An endless loader: batch ``start`` and those that follow, of a rank."""
    step = start
    while True:
        rng = torch.Generator().manual_seed(1000 * rank + step)
        lengths = torch.randint(3, (2 * ROWS,), generator=rng)
        yield Batch(
            dense_features=torch.randn(ROWS, DENSE, generator=rng),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                ["item", "hour"],
                torch.randint(VALUES, (int(lengths.sum()),), generator=rng),
                lengths,
            ),
            labels=torch.randint(2, (ROWS,), generator=rng),
        )
        step += 1


def owner(name: str) -> str:
    """Which of the parts that a stage may freeze a tensor belongs to."""
    if "embedding_bags." in name:
        return "tables"
    if layer := re.search(r"expert_(?:in|out|keys)\.(\d)", name):
        return f"experts {layer[1]}"
    return "router" if ".query_proj" in name else "base"


def digests(driver: StageDriver) -> dict[str, str]:
    """Of what this rank holds of every tensor that training changes, experts layer by layer."""
    found: dict[str, str] = {}

    def walk(name: str, value: Any, layered: bool) -> None:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner, layered)
        elif layered:
            for layer, part in enumerate(value, start=1):
                walk(f"{name}.{layer}", part, False)
        elif isinstance(value, torch.Tensor | ShardedTensor):
            sharded = isinstance(value, ShardedTensor)
            shards = [it.tensor for it in value.local_shards()] if sharded else [value]
            data = b"".join(part.detach().contiguous().numpy().tobytes() for part in shards)
            if shards:  # of a table of which this rank holds nothing there is nothing to see
                found[name] = hashlib.sha256(data).hexdigest()

    stacked = {n for n in expert_parameters(driver.model) if not n.endswith("query_proj")}
    for name, tensor in driver.model.state_dict().items():
        walk(f"model.{name}", tensor, any(n.endswith(name) for n in stacked))
    walk("state", driver.state_dict()["optimizer"]["state"], False)
    return found


def assert_only_what_learns_changes(looks: Looks) -> None:
    """Of looks at every boundary and at the end: the stage that begins, and the digests."""
    for (stage, before), (_, after) in pairwise(looks):
        assert before.keys() == after.keys()
        for name, digest in before.items():
            changed = digest != after[name]
            assert changed == (owner(name) in LEARN[stage]), f"{name} in stage {stage!r}"
