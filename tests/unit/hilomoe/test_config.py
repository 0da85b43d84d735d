"""HiLoMoEConfig: the documented defaults, and what it refuses."""

import dataclasses
from typing import Any

import pytest

from torchrec_hilomoe.hilomoe import HiLoMoEConfig


def test_is_frozen():
    config: Any = HiLoMoEConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, r"num_layers must be at least 1, got 0"),
        ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
        ({"rank": 0}, r"rank must be at least 1, got 0"),
        ({"top_k": 0}, r"top_k must be at least 1, got 0"),
        ({"query_dim": 0}, r"query_dim must be at least 1, got 0.*Use None"),
        ({"top_k": 9}, r"top_k = 9 is larger than num_experts = 8.*Lower top_k"),
        (
            {"tie_keys": True, "rank": 2},
            r"tie_keys = True needs rank = 1, got rank = 2",
        ),
        (
            {"tie_keys": True, "query_dim": 4},
            r"tie_keys = True needs query_dim = None, got query_dim = 4.*Use query_dim=None",
        ),
        ({"query_update": "hard"}, r"query_update must be one of soft, selected, got 'hard'"),
        ({"stop_gradient": "all"}, r"stop_gradient must be one of none, scores, query, got 'all'"),
        ({"backend": "cuda"}, r"backend must be one of auto, eager, compiled, triton, got 'cuda'"),
        ({"balance_weight": -1.0}, r"balance_weight must be zero or a positive number, got -1.0"),
        ({"z_weight": float("nan")}, r"z_weight must be zero or a positive number, got nan"),
        ({"alpha": float("nan")}, r"alpha must be a finite number, got nan\. Use 1\.0"),
        ({"alpha": float("-inf")}, r"alpha must be a finite number, got -inf"),
    ],
    ids=str,
)
def test_refuses_with_field_values_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        HiLoMoEConfig(**options)
