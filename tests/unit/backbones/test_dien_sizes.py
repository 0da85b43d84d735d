"""DIEN as BARS tuned it has BARS's number of parameters, and this many FLOPs."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.helpers.datasets import AMAZON
from torchrec_hilomoe.backbones.dien import Attention, DIEN
from torchrec_hilomoe.config import DIENConfig, InjectionConfig, ModelConfig
from torchrec_hilomoe.embeddings.features import FeatureWidths, HistoryWidths
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import Cost, count_cost

PUBLISHED = ModelConfig(
    backbone="dien",
    embedding_dim=64,
    head=(1024, 512, 256),
    dropout=0.1,
    batch_norm=True,
    dien=DIENConfig(attention_units=(256, 128)),
    hilomoe=InjectionConfig(enabled=False),
)


def cost_of(config: ModelConfig) -> Cost:
    return count_cost(build_task(config, AMAZON), AMAZON, config.embedding_dim)


def test_amazon_electronics():
    cost = cost_of(PUBLISHED)
    assert cost.parameters["total"] == 5_369_602
    assert cost.parameters["tables"] == (63_003 + 803) * 64


@pytest.mark.parametrize("attention", ["mlp", "bilinear", "dot"])
def test_experts_on_all_sites_whatever_the_attention(attention: Attention):
    config = replace(
        PUBLISHED,
        dien=DIENConfig(attention=attention),
        hilomoe=InjectionConfig(num_experts=2, sites=("all",)),
    )
    found = sites_of(build_task(config, AMAZON).model.backbone)
    assert any("attention" in name for name in found) == (attention != "dot")
    assert {"head.hidden.0", "interests.0.extraction.input"} <= set(found)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A tuned run.

    Attributes:
        total: Its trainable parameters.
        rows: Of its trained tables.
        fields: Embeddings beside the histories.
        events: Fields of an event of each history.
        maps: Its projections of frozen vectors, 64 to 64 without a bias.
        numbers: Its embedded dense features.
    """

    total: int
    rows: int
    fields: int
    events: tuple[int, ...]
    options: dict[str, Any]
    embedding: int = 64
    maps: int = 0
    numbers: int = 0
    head: tuple[int, ...] = (1024, 512, 256)


TAOBAO_ROWS = (403_958, 246_851, 11_330, 191_771, 132_136, 308_870, 99, 15, 4, 9, 6, 5, 4, 7, 4, 6)
RUNS = {
    "amazon": Published(
        total=5_369_602,
        rows=63_003 + 803,
        fields=2,
        events=(2,),
        options={"attention_units": (256, 128), "batch_norm": True},
    ),
    # Three sequences side by side are one history; the price is an embedded number.
    "taobao": Published(
        total=42_376_194,
        rows=sum(TAOBAO_ROWS),
        fields=17,
        events=(3,),
        options={"attention_units": (512, 256)},
        embedding=32,
        numbers=1,
        head=(512, 256, 128),
    ),
    # What was liked and what was not are two histories, of an id and a frozen vector each.
    "kuaivideo": Published(
        total=43_034_627,
        rows=10_002 + 632_406,
        fields=3,
        events=(2, 2),
        options={"attention_units": (256, 256)},
        maps=3,
    ),
    "microvideo": Published(
        total=2_095_874,
        rows=10_988 + 514,
        fields=3,
        events=(2,),
        options={"attention_units": (256, 128), "batch_norm": True},
        maps=2,
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_backbone_has_what_the_tables_leave(run: Published):
    widths = FeatureWidths(
        candidate=0,
        context=run.fields * run.embedding,
        histories=tuple(
            HistoryWidths(event=fields * run.embedding, max_length=100) for fields in run.events
        ),
        embedding=run.embedding,
    )
    model = DIEN(widths, head=run.head, **run.options)
    tables = (run.rows + run.numbers) * run.embedding + run.maps * 64 * 64
    assert sum(parameter.numel() for parameter in model.parameters()) == run.total - tables


def test_flops():
    cost = cost_of(PUBLISHED)
    width, events = 128, 100
    inputs = 2 * events * width * 3 * width
    states = 2 * (events - 1) * width * 3 * width  # the first one is zero
    attention = 2 * events * (4 * width * 256 + 256 * 128 + 128)
    head = 2 * (2 * width * 1024 + 1024 * 512 + 512 * 256 + 256)
    assert cost.flops["backbone"] == 2 * (inputs + states) + attention
    assert cost.flops["head"] == head


def test_the_auxiliary_loss_costs_nothing_to_those_who_only_predict():
    taught = replace(PUBLISHED, dien=replace(PUBLISHED.dien, auxiliary_weight=1.0))
    plain, cost = cost_of(PUBLISHED), cost_of(taught)
    assert cost.flops == plain.flops
    mlp = 256 * 100 + 100 + 100 * 50 + 50 + 50 + 1
    assert cost.parameters["backbone"] == plain.parameters["backbone"] + mlp
