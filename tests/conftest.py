"""What every test starts from."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # read when triton is first imported, by whatever test
    os.environ["TRITON_INTERPRET"] = "1"

# A shared machine is slow now and then; that is no reason for an example to fail.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers whichever tests run, and in whatever order."""
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
