"""Stopping between two steps: which signals, which step, and the same one on every rank."""

import os
import signal

import pytest
from torch import distributed as dist

from tests.helpers.processes import run_ranks
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.runtime.stopping import StopSignal


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with init_distributed("cpu"):
        yield


@pytest.fixture(autouse=True)
def _interruptible():
    """Handle Ctrl-C as Python does, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_after_the_step(number):
    with StopSignal() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.requested()


def test_a_signal_that_arrives_twice_is_one():
    """From the scheduler, and once more from the launcher that got it too."""
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.requested()


def test_a_later_signal_acts_at_once():
    with StopSignal(echo_seconds=0.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested()


def test_afterwards_signals_are_what_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal():
        inside = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert inside != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def ask_at_every_step(asked_rank: int) -> int:
    """Return the step after which this rank stops, when one of them got the signal at step 3."""
    with StopSignal() as stop:
        for step in range(1, 100):
            if step == 3 and dist.get_rank() == asked_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.requested():
                return step
    return 0


@pytest.mark.parametrize("asked_rank", [0, 1])
def test_ranks_agree_on_the_step_whoever_got_the_signal(asked_rank):
    assert run_ranks(ask_at_every_step, 2, asked_rank) == [4, 4]
