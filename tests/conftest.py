"""What every test starts from."""

import logging
import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Logging as it was, after a test has called a command, which sets up the console."""
    loggers = {name: logging.getLogger(name) for name in ("", "torchrec_hilomoe", "torchrec")}
    levels = {name: logger.level for name, logger in loggers.items()}
    handlers = list(loggers[""].handlers)
    yield
    for name, logger in loggers.items():
        logger.setLevel(levels[name])
    for handler in set(loggers[""].handlers) - set(handlers):
        if type(handler) is logging.StreamHandler:  # pytest's own are others
            loggers[""].removeHandler(handler)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are of float64, also where another package makes them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
