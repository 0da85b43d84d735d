"""Train and test with every release of TorchRec that the doctor lists: ``make matrix``.

For each release and each Python that it is claimed for, an environment is built from the pinned
sets (and kept, in a folder that git ignores, until a set changes), and in it run: the doctor with
``--train``, 60 training steps in one process and on two ranks, 20 steps of each backbone, and the
unit and numeric tests. docs/releases.md gets a row of each combination.

    python -m tests.matrix                      all of it: hours, and some 7 GB for each environment
    python -m tests.matrix --only 2.11 2.14     some releases; the others' rows stay as they are
    python -m tests.matrix --checks steps       the columns whose titles contain a word

Only the standard library is imported: this runs where nothing is installed yet.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec_hilomoe.doctor import Release, RELEASES

__all__ = ["CHECKS", "Combination", "combinations", "main", "read_table", "write_table"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "releases.md"
HEADER = "| torch / fbgemm / torchrec | Python | "
BACKBONES = ("bst", "dcn", "dien", "din", "dlrm", "interformer", "transact")
TRAIN = ("apps/train.py", "--train.device=cpu", "--data.eval_rows=8192")
TRAIN += ("--model.hilomoe.routing=row", "--model.hilomoe.route_by=null")  # experts from the start
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PYTEST = ("-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider")
PYTEST += ("--numprocesses=2", "--dist=loadfile")

# Title to the commands, as arguments of the environment's python; OUT is an empty folder.
CHECKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "`doctor --train`": (("-m", "torchrec_hilomoe.doctor", "--train"),),
    "60 steps": ((*TRAIN, "--train.max_steps=60", "--out_dir=OUT"),),
    "60 steps, 2 ranks": ((*RANKS, *TRAIN, "--train.max_steps=60", "--out_dir=OUT"),),
    "7 backbones, 20 steps": tuple(
        (*TRAIN, "--train.max_steps=20", f"--model.backbone={name}", f"--out_dir=OUT/{name}")
        for name in BACKBONES
    ),
    "unit and numeric tests": (
        (*PYTEST, "tests/unit", "tests/numerics", "tests/contracts/test_foreign_names.py"),
    ),
}
NOT_RUN = "not run"
TESTS_CLOSE = re.compile(r"(?:\d+ (?:failed|passed|skipped|errors?|xfailed)(?:, )?)+")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A release on a Python.

    Attributes:
        release: As the doctor lists it.
        python: ``3.12``.
    """

    release: Release
    python: str

    @property
    def key(self) -> tuple[str, str]:
        """The first two cells of its row."""
        release = self.release
        return f"{release.torch} / {release.fbgemm} / {release.torchrec}", self.python

    def __str__(self) -> str:
        return f"torch-{self.release.series}-python-{self.python}"


def combinations() -> Iterator[Combination]:
    """List all that the doctor claims."""
    for release in RELEASES:
        for python in release.python:
            yield Combination(release=release, python=python)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; return 0 if everything passed, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="SERIES", help="releases, such as 2.11")
    parser.add_argument("--on", nargs="+", metavar="VERSION", help="Pythons, such as 3.12")
    parser.add_argument("--checks", nargs="+", default=[""], help="words of columns; default: all")
    parser.add_argument("--index", help="the index that torch comes from; default: pip's own")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="environments, logs")
    args = parser.parse_args(argv)
    failed = False
    for combination in combinations():
        if args.only and combination.release.series not in args.only:
            continue
        if args.on and combination.python not in args.on:
            continue
        python = build(combination, args.folder, args.index)
        cells = read_table().get(combination.key, [NOT_RUN] * len(CHECKS))
        for column, title in enumerate(CHECKS):
            if any(word in title for word in args.checks):
                cells[column] = check(title, combination, python, args.folder)
                write_table({**read_table(), combination.key: cells})
        failed = failed or any(cell.startswith("failed") or " failed" in cell for cell in cells)
        sys.stdout.write(
            f"{combination}: {'; '.join(map(': '.join, zip(CHECKS, cells, strict=True)))}\n"
        )
        sys.stdout.flush()
    return int(failed)


def build(combination: Combination, folder: Path, index: str | None) -> Path:
    """Make the environment, unless it is there and of the sets as they are; return its python."""
    home, release = folder / str(combination), combination.release
    python, stamp = home / "bin" / "python", home / "installed"
    sets = [ROOT / release.requirements("cpu"), *(ROOT / "requirements").glob("[bd]*.txt")]
    sets.append(ROOT / "pyproject.toml")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sets))).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if not python.exists():
        run([interpreter(combination.python), "-m", "venv", str(home)])
    # A CUDA build's libraries are dependencies of torch; a CPU index has none.
    source = ["--no-deps", "--index-url", index] if index else []
    run([*pip, *source, f"torch=={release.torch}"])
    run([*pip, "--no-deps", "-r", str(sets[0])])
    development = (ROOT / "requirements" / "dev.txt").read_text()
    if any(home.glob("lib/python*/site-packages/triton")):  # torch's own, of its own version
        development = re.sub(r"(?m)^triton==.*$", "", development)
    rest = home / "dev.txt"
    rest.write_text(development)
    run([*pip, "--no-deps", "-r", str(rest)])
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    stamp.write_text(digest)
    return python


def interpreter(version: str) -> str:
    """Find Python ``version``: on the path, as the one that runs this, or among pyenv's.

    Raises:
        SystemExit: If there is none.
    """
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    installed = sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))
    for name in (f"python{version}", sys.executable, *installed):
        try:
            found = subprocess.run([name, "-c", show], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if found.stdout.strip() == version:
            return name
    raise SystemExit(f"Python {version} is needed, and python{version} is not on the path.")


def check(title: str, combination: Combination, python: Path, folder: Path) -> str:
    """Run one cell of the table, and return what is written there."""
    logs = folder / "logs" / str(combination)
    out = logs / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{time.time_ns()}"
    out.mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    text = ""
    for number, command in enumerate(CHECKS[title]):
        words = [word.replace("OUT", str(out)) for word in command]
        done = subprocess.run(
            [str(python), *words],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        text = done.stdout
        (out / f"{number}.log").write_text(text)
        counts = TESTS_CLOSE.findall(text) if "pytest" in command else []
        if counts:
            return counts[-1].rstrip(", ")
        if done.returncode:
            last = (text.strip() or "nothing was said").splitlines()[-1]
            return f"failed: {last[:120]}".replace("|", "/")
    return "passed"


def run(command: Sequence[str]) -> None:
    """Run a step of an installation, or end with its failure."""
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command)}")


def read_table() -> dict[tuple[str, str], list[str]]:
    """The rows of the page: what ran, by release and Python."""
    lines = PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(HEADER))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, second, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first, second] = cells
    return rows


def write_table(rows: dict[tuple[str, str], list[str]]) -> None:
    """Put rows of combinations that are claimed into the page, in the doctor's order."""
    keys = [combination.key for combination in combinations()]
    titles = HEADER + " | ".join(CHECKS) + " |"
    ruler = "|" + "---|" * (2 + len(CHECKS))
    table = [titles, ruler]
    table += [f"| {' | '.join([*key, *rows[key]])} |" for key in keys if key in rows]
    text = re.sub(r"\| torch / fbgemm.*\n(\|.*\n)*", "\n".join(table) + "\n", PAGE.read_text())
    PAGE.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
