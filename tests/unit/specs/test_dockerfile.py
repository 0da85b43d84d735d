"""The image: what it copies is there, it installs the CUDA set, and it does not run as root."""

import re

import pytest

from tests.helpers.processes import ROOT

LINES = (ROOT / "specs" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def instructions(name):
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{name} ")]


def copied():
    return [word for line in instructions("COPY") for word in line.split()[:-1] if word[0] != "-"]


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_is_not_ignored(path):
    assert (ROOT / path).exists()
    assert path not in IGNORED


def test_everything_that_runs_is_copied():
    needed = {"apps", "benchmarks", "specs", "torchrec_hilomoe", "pyproject.toml", ".torchxconfig"}
    assert needed <= set(copied())


def test_it_installs_as_the_pinned_set_says():
    said = re.findall(
        r"^#     pip install (.*)$", (ROOT / "requirements/cuda.txt").read_text(), re.M
    )
    assert said == ["torch==2.13.0", "--no-deps -r requirements/cuda.txt"]
    run = " ".join(instructions("RUN"))
    assert "pip install \"$(grep '^torch==' requirements/cuda.txt)\"" in run
    assert "pip install --no-deps --requirement requirements/cuda.txt" in run
    assert "pip check" in run


def test_what_runs_is_nobody_special():
    (user,) = instructions("USER")
    assert user == "trainer"
    last = max(number for number, line in enumerate(LINES) if line.startswith(("RUN ", "COPY ")))
    assert LINES.index(f"USER {user}") > last


def test_the_base_is_named_with_its_version():
    (base,) = instructions("FROM")
    assert re.fullmatch(r"python:3\.11-slim-\w+", base)


def test_copies_of_the_workspace_leave_the_same_out():
    assert (ROOT / ".torchxignore").read_text() == (ROOT / ".dockerignore").read_text()
    assert {".venv", ".git", "runs"} <= set(IGNORED)
