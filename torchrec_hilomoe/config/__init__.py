"""A whole run as frozen dataclasses: what recipes fill and the command line overrides.

Modules take plain arguments; only ``models/build.py``, ``training/`` and the apps know this tree.
"""

from torchrec_hilomoe.config.model import (
    BSTConfig,
    DCNConfig,
    DIENConfig,
    DINConfig,
    DLRMConfig,
    InjectionConfig,
    InterFormerConfig,
    ModelConfig,
    TransActConfig,
)
from torchrec_hilomoe.config.run import CheckpointConfig, DataConfig, RunConfig
from torchrec_hilomoe.config.sharding import ShardingConfig, TableSharding
from torchrec_hilomoe.config.train import TrainConfig

__all__ = [
    "BSTConfig",
    "CheckpointConfig",
    "DCNConfig",
    "DIENConfig",
    "DINConfig",
    "DLRMConfig",
    "DataConfig",
    "InjectionConfig",
    "InterFormerConfig",
    "ModelConfig",
    "RunConfig",
    "ShardingConfig",
    "TableSharding",
    "TrainConfig",
    "TransActConfig",
]
