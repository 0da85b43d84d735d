"""``RunPlan``: what a run needs on some machines, and what follows from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_hilomoe.planning.activations import Activations
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.memory import DenseMemory, RankMemory
from torchrec_hilomoe.planning.step import RankTime, Step
from torchrec_hilomoe.training.sharding.report import PlanReport

__all__ = ["RankPlan", "RunPlan"]


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part.

    Attributes:
        tables: Of which it has a shard: bytes of its part, optimizer state and lookups included.
        memory: Of all those shards.
        time: Of a micro-batch.
    """

    tables: Mapping[str, int]
    memory: RankMemory
    time: RankTime


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run needs on some machines, and how fast it should be.

    Attributes:
        cluster: The machines.
        report: Where tables are.
        ranks: In order.
        dense: What every rank has a copy of.
        activations: What the dense part saves for its backward pass.
        rows: Of a rank's micro-batch.
        micro_batches: Of a step.
        capacity: Bytes of a device, headroom included.
        reserved: Share of it that the planner leaves to all but tables.
        step: How long one takes.
        assumptions: What was not given and what was taken for it, by name.
    """

    cluster: Cluster
    report: PlanReport
    ranks: tuple[RankPlan, ...]
    dense: DenseMemory
    activations: Activations
    rows: int
    micro_batches: int
    capacity: int
    reserved: float
    step: Step
    assumptions: Mapping[str, str]

    @property
    def usable(self) -> int:
        """Bytes of a device without the headroom."""
        return int(self.capacity * (1 - self.cluster.headroom))

    @property
    def fullest(self) -> int:
        """The rank that needs most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].memory.device)

    def needed(self, rank: int) -> int:
        """Bytes of the device's memory that a rank needs in all."""
        saved = self.activations.bytes(self.rows)
        return self.ranks[rank].memory.device + self.dense.total + saved

    @property
    def excess(self) -> int:
        """Bytes by which the fullest rank needs more than is usable; below 0 it fits."""
        return self.needed(self.fullest) - self.usable

    @property
    def largest_rows(self) -> int:
        """The largest micro-batch of a rank that fits with these shards; 0 if none does."""
        left_to_tables = self.capacity * (1 - self.reserved)
        limits = []
        for rank in self.ranks:
            fixed = rank.memory.device - rank.memory.lookups
            moving = rank.memory.lookups / self.rows
            rest = self.usable - fixed - self.dense.total - self.activations.fixed
            limits.append(rest / (moving + self.activations.per_row))
            if moving:
                limits.append((left_to_tables - fixed) / moving)
        return max(0, int(min(limits)))

    @property
    def largest_batch(self) -> int:
        """The same as a global batch."""
        return self.largest_rows * self.cluster.world_size * self.micro_batches

    @property
    def imbalance(self) -> dict[str, float]:
        """The worst rank over the mean, of memory and of time; 1 where all have the same."""
        memory = [rank.memory.device for rank in self.ranks]
        time = [rank.time.total for rank in self.ranks]
        return {
            name: max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
            for name, loads in (("memory", memory), ("time", time))
        }

    def to_json(self) -> str:
        """All of it, derived figures too."""
        step = asdict(self.step) | {
            "bound": self.step.bound,
            "milliseconds_if_all_overlaps": self.step.overlapped,
            "milliseconds_if_nothing_does": self.step.serial,
        }
        raw: dict[str, Any] = asdict(self) | {
            "step": step,
            "usable": self.usable,
            "fits": self.excess <= 0,
            "excess": max(0, self.excess),
            "needed": [self.needed(rank) for rank in range(len(self.ranks))],
            "imbalance": self.imbalance,
            "largest_rows": self.largest_rows,
            "largest_batch": self.largest_batch,
        }
        return json.dumps(raw, indent=2) + "\n"
