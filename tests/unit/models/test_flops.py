"""What a model costs, against counts made by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.datasets import AMAZON, SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import BSTConfig, InjectionConfig, ModelConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures
from torchrec_hilomoe.hilomoe.execution import gathering_pays
from torchrec_hilomoe.models.build import BACKBONES, build_task
from torchrec_hilomoe.models.flops import Cost, cost_table, count_cost

BATCH = 1024  # what is computed once a batch is shared by so many samples

PUBLISHED = ModelConfig(
    embedding_dim=64,
    head=(1024, 512, 256),
    dropout=0.1,
    batch_norm=True,
    bst=BSTConfig(num_heads=8, residual=True, pooling="target"),
    hilomoe=InjectionConfig(enabled=False),
)


def cost_of(config: ModelConfig, schema: Schema = SCHEMA) -> Cost:
    return count_cost(build_task(config, schema), schema, config.embedding_dim)


def test_bst_on_amazon_electronics_has_the_published_number_of_parameters():
    """BARS's tuned BST, counted by the benchmark itself."""
    cost = cost_of(PUBLISHED, AMAZON)
    assert cost.parameters["total"] == 5_301_057
    assert cost.parameters["tables"] == (63_003 + 803) * 64
    assert cost.parameters["experts"] == cost.parameters["routing"] == 0
    assert cost.lookup_bytes == (2 + 2 * 100) * 64 * 4


def test_flops_of_a_plain_bst():
    cost = cost_of(PUBLISHED, AMAZON)
    width, tokens = 3 * 64, 101
    head = 2 * ((128 + width) * 1024 + 1024 * 512 + 512 * 256 + 256)
    # Only the target's token asks and goes on; all tokens are asked, and mixed.
    projections = 2 * width**2 * (2 * tokens + 2)
    mixing = 2 * 2 * width * tokens
    ffn = 2 * 2 * width**2
    assert cost.flops["head"] == head
    assert cost.flops["backbone"] == projections + mixing + ffn
    assert cost.flops["experts"] == cost.flops["routing"] == 0


def test_every_layer_but_a_targets_last_computes_all_tokens():
    width, tokens = 3 * 64, 101
    linears, mixing = 2 * width**2 * 6 * tokens, 2 * 2 * width * tokens**2
    target = cost_of(replace(PUBLISHED, bst=BSTConfig(num_heads=8, num_layers=2)), AMAZON)
    last = 2 * width**2 * (2 * tokens + 4) + 2 * 2 * width * tokens
    assert target.flops["backbone"] == linears + mixing + last
    mean = replace(PUBLISHED, bst=BSTConfig(num_heads=8, pooling="mean"))
    assert cost_of(mean, AMAZON).flops["backbone"] == linears + mixing


@pytest.mark.parametrize(
    ("options", "gathered"),
    [
        ({"num_layers": 3, "num_experts": 4, "rank": 2, "top_k": 2}, False),
        ({"num_layers": 2, "num_experts": 4, "query_dim": 5}, False),
        ({"num_layers": 2, "num_experts": 4, "tie_keys": True}, False),
        ({"num_layers": 1, "num_experts": 3}, False),
        ({"num_layers": 2, "num_experts": 80, "rank": 3, "top_k": 2}, True),
    ],
)
def test_flops_and_parameters_of_experts(options: dict[str, Any], gathered: bool):
    config = InjectionConfig(**options)
    plain = cost_of(replace(MODEL, hilomoe=InjectionConfig(enabled=False)))
    cost = cost_of(replace(MODEL, hilomoe=config))
    L, E, R, k = config.num_layers, config.num_experts, config.rank, config.top_k
    widths = [(42, 8), (8, 6)]  # of the two hidden layers of the head
    experts = routing = expert_parameters = routing_parameters = 0.0
    for D, O in widths:  # noqa: E741
        assert gathering_pays(E, k, D) == (gathered and D == 42) or not gathered
        Q = config.query_dim or D
        uses = k if gathering_pays(E, k, D) else E
        experts += 2 * L * uses * R * (D + O)
        logits = 2 * L * E * Q + (2 * D * Q if config.query_dim else 0)
        if E >= 32 and L * E >= 2 * Q:  # many experts: each layer but the last moves the query
            moves = 2 * (L - 1) * E * Q
        else:  # each layer's scores go into the logits of those below it
            moves = L * (L - 1) * E**2 + 2 * (L * E) ** 2 * Q / BATCH
        routing += logits + moves
        expert_parameters += L * E * R * (D + O)
        keys = 0 if config.tie_keys else L * E * Q
        routing_parameters += keys + (D * Q if config.query_dim else 0)
    assert cost.flops["experts"] == round(experts)
    assert cost.flops["routing"] == round(routing)
    assert cost.parameters["experts"] == expert_parameters
    assert cost.parameters["routing"] == routing_parameters
    for component in ("tables", "backbone", "head"):
        assert cost.flops[component] == plain.flops[component]
        assert cost.parameters[component] == plain.parameters[component]


def test_routing_by_features_costs_what_they_are_wide():
    """Once for each sample, whatever its sites and the length of its histories."""
    config = InjectionConfig(
        num_layers=2,
        num_experts=4,
        sites=("all",),
        routing="sample",
        route_by=(("kind",), ("place", "clicks_kind")),
    )
    cost = cost_of(replace(MODEL, hilomoe=config))
    L, E, Q, widest = 2, 4, 3 * MODEL.embedding_dim, 2 * MODEL.embedding_dim
    gram = 2 * (L * E) ** 2 * Q / BATCH
    assert cost.flops["routing"] == round(2 * L * E * Q + L * (L - 1) * E**2 + gram)
    assert cost.parameters["routing"] == L * E * widest


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("routing", ["row", pytest.param("sample", marks=pytest.mark.slow)])
def test_all_of_a_model_with_experts_is_what_pytorch_counts(backbone: str, routing: Any):
    experts = InjectionConfig(num_layers=2, num_experts=4, sites=("all",), routing=routing)
    config = replace(MODEL, backbone=backbone, hilomoe=experts)
    task = build_task(config, SCHEMA)
    model, widths = task.model.backbone.eval(), task.model.sparse.widths
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(full_features(widths, BATCH))
    cost = count_cost(task, SCHEMA, config.embedding_dim)
    # Each component is rounded by itself to whole FLOPs a sample.
    assert abs(counter.get_total_flops() / BATCH - cost.flops["total"]) <= len(cost.flops) / 2


def test_tied_keys_use_every_down_vector():
    options: dict[str, Any] = {"num_layers": 2, "num_experts": 4}
    tied = cost_of(replace(MODEL, hilomoe=InjectionConfig(tie_keys=True, **options)))
    apart = cost_of(replace(MODEL, hilomoe=InjectionConfig(**options)))
    down = 2 * 4 * (42 + 8)  # of the two hidden layers of the head
    assert tied.activated["experts"] == apart.activated["experts"] + down * 3 // 4


def test_components_add_up_and_lookups_count_every_id():
    cost = cost_of(MODEL)
    for figures in (cost.parameters, cost.flops):
        assert list(figures) == ["tables", "backbone", "head", "experts", "routing", "total"]
        assert figures["total"] == sum(figures.values()) - figures["total"]
    parameters = sum(p.numel() for p in build_task(MODEL, SCHEMA).parameters())
    assert cost.parameters["total"] == parameters
    ids = 2 + (2 * 4 + 3) + (1 + 1 + 2)  # candidate, two histories, user, place, tags
    assert cost.lookup_bytes == ids * MODEL.embedding_dim * 4


def test_a_sample_uses_the_rows_that_it_looks_up_and_the_experts_that_it_chooses():
    config = InjectionConfig(num_layers=2, num_experts=4, top_k=1, rank=2)
    cost = cost_of(replace(MODEL, hilomoe=config))
    assert cost.activated["tables"] * 4 == cost.lookup_bytes
    assert cost.activated["experts"] * 4 == cost.parameters["experts"]
    for component in ("backbone", "head", "routing"):
        assert cost.activated[component] == cost.parameters[component]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_costs_what_pytorch_counts(backbone: str):
    """Forward and backward of real numbers, under PyTorch's own counter."""
    config = replace(MODEL, backbone=backbone, hilomoe=InjectionConfig(enabled=False))
    task = build_task(config, SCHEMA)
    model, widths = task.model.backbone.eval(), task.model.sparse.widths
    rows = 8
    features = full_features(widths, rows)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(features).sum().backward()
    cost = count_cost(task, SCHEMA, config.embedding_dim)
    assert counter.get_total_flops() / rows == cost.training_flops["total"]


def full_features(widths: FeatureWidths, rows: int) -> SequenceFeatures:
    """Rows with as many events as there can be, all of whose vectors learn."""

    def vectors(count: int, width: int) -> torch.Tensor:
        return torch.randn(count, width, requires_grad=True)

    max_seqlen = max(history.max_length for history in widths.histories)
    return SequenceFeatures(
        candidate=vectors(rows, widths.candidate),
        context=vectors(rows, widths.context),
        histories=tuple(
            History(
                events=vectors(rows * history.max_length, history.event),
                lengths=torch.full((rows,), history.max_length),
                target=vectors(rows, history.event),
            )
            for history in widths.histories
        ),
        max_seqlen=max_seqlen,
        num_tokens=rows * max_seqlen,
    )


def test_counting_leaves_the_model_as_it_was():
    task = build_task(MODEL, SCHEMA)
    before = {name: module.training for name, module in task.named_modules()}
    count_cost(task, SCHEMA, MODEL.embedding_dim)
    assert {name: module.training for name, module in task.named_modules()} == before


def test_the_table_has_a_line_a_component():
    cost = cost_of(PUBLISHED, AMAZON)
    lines = cost_table(cost).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(cost.flops)
    assert "5,301,057" in lines[-2]
    assert lines[-1].endswith(f"its lookups read {cost.lookup_bytes:,} bytes")
