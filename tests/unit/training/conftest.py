"""What tests of training share: a process group of one."""

from collections.abc import Iterator

import pytest

from torchrec_hilomoe.runtime.distributed import Job, join


@pytest.fixture
def alone() -> Iterator[Job]:
    """The only process of a job, as ``python apps/train.py`` forms it."""
    with join("cpu") as job:
        yield job
