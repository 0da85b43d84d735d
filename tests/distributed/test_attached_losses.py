"""Attached losses under data-parallel training: as one process with the whole batch computes."""

import pytest
import torch
from torch import distributed as dist
from torch import nn, Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, float64_rounding, rounded
from torchrec_hilomoe.hilomoe import auxiliary_loss, set_auxiliary_loss_scale
from torchrec_hilomoe.hilomoe.losses import AttachedLoss

WIDTH = 5


class Host(nn.Module):
    """A map with an opinion about those of its outputs that are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.small = AttachedLoss(0.7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        positive = hidden > 0
        hidden = self.small(hidden, (hidden * positive).square().sum(), positive.sum())
        return self.last(hidden)


def build() -> Host:
    torch.manual_seed(1)
    return Host().double()


def rows(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def train_rank(shares: tuple[int, ...], micro_batches: int) -> dict:
    """Gradients, and the loss that was read at the last micro-batch, of this rank's rows."""
    rank, total = dist.get_rank(), sum(shares)
    plain = build()
    model = DistributedDataParallel(plain)
    set_auxiliary_loss_scale(plain, 1 / micro_batches)
    start = sum(shares[:rank])
    for index, part in enumerate(rows(total)[start : start + shares[rank]].chunk(micro_batches)):
        last = index == micro_batches - 1
        with torch.enable_grad() if last else model.no_sync():
            # The average over ranks must be the mean over all rows, however they are shared.
            (model(part).sin().sum() * len(shares) / total).backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return {"grads": grads, "loss": auxiliary_loss(plain).item()}


def train_alone(total: int, pieces: list[list[int]]) -> dict:
    model = build()
    set_auxiliary_loss_scale(model, 1 / len(pieces))
    for piece in pieces:
        (model(rows(total)[piece]).sin().sum() / total).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"grads": grads, "loss": auxiliary_loss(model).item()}


@pytest.mark.parametrize(
    ("shares", "pieces"),
    [
        ((3, 0, 9), [list(range(12))]),
        ((4, 8), [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]]),
    ],
    ids=["uneven ranks", "accumulated"],
)
def test_gradients_equal_one_process_on_the_whole_batch(shares, pieces):
    ranks = run_ranks(train_rank, len(shares), shares, len(pieces))
    alone = train_alone(sum(shares), pieces)
    for result in ranks:
        rounding = float64_rounding(build(), rows(sum(shares)), alone["grads"])
        assert_within(result["grads"], alone["grads"], rounding)
    mean = sum(result["loss"] for result in ranks) / len(ranks)
    assert mean == rounded(alone["loss"], terms=sum(shares) * WIDTH)
