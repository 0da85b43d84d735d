"""Where tables may live, and what the machine is told to be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ShardingConfig", "TableSharding", "parse_bytes"]

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Read an amount of memory.

    Args:
        text: Such as ``80GB``, ``512 MiB`` or a number of bytes; a kilobyte has 1024.
        option: For the message.

    Raises:
        ValueError: If it is none.

    Example:
        >>> parse_bytes("1.5GB", "sharding.hbm")
        1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{option} is {text!r}, which is no amount of memory; write it as 80GB.")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class TableSharding:
    """What the planner may do with one table; what is null is its choice.

    Attributes:
        type: Sharding type: ``table_wise`` (whole, on one rank), ``row_wise`` (over all ranks),
            ``column_wise``, and on several hosts ``table_row_wise``, ``table_column_wise`` and
            ``grid_shard``.
        kernel: Memory that holds the rows: ``fused`` (the device's), ``fused_uvm`` (the host's), or
            ``fused_uvm_caching`` (the host's, with a cache on the device).
        ranks: Ranks that hold the shards, one each, in order; ``table_wise`` and ``column_wise``
            only, and ``type`` must say which.

    Raises:
        ValueError: If ``ranks`` does not go with ``type``.
    """

    type: (
        Literal[
            "table_wise",
            "row_wise",
            "column_wise",
            "table_row_wise",
            "table_column_wise",
            "grid_shard",
        ]
        | None
    ) = None
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ranks is None:
            return
        if self.type not in ("table_wise", "column_wise"):
            raise ValueError(
                f"sharding.tables: ranks = {self.ranks} with type = {self.type!r}: ranks can be "
                "chosen for table_wise (one) and column_wise (one a shard). Set type or drop ranks."
            )
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(
                f"sharding.tables: ranks = {self.ranks} must be different ranks, counted from 0."
            )
        if self.type == "table_wise" and len(self.ranks) > 1:
            raise ValueError(
                f"sharding.tables: ranks = {self.ranks} with type = 'table_wise': a whole table is "
                "on one rank. Name one, or take column_wise."
            )


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where tables may live.

    Attributes:
        tables: Constraints by table; the planner decides about the others alone.
        reserve: Share of a device's memory that is not for tables: dense part, activations,
            batches.
        hbm: Memory of a GPU, such as ``80GB``; null asks the GPU.
        ddr: Host memory of one rank, such as ``128GB``; null takes TorchRec's default.
        hbm_bandwidth: Bandwidth of a GPU's memory, in GB/s; null takes TorchRec's default.
        ddr_bandwidth: Bandwidth of the host's memory, in GB/s; null takes TorchRec's default.
        intra_host_bandwidth: Bandwidth between the ranks of a host, in GB/s; null takes TorchRec's
            default.
        inter_host_bandwidth: Bandwidth between hosts, in GB/s; null takes TorchRec's default.

    Raises:
        ValueError: If an amount or a bandwidth is out of range.
    """

    tables: Mapping[str, TableSharding] = field(default_factory=dict)
    reserve: float = 0.4
    hbm: str | None = None
    ddr: str | None = None
    hbm_bandwidth: float | None = None
    ddr_bandwidth: float | None = None
    intra_host_bandwidth: float | None = None
    inter_host_bandwidth: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.reserve < 1:
            raise ValueError(
                f"sharding.reserve must be at least 0 and below 1, got {self.reserve}."
            )
        for name in ("hbm", "ddr"):
            text = getattr(self, name)
            if text is not None and parse_bytes(text, f"sharding.{name}") < 1:
                raise ValueError(f"sharding.{name} must be above 0, got {text!r}.")
        for name in ("hbm", "ddr", "intra_host", "inter_host"):
            value = getattr(self, f"{name}_bandwidth")
            if value is not None and not value > 0:
                raise ValueError(f"sharding.{name}_bandwidth must be above 0 GB/s, got {value}.")
