"""CollapseWatch: one warning for each collapsed layer, none for sound ones."""

import logging

import pytest
import torch
from torch import nn

from torchrec_hilomoe.backbones.layers.tap import Tap
from torchrec_hilomoe.hilomoe import (
    CollapseWatch,
    HiLoMoEConfig,
    inject_hilomoe,
    share_routing,
    sites_of,
)


def model_with(collapsed: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 4))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4, query_norm=True), sites=["0"])
    if collapsed:
        with torch.no_grad():  # the second layer prefers its third expert, whatever comes
            site = sites_of(model)["0"]
            site.expert_keys[0] = torch.eye(6)[:4] * 30
            site.expert_keys[1] = 0
            site.expert_keys[1, 2] = 100 * torch.eye(6)[:4].sum(dim=0)
    return model


def test_warns_once_of_a_collapsed_layer(caplog):
    model = model_with(collapsed=True)
    watch = CollapseWatch(model, steps=3)
    with caplog.at_level(logging.WARNING, logger="torchrec_hilomoe"):
        for step in range(9):
            model(torch.rand(256, 6))
            assert len(watch.observe()) == (1 if step == 2 else 0)
    (record,) = caplog.records
    message = record.getMessage()
    assert "'0', layer 2, over the last 3 steps: dead experts [0, 1, 3]" in message
    assert "Raise balance_weight" in message


def test_is_silent_about_sound_layers():
    model = model_with(collapsed=False)
    watch = CollapseWatch(model, steps=2)
    for _ in range(4):
        model(torch.randn(512, 6))
        assert watch.observe() == []


def test_sites_that_share_a_router_are_told_of_once():
    model = nn.Sequential(Tap(), nn.Linear(6, 6), nn.Linear(6, 4))
    share_routing(model, HiLoMoEConfig(num_layers=1, num_experts=4), ["[12]"], "0", width=6)
    with torch.no_grad():
        keys = sites_of(model)["1"].get_parameter("router.expert_keys")
        keys.zero_()[0, 2] = 100
    watch = CollapseWatch(model, steps=1)
    model(torch.rand(256, 6))
    (message,) = watch.observe()
    assert "'1', layer 1" in message


def test_says_once_what_it_cannot_watch(caplog):
    model = nn.Sequential(nn.Linear(6, 4))
    inject_hilomoe(model, HiLoMoEConfig(balance_weight=0, z_weight=0), sites=["0"])
    watch, site = CollapseWatch(model, steps=2), sites_of(model)["0"]
    with caplog.at_level(logging.WARNING, logger="torchrec_hilomoe"):
        for layers in (0, 1, 3):
            site.active_layers = layers
            model(torch.rand(8, 6))
            assert watch.observe() == []
            assert len(caplog.records) == min(layers, 1)
    assert "'0' is not watched for collapse" in caplog.text


def test_layers_may_join_later():
    model = model_with(collapsed=True)
    watch, site = CollapseWatch(model, steps=2), sites_of(model)["0"]
    for layers in (0, 1, 2, 2):
        site.active_layers = layers
        model(torch.rand(256, 6))
        messages = watch.observe()
    assert len(messages) == 1


def test_refuses_bad_limits():
    with pytest.raises(ValueError, match=r"steps must be at least 1, got 0\. Use 500"):
        CollapseWatch(nn.Linear(1, 1), steps=0)
    with pytest.raises(ValueError, match=r"min_entropy must lie between 0 and 1, got 2"):
        CollapseWatch(nn.Linear(1, 1), min_entropy=2)
