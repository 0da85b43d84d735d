"""HiLoMoE inside torchrec's own models: plain, from an old checkpoint, and distributed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.models.dlrm import DLRM, DLRM_DCN

from tests.helpers.processes import run_ranks
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    HiLoMoEConfig,
    inject_hilomoe,
    remove_hilomoe,
    sites_of,
)

DENSE, WIDTH = 5, 4
CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4)


def build(kind: Callable[..., nn.Module], device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=WIDTH, num_embeddings=9, feature_names=[f])
        for i, f in enumerate(("a", "b"))
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device(device))
    extra: dict[str, Any] = {"dcn_num_layers": 1, "dcn_low_rank_dim": 3} if kind is DLRM_DCN else {}
    return kind(
        embedding_bag_collection=collection,
        dense_in_features=DENSE,
        dense_arch_layer_sizes=[8, WIDTH],
        over_arch_layer_sizes=[8, 6, 1],
        **extra,
    )


def batch() -> tuple[torch.Tensor, KeyedJaggedTensor]:
    lengths = torch.tensor([1, 2, 0, 1, 3, 1])
    values = torch.tensor([0, 3, 4, 8, 1, 1, 2, 7])
    kjt = KeyedJaggedTensor.from_lengths_sync(keys=["a", "b"], values=values, lengths=lengths)
    return torch.randn(3, DENSE), kjt


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN])
def test_outputs_are_kept_to_the_bit_and_an_old_checkpoint_loads(kind):
    old, model = build(kind), build(kind)
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert inject_hilomoe(model, CONFIG, sites=["*"]) == linears
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert (set(missing), unexpected) == (set(expert_parameters(model)), [])
    dense, sparse = batch()
    assert torch.equal(model(dense, sparse), old(dense, sparse))
    for site in sites_of(model).values():
        site.active_layers = 0
    assert remove_hilomoe(model) == linears
    assert list(model.state_dict()) == list(old.state_dict())
    assert torch.equal(model(dense, sparse), old(dense, sparse))


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN])
def test_only_experts_train(kind):
    model = build(kind)
    inject_hilomoe(model, CONFIG, sites=["over_arch.*"])
    model.requires_grad_(False)
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # up-vectors start at zero: they move first, and then the rest
        optimizer.zero_grad()
        model(*batch()).sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(expert_parameters(model))


def test_the_pipelines_tracer_takes_it():
    """TorchRec's pipelines trace a model through its dense parts, down to the lookups."""
    model = build(DLRM)
    inject_hilomoe(model, CONFIG, sites=["*arch*"])
    graph = Tracer(leaf_modules=["sparse_arch"]).trace(model)
    traced = torch.fx.GraphModule(model, graph)
    dense, sparse = batch()
    assert torch.equal(traced(dense, sparse), model(dense, sparse))


def wrapped_model() -> list[str]:
    model = DistributedModelParallel(build(DLRM, "meta"), device=torch.device("cpu"))
    messages = []
    for target in (model, model.module):  # the second hides the wrapper, not the sharded tables
        with pytest.raises(ValueError, match="already distributed") as caught:
            inject_hilomoe(target, CONFIG, sites=["*over_arch*"])
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="already distributed"):
        remove_hilomoe(model)
    return messages


def test_refuses_a_wrapped_model():
    ((root, inner),) = run_ranks(wrapped_model, 1)
    assert "its root is a DistributedModelParallel" in root
    assert "ranks would drift apart" in root
    assert "ShardedEmbeddingBagCollection" in inner


def train_injected() -> dict[str, torch.Tensor]:
    """Inject, wrap, train: the order that the refusal asks for."""
    model = build(DLRM, "meta")
    inject_hilomoe(model, CONFIG, sites=["over_arch.*"])
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.dim() > 0], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(*batch()).sum().backward()
        optimizer.step()
    return {n: p.detach() for n, p in wrapped.named_parameters() if "expert" in n}


def test_injected_before_wrapping_trains_alike_on_all_ranks():
    first, second = run_ranks(train_injected, 2)
    assert len(first) == 3 * 3
    for name, parameter in first.items():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, second[name])
