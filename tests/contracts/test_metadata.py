"""What the package says that it needs, what is pinned, and what a wheel of it holds, agree."""

import re
import site
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from venv import EnvBuilder

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, NormalizedName

from tests import matrix
from tests.helpers.processes import ROOT, run_command
from torchrec_hilomoe.doctor import FBGEMM, PINNED, Release, RELEASES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CPU_FBGEMM, CUDA_FBGEMM = (canonicalize_name(FBGEMM[device]) for device in ("cpu", "cuda"))
# The CPU's takes the first one's place; FuxiCTR's preprocessing alone wants the other.
LEFT_OUT = {CUDA_FBGEMM, "ray"}


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


SETS = [
    pytest.param(release, device, id=f"{device}-{release.series}")
    for release in RELEASES
    for device in ("cpu", "cuda")
]


def set_of(release: Release, device: str) -> dict[NormalizedName, str]:
    return pins(Path(release.requirements(device)).name)


@pytest.mark.parametrize(("release", "device"), SETS)
@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *EXTRAS["torchx"], *EXTRAS["tensorboard"]]
)
def test_a_set_has_all_that_the_package_names_within_its_caps(release, device, line):
    requirement = Requirement(line)
    version = set_of(release, device)[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize(
    "line",
    [line for extra in ("dev", "plots", "server", "sweep", "titles") for line in EXTRAS[extra]],
)
def test_the_development_set_has_its_extras_within_their_caps(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins("dev.txt")[canonicalize_name(requirement.name)])


def test_pyspark_is_pinned_within_its_caps():
    (requirement,) = map(Requirement, EXTRAS["spark"])
    assert requirement.specifier.contains(pins("spark.txt")[canonicalize_name(requirement.name)])


def test_every_dependency_has_a_cap():
    every = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    assert [line for line in every if not re.search(r"<\d", line)] == []


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.series)
def test_the_sets_differ_in_fbgemm_alone_and_are_the_doctors(release):
    cpu, cuda = set_of(release, "cpu"), set_of(release, "cuda")
    assert cpu.pop(CPU_FBGEMM) == cuda.pop(CUDA_FBGEMM) == release.fbgemm
    assert cpu == cuda == {**pins("base.txt"), "torch": release.torch, "torchrec": release.torchrec}


def test_there_is_no_set_but_those_of_the_releases():
    claimed = {release.requirements(device) for release in RELEASES for device in FBGEMM}
    beside = {"requirements/base.txt", "requirements/dev.txt", "requirements/spark.txt"}
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "requirements").iterdir()}
    assert found == claimed | beside
    assert PINNED.requirements("cpu") == "requirements/cpu.txt"  # what `make` installs


@pytest.mark.parametrize("name", ["torch", "torchrec"])
def test_the_caps_are_the_oldest_and_the_newest_release(name):
    (line,) = (line for line in PROJECT["dependencies"] if re.match(rf"{name}\W", line))
    oldest, newest = ([int(n) for n in getattr(RELEASES[at], name).split(".")] for at in (0, -1))
    first, after = f"{oldest[0]}.{oldest[1]}", f"{newest[0]}.{newest[1] + 1}"
    assert line == f"{name}>={first},<{after}"


@pytest.mark.parametrize("page", ["README.md", "docs/releases.md"])
def test_the_pages_claim_the_releases_that_the_doctor_knows(page):
    text = " ".join((ROOT / page).read_text().split())
    assert f"torch {RELEASES[0].series} to {RELEASES[-1].series}" in text


def test_the_table_has_every_row_that_is_claimed_and_no_cell_that_was_not_run_or_failed():
    rows = matrix.read_table()
    assert set(rows) == {combination.key for combination in matrix.combinations()}
    for cells in rows.values():
        *trained, tested = cells
        assert {*trained} == {"passed"}
        assert re.fullmatch(r"\d+ passed(, \d+ skipped)?", tested)


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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source distribution, in a folder of their own."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "torchrec_hilomoe"):
        (source / name).symlink_to(ROOT / name)
    build = "import setuptools.build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    result = run_command([sys.executable, "-c", build], cwd=source)
    assert result.returncode == 0, result.stderr
    return source / "dist"


def expected_files() -> set[str]:
    package = ROOT / "torchrec_hilomoe"
    sources = [*package.rglob("*.py"), *package.rglob("*.yaml"), package / "py.typed"]
    return {str(Path(source).relative_to(ROOT)) for source in sources}


def test_a_wheel_holds_every_module_every_recipe_and_the_type_marker(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected_files()


def test_a_source_distribution_holds_them_too_and_what_builds_them(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert expected_files() | {"pyproject.toml", "README.md", "LICENSE"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "apps/", "benchmarks/"))]


INJECT = """
import torch, torchrec_hilomoe as package
assert package.__file__.startswith({where!r}), package.__file__
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
assert package.inject_hilomoe(model, package.HiLoMoEConfig(), sites=("0",)) == ["0"]
model(torch.randn(5, 4)).sum().backward()
"""


@pytest.mark.parametrize("kind", ["whl", pytest.param("tar.gz", marks=pytest.mark.slow)])
def test_what_is_built_trains_prepares_and_injects_without_a_clone(built, kind, tmp_path):
    """In an environment of its own, beside the packages of this one, whose paths it is given."""
    home = tmp_path / "home"
    EnvBuilder(symlinks=True).create(home)
    (packages,) = home.glob("lib/python3*/site-packages")
    # What a .pth file in a folder that a .pth file names says, an editable install, is not heard.
    packages.joinpath("beside.pth").write_text("\n".join(site.getsitepackages()))

    def run(*command: str | Path) -> str:
        program = [home / "bin" / command[0], *command[1:]]
        result = run_command(program, cwd=tmp_path, env={"PYTHONPATH": ""})
        assert result.returncode == 0, result.stderr
        return result.stdout

    (file,) = built.glob(f"*.{kind}")
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    run("python", *pip, "--ignore-installed", "--no-build-isolation", file)
    run("python", "-c", INJECT.format(where=str(packages)))
    small = ["--train.max_steps=2", "--train.batch_size=8", "--data.train_rows=64"]
    run("torchrec-hilomoe", "train", *small, "--data.eval_rows=16", "--out_dir=run")
    assert (tmp_path / "run" / "summary.json").exists()
    raw = tmp_path / "raw"
    raw.mkdir()
    ratings = [f"1::{movie}::{1 + movie % 5}::{movie}" for movie in range(1, 21)]
    (raw / "ratings.dat").write_text("\n".join(ratings))
    (raw / "movies.dat").write_text("1::One (1999)::Drama\n2::Two (2000)::War\n")
    (raw / "users.dat").write_text("1::F::25::3::90210\n")
    run("python", "-m", "torchrec_hilomoe", "prepare", "movielens", "--raw=raw", "--out=data")
    assert (tmp_path / "data" / "schema.json").exists()
