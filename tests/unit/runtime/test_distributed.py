"""Joining a job: alone, or as a launcher's rank."""

import pytest
import torch
from torch import distributed as dist

from tests.helpers.processes import run_ranks
from torchrec_hilomoe.runtime.distributed import (
    broadcast_text,
    DistributedContext,
    init_distributed,
)
from torchrec_hilomoe.runtime.world import World


def join_by_itself() -> tuple[DistributedContext, bool]:
    with init_distributed("cpu") as context:
        everyone = torch.ones(1)
        dist.all_reduce(everyone)
        assert everyone.item() == context.world.size
    return context, dist.is_initialized()


def say_the_rank() -> str:
    return broadcast_text(f"rank {dist.get_rank()}" if dist.get_rank() == 0 else None)


def test_without_a_launcher_it_is_a_job_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    context, still_joined = join_by_itself()
    assert (context.world, context.device, context.is_main) == (World(), torch.device("cpu"), True)
    assert not still_joined


def test_a_job_is_left_even_after_an_error(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ZeroDivisionError), init_distributed("cpu"):
        print(1 / 0)  # noqa: T201
    assert not dist.is_initialized()


def test_a_launchers_rank_finds_the_others():
    (first, left), (second, _) = run_ranks(join_by_itself, 2, joined=False)
    assert (first.world, second.world) == (World(rank=0, size=2), World(rank=1, size=2))
    assert (first.is_main, second.is_main) == (True, False)
    assert not left


def test_a_text_of_the_first_rank_reaches_all():
    assert run_ranks(say_the_rank, 2) == ["rank 0", "rank 0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_told():
    with (
        pytest.raises(ValueError, match=r"train.device is 'cuda', but PyTorch sees no GPU.*doctor"),
        init_distributed("cuda"),
    ):
        pass
