"""Pictures of a routing report, and the error where matplotlib is missing."""

import sys

import pytest
import torch
from torch import nn

from torchrec_hilomoe.hilomoe import (
    draw_routing,
    HiLoMoEConfig,
    inject_hilomoe,
    record_routing,
    routing_report,
    RoutingReport,
)
from torchrec_hilomoe.hilomoe.plots import _draw_paths


@pytest.fixture
def report() -> RoutingReport:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=3, num_experts=4), sites=["*"])
    with record_routing(model):
        model(torch.randn(64, 6))
    return routing_report(model)


def test_draws_one_picture_a_site(report, tmp_path):
    pytest.importorskip("matplotlib")
    files = draw_routing(report, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["routing-0.png", "routing-2.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_draws_a_line_for_each_transition_in_use(report):
    matplotlib = pytest.importorskip("matplotlib.figure")
    site, axes = report.sites[0], matplotlib.Figure().subplots()
    _draw_paths(axes, site)
    (lines, _, _, _) = axes.collections  # and the experts of three layers
    used = [share for flow in site.transitions for row in flow for share in row if share > 0]
    assert len(lines.get_segments()) == len(lines.get_linewidths()) == len(used)
    assert sorted(lines.get_linewidths()) == pytest.approx([0.3 + 12 * s for s in sorted(used)])


def test_names_the_extra(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrec-hilomoe\[plots\]'"):
        draw_routing(report, tmp_path)
