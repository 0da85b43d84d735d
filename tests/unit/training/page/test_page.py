"""The page of a run: everything is in it, it asks for nothing, and its pictures are pictures."""

import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import pytest

from torchrec_hilomoe.training.page import pictures, write_page
from torchrec_hilomoe.training.page.files import Band, read_run

pytest.importorskip("matplotlib")

STAGES = {5: "backbone_warmup", 10: "backbone_warmup", 12: "expert_warmup[1]", 20: "finetune"}
PNG = b"\x89PNG\r\n"


@pytest.fixture
def run(tmp_path):
    """The files of a run that has ended, with a site of two layers."""
    lines = []
    for step, stage in STAGES.items():
        where = {"step": step, "stage": stage}
        quality = {"logloss": 1 / step, "auc": step / 40, "gauc": None}
        lines.append({**where, "split": "train", **quality, "samples_per_second": 100.0 * step})
        if step % 10 == 0:
            lines.append({**where, "split": "valid", **quality})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    routing = [
        {"step": step, "stage": "x", "router": "head.<0>", "layer": layer, "load": [0.25, 0.75]}
        for step in (12, 20)
        for layer in (1, 2)
        if (step, layer) != (12, 2)
    ]
    lines = [json.dumps({**row, "entropy": 0.8}) + "\n" for row in routing]
    (tmp_path / "routing.jsonl").write_text("".join(lines) + '{"step": 2')
    summary = {
        "recipe": "bst-<test>",
        "test": {"auc": 0.71234, "gauc": None, "logloss": 0.4},
        "best_auc": 0.9,
        "parameters": {"tables": 12_345, "head": 67, "total": 12_412},
        "flops": {"tables": 0, "head": 890, "total": 890},
        "lookup_bytes": 321,
        "steps": 20,
        "world_size": 2,
        "device": "cpu",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    config = "seed: 7\nmodel: {backbone: din}\ndata: {path: some/where/my-<set>}\n"
    (tmp_path / "config.yaml").write_text(config)
    return tmp_path


class Tags(HTMLParser):
    """Collects what is open, what was opened, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_the_run_and_needs_no_network(run):
    page = write_page(run)
    assert page == run / "report.html"
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    for shown in ("bst-<test>", "0.7123", "12,345", "890", "321 bytes", "seed: 7", "2 ranks"):
        assert shown in tags.text
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    assert {tag for tag, _ in tags.seen} & {"script", "link", "iframe"} == set()
    pictures = [attrs["src"] for tag, attrs in tags.seen if tag == "img"]
    assert len(pictures) == 4  # three metrics and a site
    for picture in pictures:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert b64decode(data).startswith(PNG)


def test_the_headline_names_the_backbone_and_the_data(run):
    """A recipe's name need not: with other options it is another model on other data."""
    assert "<h1>DIN with experts on my-&lt;set&gt;</h1>" in write_page(run).read_text()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "dataset": "clicks"}))
    (run / "routing.jsonl").unlink()
    assert "<h1>DIN on clicks</h1>" in write_page(run).read_text()


def test_a_single_validation_is_seen_whole(run):
    """It is at the edge, where half of its mark would be cut off."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] == "train" or line["step"] == 20]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    picture = imread(BytesIO(pictures.curves(read_run(run))["logloss"]))
    red = abs(picture[..., :3] - to_rgb(pictures.COLORS["valid"])).max(axis=2) < 0.02
    columns = red.any(axis=0).nonzero()[0]
    gaps = (columns[1:] - columns[:-1] > 1).nonzero()[0]
    mark = columns[gaps[-1] + 1 :]  # the last of what is red: left of it is the legend
    assert len(mark) > 10


def test_a_stage_lasts_from_the_end_of_the_one_before_to_its_last_line(run):
    assert read_run(run).bands() == [
        Band(stage="backbone_warmup", start=0, stop=10),
        Band(stage="expert_warmup[1]", start=10, stop=12),
        Band(stage="finetune", start=12, stop=20),
    ]


def test_a_run_that_has_not_ended_has_a_page_too(run):
    (run / "summary.json").unlink()
    (run / "routing.jsonl").unlink()
    assert "not finished; step 20 so far" in write_page(run).read_text()


def test_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no run in .*metrics\.jsonl is missing\. Give the --out"):
        write_page(tmp_path)
