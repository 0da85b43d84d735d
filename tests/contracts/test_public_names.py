"""The names that others build on: exactly these, with these signatures, each documented."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import torchrec_hilomoe
from torchrec_hilomoe import (
    HiLoMoEConfig,
    HiLoMoELinear,
    inject_hilomoe,
    inject_shared_router,
    routing_report,
)

NAMES = [
    "HiLoMoEConfig",
    "HiLoMoELinear",
    "InteractionProbe",
    "Stage",
    "StageDriver",
    "StageSchedule",
    "inject_hilomoe",
    "inject_shared_router",
    "load_base_checkpoint",
    "reference",
    "routing_report",
]


def test_the_public_names_are_these():
    assert torchrec_hilomoe.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(torchrec_hilomoe, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'HiLoMoe'"):
        torchrec_hilomoe.HiLoMoe  # noqa: B018


def test_configuration_fields_and_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(HiLoMoEConfig)}
    assert defaults == {
        "num_layers": 3,
        "num_experts": 8,
        "rank": 1,
        "top_k": 1,
        "query_dim": None,
        "tie_keys": False,
        "query_norm": False,
        "query_update": "soft",
        "stop_gradient": "none",
        "alpha": 1.0,
        "balance_weight": 1e-2,
        "z_weight": 1e-3,
        "backend": "auto",
    }


def test_configuration_is_frozen_and_keyword_only():
    config: Any = HiLoMoEConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2
    assert all(field.kw_only for field in dataclasses.fields(HiLoMoEConfig))


def arguments(function):
    """Argument names with their defaults; ``...`` where there is none."""
    return {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_signatures():
    assert arguments(HiLoMoELinear) == {
        "in_features": ...,
        "out_features": ...,
        "config": ...,
        "bias": True,
        "device": None,
        "dtype": None,
        "router": None,
    }
    assert list(arguments(inject_hilomoe)) == [
        "model",
        "config",
        "sites",
        "exclude",
        "process_group",
        "seed",
    ]
    assert arguments(inject_hilomoe)["config"] is ...
    shared = ["model", "config", "sites", "query_module", "query_width", "tokens", "views", "name"]
    shared += ["query_entry", "process_group", "seed", "exclude"]
    assert list(arguments(inject_shared_router)) == shared
    assert list(arguments(routing_report))[0] == "model"


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (
            HiLoMoEConfig(num_layers=2, num_experts=4, rank=3),
            {"expert_in": (2, 4, 3, 5), "expert_out": (2, 4, 3, 7), "expert_keys": (2, 4, 5)},
        ),
        (
            HiLoMoEConfig(num_layers=2, num_experts=4, query_dim=6),
            {
                "expert_in": (2, 4, 1, 5),
                "expert_out": (2, 4, 1, 7),
                "expert_keys": (2, 4, 6),
                "query_proj": (6, 5),
            },
        ),
        (
            HiLoMoEConfig(num_layers=2, num_experts=4, tie_keys=True),
            {"expert_in": (2, 4, 1, 5), "expert_out": (2, 4, 1, 7)},
        ),
    ],
    ids=["own keys", "projected query", "tied keys"],
)
def test_checkpoint_keys_and_shapes(config, experts):
    site = HiLoMoELinear(5, 7, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in site.named_parameters()}
    assert shapes == {"weight": (7, 5), "bias": (7,), **experts}


def test_active_layers_counts_from_none_to_all():
    site = HiLoMoELinear(5, 7, HiLoMoEConfig(num_layers=2))
    assert site.active_layers == 2
    site.active_layers = 0
    x = torch.randn(3, 5)
    expected = torch.nn.functional.linear(x, site.weight, site.bias)
    assert torch.equal(site(x), expected)
