"""The components are ones that TorchX takes: it parses their signatures and their docstrings."""

import importlib.util
import inspect
import sys

import pytest
from torchx.components.component_test_base import ComponentTestCase

from tests.helpers.processes import ROOT, run_command

COMPONENTS = ["benchmark", "evaluate", "prepare", "sweep", "train"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"specs_{name}", ROOT / "specs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_a_component_of_its_name():
    assert sorted(path.stem for path in (ROOT / "specs").glob("*.py")) == COMPONENTS


class TestComponents(ComponentTestCase):
    def test_torchx_takes_each_by_its_path(self):
        for name in COMPONENTS:
            with self.subTest(name):
                self.validate(load(name), name)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_argument_is_explained(name):
    function = getattr(load(name), name)
    explained = (inspect.getdoc(function) or "").partition("Args:\n")[2]
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in f"\n{explained}", argument


def test_torchx_own_components_stay():
    """An entry point of ours would hide them from every project in the environment."""
    code = "from torchx.cli.main import main; main()"
    result = run_command([sys.executable, "-c", code, "builtins"])
    assert "dist.ddp" in result.stdout, result.stderr
