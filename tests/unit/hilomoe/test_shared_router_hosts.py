"""Shared routers in hosts: traced, pipelined, and with queries of several kinds."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.models.dlrm import DLRM

from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_shared_router, sites_of

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
