"""The smallest host: two maps and what lies between."""

from torch import nn

from torchrec_hilomoe import HiLoMoEConfig

__all__ = ["CONFIG", "tower"]

CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4)


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
