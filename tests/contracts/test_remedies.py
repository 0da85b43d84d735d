"""Messages that say what to install name the package that is missing, as pyproject.toml caps it.

They never name an extra of this project: on a host without a GPU pip would then complete torchrec's
own requirements, and so put the CUDA fbgemm-gpu over the CPU one.
"""

import re
import tomllib

import pytest

from tests.helpers.processes import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CAPPED = {requirement for extra in EXTRAS.values() for requirement in extra}
SOURCES = [
    path
    for room in ("apps", "benchmarks", "specs", "torchrec_hilomoe")
    for path in sorted((ROOT / room).rglob("*.py"))
]
REMEDIES = [
    pytest.param(found, id=f"{path.name} {found}")
    for path in SOURCES
    for found in re.findall(r"pip install ['\"]([^'\"$]+)['\"]", path.read_text())
]


def test_the_package_names_commands_that_a_wheel_has():
    """There is no apps/ beside an installed package."""
    named = [path for path in SOURCES if "python apps/" in path.read_text()]
    assert not [path for path in named if ROOT / "torchrec_hilomoe" in path.parents]


def test_remedies_are_found():
    assert len(REMEDIES) > 5


@pytest.mark.parametrize("requirement", REMEDIES)
def test_a_remedy_installs_what_is_missing_and_nothing_else(requirement):
    assert requirement in CAPPED or requirement.startswith("torchx[")
