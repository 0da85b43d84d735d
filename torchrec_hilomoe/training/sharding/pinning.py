"""Shards on the ranks that a user gave them, the others where TorchRec's partitioner likes."""

import copy
from collections.abc import Mapping

from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import Partitioner, PlannerError, ShardingOption, Topology

__all__ = ["Pinning"]


class Pinning(Partitioner):
    """TorchRec's greedy partitioner, after the tables whose ranks are given.

    Args:
        pinned: Ranks of a table's shards, in order.
    """

    def __init__(self, pinned: Mapping[str, tuple[int, ...]]) -> None:
        self._pinned = pinned
        self._greedy = GreedyPerfPartitioner()

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology
    ) -> list[ShardingOption]:
        """Place every shard.

        Raises:
            PlannerError: If one does not fit.
        """
        if not self._pinned:
            return self._greedy.partition(proposal, storage_constraint)
        left = copy.deepcopy(storage_constraint)
        for option in proposal:
            for shard, rank in zip(option.shards, self._pinned.get(option.name, ()), strict=False):
                device = left.devices[rank]
                assert shard.storage is not None
                assert shard.perf is not None
                if not shard.storage.fits_in(device.storage):
                    raise PlannerError(f"{option.name} does not fit on rank {rank}")
                shard.rank = rank
                device.storage -= shard.storage
                device.perf += shard.perf
        free = [option for option in proposal if option.name not in self._pinned]
        placed = {option.name: option for option in self._greedy.partition(free, left)}
        return [placed.get(option.name, option) for option in proposal]
