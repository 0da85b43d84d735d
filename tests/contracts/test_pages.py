"""The documents refer to what there is: pages, headings, files, tests, and names of the code."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@cache
def headings(path: Path) -> frozenset[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)


@each_document
def test_what_a_document_links_to_exists(document):
    links = re.findall(r"\]\((?!https?://)([^)\s]+)", document.read_text())
    links += re.findall(r'src="(?!https?://)([^"]+)"', document.read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_readme_links_to_every_page(page):
    assert f"](docs/{page.name})" in README.read_text()


@each_document
def test_every_test_that_is_named_exists(document):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text()):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@each_document
def test_every_path_that_is_named_exists(document):
    rooms = "apps|benchmarks|docs|requirements|specs|tests|torchrec_hilomoe"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]+)`", document.read_text()):
        if not re.search("NAME|TABLE|BENCH", path):
            assert (ROOT / path).exists(), path


@cache
def source() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "torchrec_hilomoe").rglob("*.py")))


def test_the_glossary_explains_names_that_there_are():
    text = (ROOT / "docs" / "architecture.md").read_text()
    glossary = text[text.index("\n## Glossary") :]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", glossary, re.MULTILINE)
    names = {name for row in rows for cell in row for name in re.findall(r"`([\w.]+)`", cell)}
    assert len(names) > 10
    for name in names:
        assert re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", source()), name


def renamed_options() -> list[str]:
    """Old names of options in the changelog, but for those that the new one begins with."""
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Names that have changed")[2]
    rows = re.findall(r"^\| ([\w.\[\]]+) \| ([\w.\[\]]+)[^|]* \| option", table, re.MULTILINE)
    return [old for old, new in rows if not new.startswith(old)]


@each_document
def test_no_document_shows_an_old_name_of_an_option(document):
    old_names = renamed_options()
    assert len(old_names) > 5
    shown = set(re.findall(r"[\w\[\]]+(?:\.[\w\[\]]+)+", document.read_text()))
    assert not shown & set(old_names)
