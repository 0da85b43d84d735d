"""The configuration tree: what it refuses by itself."""

import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from torchrec_hilomoe.config import CheckpointConfig, RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TrainConfig, {"batch_size": 0}, "train.batch_size must be at least 1, got 0"),
        (TrainConfig, {"log_every": 0}, "train.log_every must be at least 1, got 0"),
        (TrainConfig, {"epochs": -1}, "train.epochs must be at least 1, got -1"),
        (TrainConfig, {"max_steps": 0}, "train.max_steps must be at least 1 or null, got 0"),
        (TrainConfig, {"evaluate_every": 0}, "train.evaluate_every must be at least 1 or null"),
        (TrainConfig, {"learning_rate": 0.0}, "train.learning_rate must be above 0, got 0.0"),
        (TrainConfig, {"table_learning_rate": -1.0}, "train.table_learning_rate must be above 0"),
        (TrainConfig, {"learning_rate": float("nan")}, "train.learning_rate must be above 0, got"),
        (CheckpointConfig, {"every_steps": 0}, "checkpoint.every_steps must be at least 1 or null"),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused(config, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


def test_a_configuration_does_not_change():
    config: Any = RunConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 3
    assert RunConfig() == config
