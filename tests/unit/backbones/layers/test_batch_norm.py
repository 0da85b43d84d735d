"""Batch norm over all ranks' rows: in one process, torch's own; over ranks, the whole batch's."""

from dataclasses import dataclass

import pytest
import torch
from torch import distributed as dist
from torch import nn, Tensor

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm
from torchrec_hilomoe.backbones.layers.mlp import Dice

WIDTH = 3
# Of the rows of the whole batch, those of each rank; among them a rank without any.
SPLITS = [(4, 5), (9, 0), (1, 1), (1, 0), (0, 0)]


def pair(affine: bool) -> tuple[GlobalBatchNorm, nn.BatchNorm1d]:
    ours = GlobalBatchNorm(WIDTH, momentum=0.3, affine=affine)
    theirs = nn.BatchNorm1d(WIDTH, momentum=0.3, affine=affine)
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
def test_one_process_computes_what_torch_does(affine):
    ours, theirs = pair(affine)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(7, WIDTH) + 5
        mine, other = (x.clone().requires_grad_() for _ in range(2))
        got, want = ours(mine), theirs(other)
        assert torch.equal(got, want)
        cotangent = torch.randn(7, WIDTH)
        got.backward(cotangent)
        want.backward(cotangent)
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_normalised_by_the_running_statistics(rows):
    norm = GlobalBatchNorm(WIDTH)
    norm(torch.randn(8, WIDTH) + 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(rows, WIDTH)
    got = norm(x)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    assert torch.equal(got, norm.eval()(x))


@dataclass(frozen=True)
class Trained:
    """A module's results on some rows."""

    outputs: Tensor
    input_grads: Tensor
    parameter_grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    norm, dice = GlobalBatchNorm(WIDTH), Dice(WIDTH)
    for parameter in (*norm.parameters(), *dice.parameters()):
        nn.init.normal_(parameter)
    plain = GlobalBatchNorm(WIDTH, affine=False)
    return {"norm": norm.double(), "dice": dice.double(), "plain norm": plain.double()}


def train_twice(module: nn.Module, batches: list[Tensor], cotangents: list[Tensor]) -> Trained:
    """On two batches, so that what the first left behind matters."""
    module(batches[0])
    x = batches[1].clone().requires_grad_()
    y = module(x)
    y.backward(cotangents[1])
    assert x.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(module.parameters()))
    return Trained(y.detach(), x.grad, grads, dict(module.named_buffers()))


def on_a_rank(
    batches: list[Tensor], cotangents: list[Tensor]
) -> dict[tuple[str, tuple[int, int]], Trained]:
    trained = {}
    for split in SPLITS:
        rows = slice(dist.get_rank() * split[0], split[0] + dist.get_rank() * split[1])
        mine = [x[rows] for x in batches]
        for name, module in modules().items():
            trained[name, split] = train_twice(module, mine, [c[rows] for c in cotangents])
    return trained


def test_ranks_together_compute_what_one_process_does():
    batches = [torch.randn(9, WIDTH, dtype=torch.float64) * 3 + 20 for _ in range(2)]
    cotangents = [torch.randn(9, WIDTH, dtype=torch.float64) for _ in range(2)]
    ranks = run_ranks(on_a_rank, 2, batches, cotangents)
    for name, split in ranks[0]:
        first, second = (rank[name, split] for rank in ranks)
        rows = sum(split)
        want = train_twice(
            modules()[name], [x[:rows] for x in batches], [c[:rows] for c in cotangents]
        )
        # Where two rows are close to each other, their variance amplifies what rounds their mean.
        spread = batches[1][:rows].std(dim=0, correction=0).min().item() if rows > 1 else 1.0
        rounding = float64_rounding(batches, cotangents, want) / min(spread, 1.0) ** 2
        assert_within(torch.cat([first.outputs, second.outputs]), want.outputs, rounding)
        grads = torch.cat([first.input_grads, second.input_grads])
        assert_within(grads, want.input_grads, rounding)
        for key, grad in want.parameter_grads.items():
            total = first.parameter_grads[key] + second.parameter_grads[key]
            assert_within(total, grad, rounding)
        for key, value in want.buffers.items():
            assert_within(first.buffers[key], value, rounding)
            assert torch.equal(first.buffers[key], second.buffers[key])


def test_a_norm_is_found_by_its_type_and_is_fx_traceable():
    """Freezing the statistics of a frozen backbone goes by torch's base class."""
    norm, x = GlobalBatchNorm(WIDTH), torch.randn(6, WIDTH)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    traced = torch.fx.symbolic_trace(norm)
    assert torch.equal(traced(x), norm(x))
