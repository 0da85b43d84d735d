"""TorchRec's sharded collections on one rank: lookups, gradients and fused updates.

Each is compared with the same in float64 by hand. On a GPU they run on NCCL by FBGEMM's device
code; in a rehearsal on gloo by its CPU code.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn, Tensor

from benchmarks.gpu.cases import Case, Setting
from tests.helpers.rounding import assert_as_exact_as
from torchrec_hilomoe.config import TrainConfig
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.sharding.capabilities import CAPABILITIES
from torchrec_hilomoe.training.sharding.shard import sharders_of, TABLE_OPTIMIZERS

__all__ = ["cases"]

ROWS, WIDTH, BAGS, LONGEST = 500, 32, 64, 9
RATE, EPS = 0.1, 1e-8  # FBGEMM's eps
KINDS = ("bags", "sequences")


def cases(setting: Setting) -> list[Case]:
    """The usual kernel with the usual optimizer first."""
    capability = CAPABILITIES[setting.device]
    optimizers = list(capability.table_optimizers)
    wanted = [(kind, "rowwise_adagrad", kernel) for kernel in capability.kernels for kind in KINDS]
    wanted += [(kind, name, "fused") for name in optimizers[1:] for kind in KINDS]
    return [
        Case(
            name=f"{kind} {optimizer} {kernel}",
            run=partial(_run, kind, optimizer, kernel, setting.device),
            seconds=60,
        )
        for kind, optimizer, kernel in wanted
    ]


def _run(kind: str, optimizer: str, kernel: str, device: str) -> Mapping[str, Any]:
    import torchrec
    from torch.distributed.optim import _apply_optimizer_in_backward as fuse
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
    from torchrec.distributed.types import ShardingPlan
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, WIDTH, generator=rng)
    lengths = torch.randint(LONGEST, (BAGS,), generator=rng)
    lengths[0] = 0
    ids = torch.randint(ROWS // 4, (int(lengths.sum()),), generator=rng)  # with repetitions
    pooled = kind == "bags"
    cotangent = torch.randn(BAGS if pooled else len(ids), WIDTH, generator=rng)
    with init_distributed(device) as context:
        common = {"name": "t", "num_embeddings": ROWS, "embedding_dim": WIDTH}
        named = {**common, "feature_names": ["f"]}
        meta = torch.device("meta")
        if pooled:
            tables = [torchrec.EmbeddingBagConfig(**named)]
            collection: nn.Module = torchrec.EmbeddingBagCollection(tables=tables, device=meta)
        else:
            configs = [torchrec.EmbeddingConfig(**named)]
            collection = torchrec.EmbeddingCollection(tables=configs, device=meta)
        fuse(TABLE_OPTIMIZERS[optimizer], collection.parameters(), {"lr": RATE})
        sharders = {s.module_type: s for s in sharders_of(TrainConfig())}
        plan = construct_module_sharding_plan(
            collection,
            {"t": table_wise(rank=0, compute_kernel=kernel)},
            sharder=sharders[type(collection)],
            local_size=1,
            world_size=1,
            device_type=context.device.type,
        )
        holder = nn.ModuleDict({"collection": collection})
        model = DistributedModelParallel(
            holder,
            device=context.device,
            plan=ShardingPlan(plan={"collection": plan}),
            sharders=list(sharders.values()),
            init_data_parallel=False,
        )
        (table,) = (value for name, value in model.state_dict().items() if name.endswith("weight"))
        (shard,) = table.local_shards()
        with torch.no_grad():
            shard.tensor.copy_(weight)
        jagged = KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths).to(context.device)
        sharded: Any = model.module.get_submodule("collection")
        found: Any = sharded(jagged).wait()
        y = found.values() if pooled else found["f"].values()
        y.backward(cotangent.to(context.device))
        if device == "cuda":
            torch.cuda.synchronize()
        (after,) = (value for name, value in model.state_dict().items() if name.endswith("weight"))
        got = {"y": y.detach().cpu(), "table": after.local_shards()[0].tensor.detach().cpu()}
        by = (pooled, optimizer, ids, lengths)
        exact = _by_hand(weight.double(), cotangent.double(), *by)
        near = _by_hand(weight, cotangent, *by)
        assert not torch.equal(got["table"], weight), "the backward pass has updated nothing"
        counts = torch.bincount(ids).max().item()
        assert_as_exact_as(got, near, exact, torch.float32, max(LONGEST, WIDTH, int(counts)))
    return {"say": f"as exact as by hand, on {context.device}", "kernel": kernel}


def _by_hand(
    weight: Tensor, cotangent: Tensor, pooled: bool, optimizer: str, ids: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Lookups, and the table after one step."""
    y = weight[ids]
    of_ids = cotangent
    if pooled:
        bag_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        y = torch.zeros_like(cotangent).index_add(0, bag_of, y)
        of_ids = cotangent[bag_of]
    gradient = torch.zeros_like(weight).index_add(0, ids, of_ids)
    if optimizer == "rowwise_adagrad":
        step = gradient / (gradient.square().mean(dim=1, keepdim=True).sqrt() + EPS)
    elif optimizer in ("adagrad", "adam"):  # Adam's first step, its bias corrected
        step = gradient / (gradient.abs() + EPS)
    else:
        step = gradient
    return {"y": y, "table": weight - RATE * step}
