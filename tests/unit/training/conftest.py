"""What tests of training share: a process group of one, and the toy model sharded in it."""

from collections.abc import Iterator

import pytest

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext, init_distributed
from torchrec_hilomoe.training.assemble import assemble, Assembly


@pytest.fixture
def alone() -> Iterator[DistributedContext]:
    """The only process of a job, as ``python apps/train.py`` forms it."""
    with init_distributed("cpu") as context:
        yield context


@pytest.fixture
def assembly(alone: DistributedContext) -> Assembly:
    """The toy model with its optimizers, as a run has it before its first stage."""
    return assemble(RunConfig(model=MODEL), build_task(MODEL, SCHEMA), alone)
