"""``docs/api.md`` says what the docstrings of the public names say, and its examples run."""

import doctest
import importlib.util
import inspect
import re

import pytest

from tests.helpers.processes import ROOT

PAGE = ROOT / "docs" / "api.md"


def script():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


API = script()
ENTRIES = re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]


def test_the_page_is_what_the_docstrings_say():
    assert PAGE.read_text() == API.page(), "run `make api`"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.split("\n", 1)[0])
def test_every_public_name_has_an_example(entry):
    assert "```pycon\n>>> " in entry or "\nThe module [" in entry


@pytest.mark.parametrize("module_name", API.MODULES)
def test_no_public_name_is_left_out(module_name):
    module = importlib.import_module(module_name)
    shown = {entry.split("\n", 1)[0] for entry in ENTRIES}
    assert set(module.__all__) <= shown


def test_the_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```pycon\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n\n".join(blocks)
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    told: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert outcome.failed == 0, "".join(told)
    assert outcome.attempted > len(ENTRIES)


def test_a_class_without_an_example_would_be_seen():
    class Silent:
        """Says nothing."""

    assert "pycon" not in API._entry("Silent", Silent)
    assert inspect.getdoc(Silent) in API._entry("Silent", Silent)
