"""The README's three ways to begin, each run as it stands there.

What ``make train`` prints is pasted by the slow test here: with ``WRITE_README=1`` it writes some
lines of the run into the README, and without it compares their form.
"""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run_command

README = ROOT / "README.md"
DATA = ROOT / "docs" / "data.md"
OUTPUT = re.compile(r"(?<=^```console\n\$ make train\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
# Of the lines that the run prints, those that are shown, in this order.
SHOWN = (
    r"run .*: .*, \d+ ranks? on \w+",
    r"stage backbone_warmup: .*",
    r"test AUC .*",
    r"found: experts routed by .*",
    r"brought: \+.*",
)
WORDS = 900


def blocks(language: str, path: Path = README) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)


def shown_lines() -> list[str]:
    found = OUTPUT.search(README.read_text())
    assert found is not None
    return found[0].splitlines()


def form(line: str) -> str:
    """The line without what another machine, or another day, may change."""
    line = re.sub(r"(?<=routed by ).*(?=, predicted)", "FEATURES", line)
    return re.sub(r"[\d.,]+", "#", re.sub(r"runs/[\w.-]+|/tmp/[\w./-]+", "RUN", line))


def test_it_is_read_in_four_minutes():
    assert len(README.read_text().split()) <= WORDS


def test_lines_of_the_output_are_shown():
    lines = shown_lines()
    assert len(lines) == len(SHOWN)
    for line, pattern in zip(lines, SHOWN, strict=True):
        assert re.fullmatch(pattern, line)


@pytest.mark.slow
def test_make_train_prints_what_is_shown(tmp_path):
    command = [sys.executable, "apps/train.py", "--out_dir", str(tmp_path / "run")]
    result = run_command(command, timeout=1800.0)
    assert result.returncode == 0, result.stderr
    printed = [" ".join(line.split()) for line in (result.stdout + result.stderr).splitlines()]
    lines = [next(line for line in printed if re.fullmatch(p, line)) for p in SHOWN]
    if os.environ.get("WRITE_README"):
        text = "\n".join(lines).replace(str(tmp_path / "run"), "runs/bst-synthetic") + "\n"
        README.write_text(OUTPUT.sub(lambda _: text, README.read_text(), count=1))
    assert [form(line) for line in lines] == [form(line) for line in shown_lines()]


def test_ones_own_parquet_is_trained_on_from_a_clean_folder(tmp_path, monkeypatch):
    """The README's schema and commands; the rows are those that docs/data.md makes."""
    monkeypatch.chdir(tmp_path)
    rows, *_ = blocks("python", DATA)
    exec(compile(rows, "data.md", "exec"), {})
    (schema,) = blocks("yaml")
    assert len(schema.splitlines()) <= 12
    (tmp_path / "my_clicks.yaml").write_text(schema)
    (commands,) = [text for text in blocks("bash") if "apps/prepare.py" in text]
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "python"
        shorter = ["--train.max_steps", "4"] if words[0] == "apps/train.py" else []
        words[0] = str(ROOT / words[0])
        result = run_command([sys.executable, *words, *shorter], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()
    assert list((tmp_path / "runs" / "mine").glob("*.html"))


def test_the_schema_is_the_one_that_the_data_page_explains():
    (schema,) = blocks("yaml")
    assert schema in blocks("yaml", DATA)
