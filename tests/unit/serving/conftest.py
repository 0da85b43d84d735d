"""An exported ranker for tests that look at its folder."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.serving import ranker
from torchrec_hilomoe.serving import export_model


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact; nobody writes to it."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("exported") / "din"
    export_model(ranker("din", "row").model, out)
    return out


@pytest.fixture
def artifact(exported_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(exported_once, tmp_path / "din"))
