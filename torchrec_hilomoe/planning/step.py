"""How long a step takes: TorchRec's estimate of lookups and exchanges, and a roof for the rest.

Three things may bound a step. Memory: rows are read and written, and the dense part's saved tensors
and optimizer's state go through memory. Network: vectors and their gradients are exchanged,
and dense gradients are averaged over ranks. Compute: the dense part's matrix products. If each
overlaps the others the longest decides; if none does, their sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import ShardingOption, Topology

from torchrec_hilomoe.planning.cluster import Cluster

__all__ = ["DenseWork", "RankTime", "Step", "estimate_step", "rank_times"]

PASSES = 3  # a backward pass has twice the products of a forward pass
TRAFFIC_OF_SAVED = 2  # each saved tensor is written once and read once
TRAFFIC_OF_STATE = 2  # parameters and optimizer state are read and written; gradients too


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """TorchRec's estimates of one rank's shards, in milliseconds of a micro-batch.

    Attributes:
        lookup: Milliseconds to read rows, and to write them in the backward pass.
        exchange: Milliseconds to exchange vectors and their gradients with other ranks.
    """

    lookup: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.lookup + self.exchange


@dataclass(frozen=True, kw_only=True)
class DenseWork:
    """What the dense part asks of a rank.

    Attributes:
        flops: FLOPs of a micro-batch's forward pass.
        saved_bytes: Bytes saved for the backward pass.
        resident_bytes: Bytes of parameters, gradients and optimizer state.
        gradient_bytes: Bytes of gradients that are averaged over ranks.
    """

    flops: int
    saved_bytes: int
    resident_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step, in milliseconds.

    Attributes:
        lookup: Milliseconds of lookups on the slowest rank; TorchRec's estimate.
        dense_memory: Least milliseconds of the dense part's memory traffic.
        exchange: Milliseconds of exchanging vectors on the slowest rank; TorchRec's estimate.
        all_reduce: Milliseconds of averaging the dense gradients in a ring.
        compute: Milliseconds of the dense part's matrix products.
        samples: Rows of a global batch.
    """

    lookup: float
    dense_memory: float
    exchange: float
    all_reduce: float
    compute: float
    samples: int

    @property
    def parts(self) -> dict[str, float]:
        """By what bounds it."""
        return {
            "memory": self.lookup + self.dense_memory,
            "network": self.exchange + self.all_reduce,
            "compute": self.compute,
        }

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def overlapped(self) -> float:
        """If all overlaps."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """If nothing does."""
        return sum(self.parts.values())


def rank_times(chosen: Sequence[ShardingOption], world_size: int) -> list[RankTime]:
    """Add up TorchRec's estimates by rank.

    As in TorchRec's own total, the exchange of ids is left out: it overlaps the step before. One
    rank exchanges nothing, whatever TorchRec says.
    """
    lookup, exchange = [0.0] * world_size, [0.0] * world_size
    for option in chosen:
        for shard in option.shards:
            assert shard.rank is not None
            assert shard.perf is not None
            perf = shard.perf
            lookup[shard.rank] += perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute
            if world_size > 1:
                exchange[shard.rank] += perf.fwd_comms + perf.bwd_comms
    return [RankTime(lookup=a, exchange=b) for a, b in zip(lookup, exchange, strict=True)]


def estimate_step(
    times: Sequence[RankTime],
    dense: DenseWork,
    cluster: Cluster,
    topology: Topology,
    *,
    peak_flops: float,
    micro_batches: int,
    samples: int,
) -> Step:
    """Put a step together.

    Args:
        times: Of each rank's shards.
        dense: The rest.
        cluster: The machines.
        topology: The same as TorchRec was told of it, with its bandwidths in bytes a millisecond.
        peak_flops: Of a device.
        micro_batches: Of a step; dense gradients are averaged after the last.
        samples: Of a global batch.
    """
    on_gpu = cluster.device == "cuda"
    bandwidth = topology.hbm_mem_bw if on_gpu else topology.ddr_mem_bw
    link = topology.inter_host_bw if cluster.hosts > 1 else topology.intra_host_bw
    ring = 2 * (cluster.world_size - 1) / cluster.world_size
    reached = peak_flops * cluster.utilization / 1e3
    traffic = micro_batches * TRAFFIC_OF_SAVED * dense.saved_bytes
    traffic += TRAFFIC_OF_STATE * dense.resident_bytes
    return Step(
        lookup=micro_batches * max(time.lookup for time in times),
        dense_memory=traffic / bandwidth,
        exchange=micro_batches * max(time.exchange for time in times),
        all_reduce=ring * dense.gradient_bytes / link,
        compute=micro_batches * PASSES * dense.flops / reached,
        samples=samples,
    )
