"""Auxiliary losses under data-parallel training: as one process with the whole batch computes."""

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, float64_rounding, rounded
from torchrec_hilomoe.hilomoe import (
    auxiliary_loss,
    HiLoMoEConfig,
    inject_hilomoe,
    record_routing,
    routing_report,
    set_auxiliary_loss_scale,
)

WIDTH = 6
STEPS = 3


def build_model(top_k: int) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    config = HiLoMoEConfig(
        num_layers=3, num_experts=4, top_k=top_k, balance_weight=0.5, z_weight=0.2
    )
    inject_hilomoe(model, config, sites=["*"])
    for name, parameter in model.named_parameters():
        if name.endswith("expert_out"):
            nn.init.normal_(parameter)
    return model


def batches(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, WIDTH, generator=generator).double() for _ in range(STEPS)]


def train_rank(shares: tuple[int, ...], top_k: int, micro_batches: int) -> dict:
    """Train on this rank's rows; return the last gradients and the losses that were read."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain = build_model(top_k)
    model = DistributedDataParallel(plain, static_graph=micro_batches == 1)
    start = sum(shares[:rank])
    total, losses = sum(shares), []
    for batch in batches(total):
        model.zero_grad()
        local = batch[start : start + shares[rank]]
        set_auxiliary_loss_scale(plain, 1 / micro_batches)
        for index, part in enumerate(local.chunk(micro_batches)):
            last = index == micro_batches - 1
            with model.no_sync() if not last else torch.enable_grad():
                # The average over ranks must be the mean over all rows, however they are shared.
                loss = model(part).sin().sum() * ranks / total
                loss.backward()
            losses.append(auxiliary_loss(plain).item())
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return {"grads": grads, "losses": losses}


def train_alone(total: int, top_k: int, pieces: list[list[int]]) -> dict:
    """The same in one process; ``pieces`` are the rows of each micro-batch."""
    model, losses = build_model(top_k), []
    for batch in batches(total):
        model.zero_grad()
        set_auxiliary_loss_scale(model, 1 / len(pieces))
        for rows in pieces:
            (model(batch[rows]).sin().sum() / total).backward()
            losses.append(auxiliary_loss(model).item())
    return {"grads": {n: p.grad for n, p in model.named_parameters()}, "losses": losses}


def rounding(total: int, grads: dict[str, torch.Tensor]) -> float:
    return float64_rounding(build_model(1), batches(total), grads)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shares", [(8, 8), (3, 10), (5, 0, 9, 2)], ids=str)
def test_gradients_equal_one_process_on_the_whole_batch(shares, top_k):
    total = sum(shares)
    ranks = run_ranks(train_rank, len(shares), shares, top_k, 1)
    alone = train_alone(total, top_k, [list(range(total))])
    for result in ranks:
        assert_within(result["grads"], alone["grads"], rounding(total, alone["grads"]))
    read = np.mean([result["losses"] for result in ranks], axis=0).tolist()
    assert read == rounded(alone["losses"], terms=total * WIDTH)


def test_accumulated_micro_batches_each_count_with_their_share():
    ranks = run_ranks(train_rank, 2, (8, 8), 1, 2)
    # The first micro-batch of all ranks together, then the second.
    pieces = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    alone = train_alone(16, 1, pieces)
    for result in ranks:
        assert_within(result["grads"], alone["grads"], rounding(16, alone["grads"]))


def silent_modes() -> list[int]:
    """Evaluation, ``no_grad`` and zero weights ask nothing of other ranks: only rank 0 runs."""
    model = build_model(1)
    if dist.get_rank() == 0:
        x = batches(4)[0]
        with torch.no_grad():
            model(x)
        model.eval()(x)
        quiet = nn.Sequential(nn.Linear(WIDTH, 2)).double()
        inject_hilomoe(quiet, HiLoMoEConfig(balance_weight=0, z_weight=0), sites=["0"])
        quiet(x).sum().backward()
    return [dist.get_rank()]


def test_no_collective_where_no_loss_is_computed():
    assert run_ranks(silent_modes, 2, timeout=30) == [[0], [1]]


def report_rank(shares: tuple[int, ...]):
    model = build_model(1).eval()
    start = sum(shares[: dist.get_rank()])
    with record_routing(model):
        model(batches(sum(shares))[0][start : start + shares[dist.get_rank()]])
    return routing_report(model)


@pytest.mark.parametrize("shares", [(6, 7), (13, 0)], ids=str)
def test_report_covers_all_ranks(shares):
    first, second = run_ranks(report_rank, 2, shares)
    assert first == second
    model = build_model(1).eval()
    with record_routing(model):
        model(batches(13)[0])
    alone, terms = routing_report(model), 13 * WIDTH
    for got, want in zip(first.sites, alone.sites, strict=True):
        assert got.output_ratio == rounded(want.output_ratio, terms)
    for got, want in zip(first.routers, alone.routers, strict=True):
        assert (got.rows, got.paths_in_use) == (want.rows, want.paths_in_use)
        for layer, wanted in zip(got.layers, want.layers, strict=True):
            assert layer.load == rounded(wanted.load, terms)
            assert layer.dead_experts == wanted.dead_experts
            assert layer.balance_loss == rounded(wanted.balance_loss, terms)
            assert layer.z_loss == rounded(wanted.z_loss, terms)


def train_compiled(shares: tuple[int, ...]) -> dict:
    rank = dist.get_rank()
    plain = build_model(1)
    model = DistributedDataParallel(plain)
    compiled = torch.compile(model, backend="aot_eager")
    start, total = sum(shares[:rank]), sum(shares)
    local = batches(total)[-1][start : start + shares[rank]]
    (compiled(local).sin().sum() * len(shares) / total).backward()
    return {name: p.grad for name, p in plain.named_parameters()}


@pytest.mark.slow
def test_compiled_models_compute_the_same_losses():
    ranks = run_ranks(train_compiled, 2, (3, 10))
    alone = train_alone(13, 1, [list(range(13))])
    for grads in ranks:
        assert_within(grads, alone["grads"], rounding(13, alone["grads"]))
