"""The helpers that run processes: results in order, every way to fail told, nothing left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import distributed as dist

from tests.helpers.processes import RankFailed, run_command, run_ranks


def sum_of_ranks(offset: torch.Tensor) -> torch.Tensor:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return total * 10 + dist.get_rank()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like this")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def is_joined() -> bool:
    return dist.is_initialized()


def test_results_come_in_the_order_of_ranks():
    results = run_ranks(sum_of_ranks, 3, torch.tensor([1]))
    assert [result.item() for result in results] == [60, 61, 62]


@pytest.mark.parametrize("joined", [True, False])
def test_who_forms_the_process_group_is_the_callers_choice(joined):
    assert run_ranks(is_joined, 2, joined=joined) == [joined, joined]


def test_a_raising_rank_is_shown_with_its_traceback():
    with pytest.raises(
        RankFailed, match="(?s)rank 1 ended with exit code 1:.*rank 1 does not like this"
    ):
        run_ranks(fail_on_rank_1, 2)


def test_a_killed_rank_is_named():
    with pytest.raises(RankFailed, match="rank 1 ended with exit code -9"):
        run_ranks(die_on_rank_1, 2)


def test_hanging_ranks_are_ended():
    with pytest.raises(RankFailed, match="(?s)rank 0 was still running.*rank 1 was still running"):
        run_ranks(hang, 2, timeout=3.0)


def test_a_command_has_its_exit_code_and_both_outputs():
    code = "import os, sys; print(os.environ['WORD']); sys.exit('no')"
    result = run_command([sys.executable, "-c", code], env={"WORD": "yes"})
    assert (result.returncode, result.stdout, result.stderr) == (1, "yes\n", "no\n")


def test_a_command_out_of_time_ends_with_what_it_started(tmp_path):
    trace = tmp_path / "trace"
    child = f"import time; time.sleep(2); open({str(trace)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        run_command([sys.executable, "-c", parent], timeout=1.0)
    time.sleep(2.0)
    assert not trace.exists()
