"""The machine, as TorchRec's planner is told of it."""

import os
from typing import Any

import torch
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from torchrec_hilomoe.config.sharding import parse_bytes, ShardingConfig
from torchrec_hilomoe.training.sharding.wishes import Machine

__all__ = ["topology_of"]

GIGABYTE = 2**30
PER_MILLISECOND = 1e-3


def topology_of(machine: Machine, options: ShardingConfig) -> Topology:
    """Describe the machine, less what is reserved; TorchRec reserves of a GPU's memory only."""
    given: dict[str, Any] = {
        name: value * GIGABYTE * PER_MILLISECOND
        for name, value in (
            ("hbm_mem_bw", options.hbm_bandwidth),
            ("ddr_mem_bw", options.ddr_bandwidth),
            ("intra_host_bw", options.intra_host_bandwidth),
            ("inter_host_bw", options.inter_host_bandwidth),
        )
        if value is not None
    }
    left = 1.0 - options.reserve
    hbm = _hbm(options) if machine.device == "cuda" else 0
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=machine.world_size,
            local_world_size=machine.local_world_size,
            hbm_cap_bytes=int(hbm * left),
            ddr_cap_bytes=int(_ddr(options, machine) * left),
        ),
        hardware_config=HardwareConfig(**given),
        kernel_config=KernelConfig(
            compute_device=machine.device, use_hardware_based_bandwidth=bool(given)
        ),
    )


def _hbm(options: ShardingConfig) -> int:
    if options.hbm is not None:
        return parse_bytes(options.hbm, "sharding.hbm")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _ddr(options: ShardingConfig, machine: Machine) -> int:
    if options.ddr is not None:
        return parse_bytes(options.ddr, "sharding.ddr")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // machine.local_world_size
