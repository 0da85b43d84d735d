"""What a run wrote is read back as what it must be, or refused in one line that names the file."""

import json

import pytest

from torchrec_hilomoe.runtime.documents import DocumentError
from torchrec_hilomoe.training.log.reading import (
    lines_before,
    read_metrics,
    read_routing,
    read_summary,
)

LINE = {"step": 1, "stage": "a", "split": "train"}
LOAD = {"step": 2, "layer": 1, "load": [0.5, 0.5], "entropy": 1.0, "site": "head.0"}
ODD = ["", "[]", "null", "3", '{"test": NaN}', '{"test": ', "[" * 5000, "\xff"]


def write(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")


@pytest.mark.parametrize("text", [*ODD, '{"test": 5}', '{"test": {"auc": "x"}}', '{"flops": [1]}'])
def test_a_summary_is_whole_or_told(tmp_path, text):
    assert read_summary(tmp_path) == {}
    write(tmp_path, "summary.json", text)
    with pytest.raises(DocumentError, match=r"^/.*/summary\.json .*\. Remove it, and run") as told:
        read_summary(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", [*ODD, "{}", '{"step": 1, "stage": "a", "split": 1}'])
def test_a_line_of_metrics_is_one_or_told(tmp_path, text):
    write(tmp_path, "metrics.jsonl", f"{json.dumps(LINE)}\n{text}\n")
    with pytest.raises(DocumentError, match=r"^/.*/metrics\.jsonl.*\. Take out what is no line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"step": 1}, {"load": [1.0]}, {"load": []}, {"load": 3}, {"entropy": None}, {"layer": "1"}],
)
def test_a_line_of_routing_follows_those_before_or_is_told(tmp_path, change):
    lines = [LOAD, {**LOAD, **change}]
    write(tmp_path, "routing.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DocumentError, match=r"routing\.jsonl, line 2, .*\. (Take out|Remove)"):
        read_routing(tmp_path)


def test_a_router_of_an_earlier_release_is_named(tmp_path):
    write(tmp_path, "routing.jsonl", json.dumps(LOAD) + "\n")
    assert read_routing(tmp_path)[0]["router"] == "head.0"


@pytest.mark.parametrize("text", [*ODD, "{}", '{"step": "1", "split": "train", "stage": "a"}'])
def test_a_run_that_goes_on_drops_what_is_no_line(text):
    lines = [json.dumps({**LINE, "step": step}) for step in (1, 2)]
    assert lines_before("\n".join([lines[0], text, lines[1]]), 1) == lines[:1]
