"""The machines of a plan, as a user describes them."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.training.sharding.capabilities import Machine

__all__ = ["Cluster"]

# What matrix products reach at the most, in FLOP/s, unless the user says it: an A100 by its data
# sheet, and a process on a CPU with a few cores.
PEAKS = {
    ("cuda", "fp32"): 19.5e12,
    ("cuda", "bf16"): 312e12,
    ("cuda", "fp16"): 312e12,
    ("cpu", "fp32"): 1e11,
    ("cpu", "bf16"): 1e11,
    ("cpu", "fp16"): 1e11,
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines to plan for.

    Attributes:
        world_size: Number of ranks, one per device.
        hosts: Number of machines, each with the same number of ranks.
        device: Kind of device that a rank computes on.
        device_flops: Peak FLOP/s of a device in the run's precision; None takes an A100's, or a
            guess for a CPU.
        utilization: Share of the peak that the dense part reaches.
        headroom: Share of a device's memory that is kept free for CUDA's context, buffers of
            collectives and fragmentation.

    Raises:
        ValueError: If a number is out of range, or ranks cannot be shared by hosts.
    """

    world_size: int = 1
    hosts: int = 1
    device: Literal["cpu", "cuda"] = "cuda"
    device_flops: float | None = None
    utilization: float = 0.4
    headroom: float = 0.1

    def __post_init__(self) -> None:
        for name in ("world_size", "hosts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.world_size % self.hosts:
            raise ValueError(
                f"--world_size {self.world_size} cannot be shared by --hosts {self.hosts}: each "
                "has as many ranks as the others. Give a multiple."
            )
        if self.device_flops is not None and not self.device_flops > 0:
            raise ValueError(f"--device_flops must be above 0, got {self.device_flops}.")
        if not 0 < self.utilization <= 1:
            raise ValueError(
                f"--utilization must be above 0 and at most 1, got {self.utilization}."
            )
        if not 0 <= self.headroom < 1:
            raise ValueError(f"--headroom must be at least 0 and below 1, got {self.headroom}.")

    @property
    def machine(self) -> Machine:
        """The same as the planner wants it."""
        return Machine(
            world_size=self.world_size,
            local_world_size=self.world_size // self.hosts,
            device=self.device,
        )

    def peak_flops(self, precision: Literal["fp32", "bf16", "fp16"]) -> float:
        """Most FLOP/s of a device."""
        return self.device_flops or PEAKS[self.device, precision]

    def rows(self, config: RunConfig) -> int:
        """Rows of a rank's micro-batch, as training cuts them.

        Raises:
            ValueError: If a global batch has fewer rows than there are ranks to share it.
        """
        train = config.train
        rows = train.batch_size // self.world_size // train.gradient_accumulation_steps
        if not rows:
            raise ValueError(
                f"train.batch_size = {train.batch_size} is the global batch, which --world_size "
                f"{self.world_size} ranks with train.gradient_accumulation_steps = "
                f"{train.gradient_accumulation_steps} cannot share. Give at least "
                f"{self.world_size * train.gradient_accumulation_steps}."
            )
        return rows

    def check(self, config: RunConfig) -> None:
        """Refuse to guess what a machine that is not here has.

        Raises:
            ValueError: If the memory of its GPUs is not given.
        """
        if self.device == "cuda" and config.sharding.hbm is None:
            raise ValueError(
                "sharding.hbm is null, and the GPUs are not here to be asked. Give their memory, "
                "such as --hbm 80GB, or plan for CPUs with --device cpu."
            )
