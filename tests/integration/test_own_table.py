"""The ten minutes of docs/data.md, as written there: from a table to a model and its report."""

import json
import re
import shlex

import pytest

from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.runs import run_app_here
from tests.integration.test_tools import use

SECTION = "### A table without histories, in ten minutes"


def blocks() -> dict[str, str]:
    """The blocks of the section, by language."""
    section = (ROOT / "docs" / "data.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    return {
        match[1]: match[2] for match in re.finditer(r"```(\w+)\n(.*?)^```", section, re.M | re.S)
    }


@pytest.mark.slow
def test_the_page_s_commands_lead_from_a_table_to_a_report(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shown = blocks()
    exec(compile(shown["python"], "data.md", "exec"), {})
    for line in shown["bash"].splitlines():
        _, app, *words = shlex.split(line, comments=True)
        name = app.removeprefix("apps/").removesuffix(".py")
        if name == "train":
            argv = [*words, "--train.max_steps=20", "--train.device=cpu"]
            (ended,) = run_ranks(run_app_here, 1, argv, joined=False)
            code, said = ended.code, ended.shown
        else:
            code, said = use(name, *words)
        assert code == 0, f"{line}\n{said}"
    draft = (tmp_path / "shop.yaml").read_text()
    assert draft.partition("dataset:")[2] == shown["yaml"].partition("dataset:")[2]
    assert json.loads((tmp_path / "runs/shop/summary.json").read_text())["test"]["rows"] > 0
    assert "DLRM with experts on shop" in (tmp_path / "runs/shop/report.html").read_text()
