"""The pictures of the documents: drawn by their script, readable on a phone, true to the tree."""

import importlib.util
import re

import pytest

from tests.helpers.processes import ROOT

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.image import imread  # noqa: E402

PHONE = 400  # dots
SMALLEST = 11  # dots of a text that is read without zooming


def script():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = script().FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_whole_and_large_enough_on_a_phone(name):
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert texts
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text.get_text()
        assert text.get_fontsize() / 72 * PHONE / figure.get_figwidth() >= SMALLEST


def test_the_folders_of_the_architecture_exist():
    texts = " ".join(text.get_text() for text in FIGURES["architecture"]().axes[0].texts)
    folders = re.findall(r"(\w+)/", texts)
    assert len(folders) == 6
    assert [name for name in folders if not (ROOT / "torchrec_hilomoe" / name).is_dir()] == []


def test_what_is_drawn_is_what_the_documents_show(tmp_path):
    drawn = script().draw_all(tmp_path)
    assert [file.stem for file in drawn] == list(FIGURES)
    for file in drawn:
        committed = imread(ROOT / "docs" / file.name)
        assert imread(file).shape == committed.shape
