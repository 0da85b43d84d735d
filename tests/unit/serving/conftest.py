"""An exported ranker, rows, and what scores them."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.helpers.datasets import toy_table
from tests.helpers.serving import ranker
from torchrec_hilomoe.serving import export_model, Scorer


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


@pytest.fixture(scope="session")
def scorer(exported_once: Path) -> Scorer:
    """Scores with it."""
    return Scorer(exported_once)


@pytest.fixture(scope="session")
def rows() -> pa.Table:
    """40 rows of the toy data, as they are scored."""
    return toy_table(40, seed=3).drop_columns(["label"])
