"""What ``benchmarks.on_gpu`` checks, as tests: one case of each is one test, on a GPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import sharded, sites, training
from benchmarks.gpu.cases import Case, Setting
from tests.helpers.models import batches

pytestmark = pytest.mark.gpu


def named(module):
    """A part's cases, none of which writes a file."""
    setting = Setting(device="cuda", rehearsal=False, scratch=Path("unused"))
    return [pytest.param(case, id=case.name) for case in module.cases(setting)]


@pytest.mark.parametrize("case", named(sites))
def test_a_site_is_as_exact_as_the_loops(case: Case):
    case.run()


@pytest.mark.parametrize("case", named(sharded))
def test_a_sharded_step_is_the_one_by_hand(case: Case):
    case.run()


@pytest.mark.parametrize("precision", training.PRECISIONS)
@pytest.mark.parametrize("backbone", training.BACKBONES)
def test_the_first_step_is_as_exact_as_the_cpus(backbone, precision):
    training.first_step(backbone, precision, "cuda")


@pytest.mark.parametrize("backbone", training.BACKBONES[:2])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(backbone, tmp_path):
    setting = Setting(device="cuda", rehearsal=True, scratch=tmp_path)
    figures = training.kill_and_resume(backbone, setting)
    assert figures["resumed"]


def test_a_pinned_batch_arrives_whole():
    (batch,) = batches(24, 24)
    pinned = batch.pin_memory()
    assert pinned.labels.is_pinned()
    assert pinned.unpooled.values().is_pinned()
    there = pinned.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.synchronize()
    there.record_stream(torch.cuda.current_stream())
    assert there.labels.is_cuda
    assert torch.equal(there.labels.cpu(), batch.labels)
    assert torch.equal(there.pooled.values().cpu(), batch.pooled.values())
    assert torch.equal(there.unpooled.lengths().cpu(), batch.unpooled.lengths())
