"""A run that has ended well, which tests copy and damage."""

import pytest

from tests.helpers.faults import run_with


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Its folder; nothing is written there."""
    out = tmp_path_factory.mktemp("finished")
    (ended,) = run_with(None, [f"--out_dir={out}"], ranks=1)
    assert ended.code == 0, ended.shown
    return out
