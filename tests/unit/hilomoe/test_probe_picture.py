"""A probe's picture: nothing is cut off without saying so."""

import pytest

from torchrec_hilomoe.hilomoe import draw_probe, Gain, LayerChoice, ProbeReport
from torchrec_hilomoe.hilomoe.probe.picture import ARROW

NAMES = ("category", "history_category", "attributes")
VERDICT = (
    "experts should pay: route by category, history_category, attributes (predicted 0.007, 0.002, "
    "0.002 nats). Confirm it with a pair of runs."
)


def report_of(gains, sites):
    """A report of the same gains at each site, by name: the gain and the ends of its interval."""
    return ProbeReport(
        features=tuple(
            Gain(name=name, site=site, gain=gain, low=low, high=high)
            for name, (gain, low, high) in gains.items()
            for site in sites
        ),
        controls={},
        layers=tuple(LayerChoice(feature=name, gain=0.002, total=0.006) for name in gains),
        route_by=tuple((name,) for name in gains),
        pays=True,
        verdict=VERDICT,
        costs=(),
        not_judged={},
        fit_rows=102_400,
        held_out_rows=38_824,
    )


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a report, and return the figure as it was saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        return save(self, *args, **kwargs)

    def draw(report):
        draw_probe(report, tmp_path / "probe.png")
        (figure,) = saved
        FigureCanvasAgg(figure).draw()
        return figure

    monkeypatch.setattr(Figure, "savefig", keep)
    return draw


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_a_title_of_three_features_is_wrapped(drawn, sites):
    gains = dict.fromkeys(NAMES, (0.002, 0.001, 0.003))
    figure = drawn(report_of(gains, [f"model.head.{site}" for site in range(sites)]))
    (title,) = [text for text in figure.texts if text.get_text().startswith("experts should")]
    assert " ".join(title.get_text().split()) == f"{VERDICT.partition(' Confirm')[0]}"
    for text in figure.texts:
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width


def test_what_is_cut_at_the_end_of_the_axis_is_marked(drawn):
    gains = {
        "whole": (0.002, -0.0002, 0.003),
        "long": (0.001, -0.01, 0.003),
        "harm": (-0.02, -0.03, -0.01),
    }
    (axes,) = drawn(report_of(gains, ["up"])).axes
    marks = [line for line in axes.lines if line.get_marker() == ARROW]
    assert [mark.get_ydata()[0] for mark in marks] == [1, 2]
    assert {mark.get_xdata()[0] for mark in marks} == {axes.get_xlim()[0]}
    assert [text.get_text() for text in axes.texts] == ["20", "10", "-200"]


def test_what_rounds_to_nothing_has_no_sign(drawn):
    (axes,) = drawn(report_of({"little": (-1e-6, -2e-6, 1e-6)}, ["up"])).axes
    assert [text.get_text() for text in axes.texts] == ["0.0"]
