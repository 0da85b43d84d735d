"""What the documents show, runs: their Python is executed, their commands are checked.

Commands would install, train and download, so they are not executed: the files, targets, modules,
extras and flags that they name must exist.
"""

import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache

import pytest
from torch import distributed as dist

from tests.helpers.processes import ROOT, torchrun_environment
from tests.helpers.torchx_jobs import render, SCHEDULERS
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.runtime.launch_args import drop_launcher_residue

TEXTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [path for path in TEXTS if path.name != "CHANGELOG.md"]
TRAIN = "apps/train.py"
SPARK = "examples/prepare_spark.py"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a document, and where it stands."""

    place: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """The blocks of all documents that are in one of these languages."""
    found = []
    for path in DOCUMENTS:
        document = path.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL):
            line = document.count("\n", 0, match.start()) + 1
            place = f"{path.name}:{line}"
            found.append(Block(place=place, language=match[1], text=match[2]))
    return [block for block in found if block.language in languages]


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the shell blocks and of the running text, in words, and where it stands."""
    lines = []
    for block in blocks("bash", "sh", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language != "console" or line.startswith("$ "):  # the rest is output
                lines.append((block.place, line.removeprefix("$ ")))
    for path in DOCUMENTS:
        for inline in re.findall(rf"`((?:{'|'.join(CHECKS)}) [^`]+)`", path.read_text()):
            lines.append((path.name, inline))
    found = []
    for place, line in dict.fromkeys(lines):
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]  # a variable set for the command
            if words:
                found.append((f"{place} {' '.join(words)}", words))
    return found


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable:
            assert re.search(rf"\$[({{]{name}\b", (ROOT / "Makefile").read_text()), name
        else:
            assert word in targets
        if name == "ARGS" and "train" in words:
            parse_run(shlex.split(value))


def check_python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        if words[1] == "venv":
            return
        assert importlib.util.find_spec(words[1]), words[1]
        check_flags(["-m", words[1]], words[2:])
    elif words[0] == TRAIN and "--help" not in words:
        parse_run(words[1:])
    elif words[0] == SPARK:  # which imports PySpark, that the development set lacks
        source = (ROOT / SPARK).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    else:
        assert (ROOT / words[0]).is_file()
        positional = [word for word in words[1:2] if not word.startswith("-")]
        check_flags([words[0], *positional], words[1:])


def check_flags(program: Sequence[str], words: Sequence[str]) -> None:
    """Every ``--flag`` is one that the program's help names."""
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert not flags - help_flags(tuple(program))


@cache
def help_flags(program: Sequence[str]) -> set[str]:
    """The flags of a program's help, printed in this process: it has torch imported already."""
    path, *rest = program[1:] if program[0] == "-m" else program
    run = runpy.run_module if program[0] == "-m" else runpy.run_path
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as shown,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
        patch.setattr(sys, "argv", [path, *rest, "--help"])
        try:
            run(path, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        else:
            code = 0  # it has no options
    assert not code
    return set(re.findall(r"--[\w.-]+", shown.getvalue()))


def check_torchx(words: Sequence[str]) -> None:
    if words[0] != "run":
        assert words[0] in ("cancel", "log", "status")
        assert "://" in words[1]
        return
    if "dist.ddp" in words:
        assert words[:4] == ["run", "-s", "local_cwd", "dist.ddp"]
        assert re.fullmatch(r"\d+x\d+", words[words.index("-j") + 1])
        arguments = words[words.index(TRAIN) :]
        parse_run(drop_launcher_residue(arguments, str(ROOT / TRAIN)))
        return
    (component,) = [word for word in words if word.startswith("specs/")]
    path, _, name = component.partition(":")
    assert path == f"specs/{name}.py"
    assert words[words.index("-s") + 1] in SCHEDULERS
    rendered = render("local_cwd", name, *words[words.index(component) + 1 :])
    if name == "train":
        line = shlex.split(rendered.command[-1])
        parse_run(line[line.index(TRAIN) + 1 :])


def check_pip(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sets = (ROOT / "requirements").glob("c*.txt")
    pins = [line for path in sets for line in path.read_text().splitlines()]
    assert [word for word in words if "==" in word and word not in pins] == []
    for before, word in zip(words, words[1:], strict=False):
        if before in ("-r", "--requirement"):
            assert (ROOT / word).is_file()
        extras = re.fullmatch(r"(?:\.|torchrec-hilomoe)\[(.*)\]", word)
        for extra in extras[1].split(",") if extras else []:
            assert extra in project["optional-dependencies"]


def check_srun(words: Sequence[str]) -> None:
    """Slurm's own options come first, then the command."""
    rest = [word for word in words if not re.match(r"--gpus=\d", word)]
    CHECKS[rest[0]](rest[1:])


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3.11": check_python,
    "srun": check_srun,
    "torchx": check_torchx,
}
OF_THE_SYSTEM = {"cd", "docker", "git", "kubectl", "source", "tail", "tensorboard"}


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in torchrun_environment(rank=0, ranks=1, port=store.port).items():
        monkeypatch.setenv(name, value)
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("place", "words"), [pytest.param(*c, id=c[0]) for c in commands()])
def test_command_is_one_that_works(place, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] not in OF_THE_SYSTEM:
        assert words[0] in CHECKS, f"{place}: no check for {words[0]!r}; add one"
        CHECKS[words[0]](words[1:])


def test_the_readme_shows_the_two_commands_and_some_python():
    shown = [" ".join(words) for _, words in commands()]
    assert "make train" in shown
    assert "torchx run -s local_cwd dist.ddp -j 1x8 apps/train.py" in shown
    assert any(block.place.startswith("README.md") for block in blocks("python"))
