"""Backends: decided at construction, logged once, refused with every reason."""

import logging

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear
from torchrec_hilomoe.hilomoe.execution import _say, execution_for
from torchrec_hilomoe.hilomoe.experts import EXPERT_KERNELS


def test_size_decides_how_experts_are_met():
    assert execution_for(HiLoMoEConfig(num_experts=8), width=16).experts == "dense"
    assert execution_for(HiLoMoEConfig(num_experts=8), width=256).experts == "gathered"
    assert execution_for(HiLoMoEConfig(num_experts=8, top_k=8), width=256).experts == "dense"


def test_size_decides_where_the_recursion_runs():
    assert execution_for(HiLoMoEConfig(num_experts=64), width=256).space == "scores"
    assert execution_for(HiLoMoEConfig(num_experts=256), width=256).space == "queries"
    assert execution_for(HiLoMoEConfig(num_experts=64, query_dim=32), width=256).space == "queries"
    assert execution_for(HiLoMoEConfig(num_experts=8), width=4).space == "scores"


def test_the_decision_is_logged_once_for_each_width(caplog):
    """Sites of two widths may be decided otherwise, which would read as a contradiction."""
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger="torchrec_hilomoe"):
        for width in (256, 8, 256, 8):
            HiLoMoELinear(width, 4, HiLoMoEConfig())
    assert [r.getMessage() for r in caplog.records] == [
        "HiLoMoE backend 'auto' for sites of 256 inputs: eager, experts gathered, scores",
        "HiLoMoE backend 'auto' for sites of 8 inputs: eager, experts dense, scores",
    ]


def test_refuses_with_every_reason(monkeypatch):
    with pytest.raises(ValueError, match=r"backend = 'triton'.*num_layers x num_exp.*Use backend"):
        HiLoMoELinear(8, 4, HiLoMoEConfig(backend="triton", num_experts=128))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # its compiler is another
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"backend = 'compiled'.*needs a C\+\+ compiler; install"):
        HiLoMoELinear(8, 4, HiLoMoEConfig(backend="compiled"))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS.values())
@pytest.mark.parametrize("rows", [1, 5, 9000])  # few, and enough for the long sort
def test_kernels_agree_with_one_hot_products(kernel, rows):
    choices, vectors, width = 2, 6, 3
    chosen_SN = torch.stack([torch.randint(0, 3, (rows,)), torch.randint(3, 6, (rows,))])
    w_SN = torch.randn(choices, rows, dtype=torch.float64)
    x_ND = torch.randn(rows, width, dtype=torch.float64)
    bank_HD = torch.randn(vectors, width, dtype=torch.float64)
    one_hot_SNH = nn.functional.one_hot(chosen_SN, vectors).double()
    experts, w = kernel(kernel.indices(chosen_SN)), kernel.layout(w_SN)
    dots_SN = torch.einsum("nd,snh,hd->sn", x_ND, one_hot_SNH, bank_HD)
    rounding = float64_rounding(x_ND, bank_HD, w_SN)
    assert_within(experts.dot(x_ND, bank_HD), kernel.layout(dots_SN), rounding)
    added_ND = torch.einsum("sn,snh,hd->nd", w_SN, one_hot_SNH, bank_HD)
    assert_within(experts.add(torch.ones_like(x_ND), w, bank_HD), 1 + added_ND, rounding)
    grad_HD = torch.einsum("sn,snh,nd->hd", w_SN, one_hot_SNH, x_ND)
    assert_within(experts.grad(x_ND, w, vectors), grad_HD, rounding)
    assert torch.equal(kernel.layout(kernel.layout(w_SN)), w_SN)


@pytest.mark.slow
# Dynamo looks for gradients where there are none. Goes when it does not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2, "rank": 2, "query_dim": 5, "query_update": "selected"}],
    ids=["default", "other"],
)
def test_compiled_equals_eager(options):
    torch.compiler.reset()
    eager = HiLoMoELinear(6, 5, HiLoMoEConfig(num_experts=4, **options)).double()
    nn.init.normal_(eager.expert_out)
    compiled = HiLoMoELinear(6, 5, HiLoMoEConfig(num_experts=4, backend="compiled", **options))
    compiled.double().load_state_dict(eager.state_dict())
    x, results = torch.randn(7, 6, dtype=torch.float64), []
    for site in (eager, compiled):
        leaf = x.clone().requires_grad_()
        y = site(leaf)
        y.sin().sum().backward()
        results.append({"y": y, "x": leaf.grad} | {n: p.grad for n, p in site.named_parameters()})
    assert_within(results[1], results[0], float64_rounding(eager, x, results[0]))
