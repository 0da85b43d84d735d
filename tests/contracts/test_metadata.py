"""What the package says that it needs, what is pinned, and what a wheel of it holds, agree."""

import re
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, NormalizedName

from tests.helpers.processes import ROOT, run_command
from torchrec_hilomoe.doctor import FBGEMM, PINNED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CPU_FBGEMM, CUDA_FBGEMM = (canonicalize_name(FBGEMM[device]) for device in ("cpu", "cuda"))
# The CPU's takes the first one's place; FuxiCTR's preprocessing alone wants the others.
LEFT_OUT = {CUDA_FBGEMM, "ray", "pydantic"}


def pins(name: str) -> dict[NormalizedName, str]:
    """Distribution to version, of a requirements file and of those that it includes."""
    found: dict[NormalizedName, str] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found.update(pins(line.removeprefix("-r ")))
        elif line:
            distribution, version = line.split("==")
            assert canonicalize_name(distribution) not in found, f"{distribution} is pinned twice"
            found[canonicalize_name(distribution)] = version
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *EXTRAS["torchx"], *EXTRAS["tensorboard"]]
)
def test_a_set_has_all_that_the_package_names_within_its_caps(device, line):
    requirement = Requirement(line)
    version = pins(f"{device}.txt")[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("line", [*EXTRAS["dev"], *EXTRAS["plots"], *EXTRAS["sweep"]])
def test_the_development_set_has_its_extras_within_their_caps(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins("dev.txt")[canonicalize_name(requirement.name)])


def test_every_dependency_has_a_cap():
    every = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    assert [line for line in every if not re.search(r"<\d", line)] == []


def test_the_sets_differ_in_fbgemm_alone_and_are_the_doctors():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu.pop(CPU_FBGEMM) == cuda.pop(CUDA_FBGEMM) == PINNED.fbgemm
    assert cpu == cuda
    triple = {"torch": PINNED.torch, "torchrec": PINNED.torchrec}
    assert triple.items() <= cpu.items()


def test_the_pins_are_whole_and_consistent():
    """``pip install --no-deps`` resolves nothing, so the lists must be a resolver's."""
    pinned = {**pins("cpu.txt"), **pins("dev.txt")}
    installed = {canonicalize_name(d.name): d for d in metadata.distributions()}
    problems = []
    for name, version in pinned.items():
        if name not in installed or installed[name].version.partition("+")[0] != version:
            pytest.skip(f"made for the pinned CPU environment; here {name} is another")
        for requirement in map(Requirement, installed[name].requires or []):
            wanted = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not applies or wanted in LEFT_OUT:
                continue
            found = pinned.get(wanted)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                problems.append(f"{name} needs {requirement}, pinned is {found}")
    assert problems == []


def test_a_wheel_holds_every_module_every_recipe_and_the_type_marker(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "torchrec_hilomoe"):
        (tmp_path / name).symlink_to(ROOT / name)
    build = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    result = run_command([sys.executable, "-c", build], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    package = ROOT / "torchrec_hilomoe"
    sources = [*package.rglob("*.py"), *package.rglob("*.yaml"), package / "py.typed"]
    expected = {str(Path(source).relative_to(ROOT)) for source in sources}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
