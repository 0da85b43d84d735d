"""Shared routers in hosts: traced, pipelined, and with queries of several kinds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.models.dlrm import DLRM

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.hilomoe import (
    HiLoMoEConfig,
    inject_hilomoe,
    inject_shared_router,
    sites_of,
)

CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4)
VIEWS = [[range(0, 4)], [range(4, 8)]]


def collection() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=n, embedding_dim=4, num_embeddings=9, feature_names=[n])
            for n in ("item", "hour")
        ]
    )


def ids() -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        ["item", "hour"], torch.tensor([0, 3, 4, 8, 1, 2]), torch.ones(6, dtype=torch.int64)
    )


def grow(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites_of(model).values():
            site.expert_out.normal_(generator=generator)


@pytest.mark.parametrize("views", [None, VIEWS], ids=["all columns", "views"])
def test_the_documented_example_is_traced(views):
    """As the pipelines trace it: down to the collection, whose module's output is the query."""
    model = DLRM(collection(), 5, [8, 4], [8, 6, 1])
    sites = ["over_arch*.0.*"]
    inject_shared_router(model, CONFIG, sites, "sparse_arch", query_width=8, views=views)
    grow(model)
    model.eval()
    leaves = ["sparse_arch.embedding_bag_collection"]
    traced = torch.fx.GraphModule(model, Tracer(leaf_modules=leaves).trace(model))
    dense = torch.randn(3, 5)
    assert torch.equal(traced(dense, ids()), model(dense, ids()))


class Returning(nn.Module):
    """Its query module returns pooled embeddings, as they are or in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.query, self.over = collection(), Container(), nn.Linear(8, 1)

    def forward(self, kjt: KeyedJaggedTensor) -> torch.Tensor:
        return self.over(self.query(self.bags(kjt).values())["x"])


class Container(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"x": x, "pair": (x, x)}


@pytest.mark.parametrize(("query", "entry"), [("bags", None), ("query", "x")])
def test_queries_of_other_kinds(query, entry):
    model = Returning()
    inject_shared_router(model, CONFIG, ["over"], query, query_width=8, query_entry=entry)
    same = Returning()
    inject_shared_router(same, CONFIG, ["over"], "query", query_width=8, query_entry="x")
    same.load_state_dict(model.state_dict())
    for one in (model, same):
        grow(one)
    assert torch.equal(model(ids()), same(ids()))


def test_a_query_of_no_kind_is_refused_by_name():
    model = Returning()
    inject_shared_router(model, CONFIG, ["over"], "query", query_width=8)
    with pytest.raises(ValueError, match=r"output is a dict, which must be a tensor or a Keyed"):
        model(ids())


class Candidates(nn.Module):
    """Users route a map of their candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.up = nn.Linear(6, 8), nn.Linear(6, 5)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        self.query(users)
        return self.up(items)


@pytest.mark.parametrize("options", [{}, {"num_experts": 64}], ids=["scores", "queries"])
@pytest.mark.parametrize("shared", [True, False])
def test_exports_with_free_users_and_candidates(options, shared):
    torch.manual_seed(0)
    model, config = Candidates().double(), replace(CONFIG, **options)
    if shared:
        inject_shared_router(model, config, ["up"], "query", query_width=8)
    else:
        inject_hilomoe(model, config, ["up"])
    grow(model)
    model.eval()
    free, users = torch.export.Dim.AUTO, torch.randn(3, 6).double()
    program = torch.export.export(
        model,
        (users, torch.randn(3, 4, 6).double()),
        dynamic_shapes=({0: free}, {0: free, 1: free}),
        strict=False,
    ).module()
    for rows, candidates in ((3, 4), (2, 7), (5, 3)):
        given = torch.randn(rows, 6).double(), torch.randn(rows, candidates, 6).double()
        want = model(*given)
        assert_within(program(*given), want, float64_rounding(model, *given, want))
