"""The tree stays what a reader can take in: small files, real packages, commands that exist."""

import importlib.util
import re
from pathlib import Path

from tests.helpers.processes import ROOT

PACKAGE = ROOT / "torchrec_hilomoe"
MODULES = sorted(PACKAGE.rglob("*.py"))
APPS = sorted((ROOT / "apps").glob("*.py"))
TEXTS = [*MODULES, *APPS, *sorted(ROOT.glob("*.md"))]
# Of the map in the package's docstring, in its order.
FLOW = ("data", "embeddings", "hilomoe", "backbones", "models", "training", "serving")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_module_is_longer_than_500_lines():
    assert {str(path): lines(path) for path in MODULES if lines(path) > 500} == {}


def test_no_app_is_longer_than_80_lines():
    assert {str(path): lines(path) for path in APPS if lines(path) > 80} == {}


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_module_command_that_a_text_names_exists():
    command = re.compile(r"python -m ((?:torchrec_hilomoe|benchmarks)[\w.]*\w)")
    named = {name: str(path) for path in TEXTS for name in command.findall(path.read_text())}
    assert named
    gone = {name: path for name, path in named.items() if importlib.util.find_spec(name) is None}
    assert gone == {}


def test_no_step_of_the_flow_imports_a_later_one():
    upwards = {}
    for place, step in enumerate(FLOW):
        for path in (PACKAGE / step).rglob("*.py"):
            imported = re.findall(
                r"^\s*(?:from|import) torchrec_hilomoe\.(\w+)", path.read_text(), re.M
            )
            if later := set(imported) & set(FLOW[place + 1 :]):
                upwards[str(path.relative_to(PACKAGE))] = later
    assert upwards == {}
