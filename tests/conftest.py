"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers whichever tests run, and in whatever order."""
    torch.manual_seed(0)
