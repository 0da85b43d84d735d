"""Two result files side by side: what is paired, what is noise, what is refused."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import compare, main, table
from tests.helpers.processes import ROOT
from tests.helpers.rounding import rounded

MACHINE = {"device": "one CPU", "threads": 2, "torch": "2.13.0"}


def line(samples, *, batch=64, spread=0.02, commit="aaa1111", **others):
    case = {"bench": "train_throughput", "batch_size": batch, "options": "", "world_size": 1}
    figures = {"samples_per_second": samples, "spread": spread, "conclusive": spread <= 0.1}
    return {**case, **figures, "steps": 17, "commit": commit, **MACHINE, **others}


def write(path, *lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (line(1000.0), line(1100.0), "better"),
        (line(1000.0), line(900.0), "worse"),
        (line(1000.0), line(1025.0), "within noise"),
        (line(1000.0, spread=0.2), line(5000.0), "spread too wide to conclude"),
        (line(1000.0), line(5000.0, spread=0.2), "spread too wide to conclude"),
    ],
)
def test_a_change_counts_beyond_the_noise_of_both_sides(before, after, verdict):
    (found,) = compare([before], [after])
    assert found.ratio == after["samples_per_second"] / before["samples_per_second"]
    assert found.verdict == verdict


def test_less_time_is_better():
    slow = {"provider": "site", "median_us": 200.0, "iqr_us": 2.0, "ratio": 1.5, "ratio_iqr": 0.01}
    fast = slow | {"median_us": 100.0}
    (found,) = compare([slow | MACHINE], [fast | MACHINE])
    assert (found.figure, found.verdict) == ("median_us", "better")
    (found,) = compare([slow | MACHINE], [fast | MACHINE], figure="ratio")
    assert found.verdict == "within noise"


def test_cases_are_paired_by_what_is_no_figure():
    before = [line(1000.0, batch=64), line(3000.0, batch=256)]
    after = [line(3300.0, batch=256, steps=99), line(1000.0, batch=64), line(1.0, batch=1024)]
    found = {it.case["batch_size"]: it.ratio for it in compare(before, after)}
    assert found == {64: 1.0, 256: 1.1}


def test_lines_of_a_case_are_pooled_and_their_range_is_noise():
    before = [line(value, spread=0.01) for value in (960.0, 1000.0, 1040.0)]
    (found,) = compare(before, [line(1050.0, spread=0.01)])
    assert found.before.value == 1000.0
    assert found.before.lines == 3
    assert found.before.noise == rounded(0.08, scale=1)
    assert found.verdict == "within noise"
    (alone,) = compare(before[1:2], [line(1050.0, spread=0.01)])
    assert alone.verdict == "better"


def test_a_figure_without_a_spread_is_not_judged():
    before, after = ({"case": "save", "save_ms": value} | MACHINE for value in (1.0, 2.0))
    (found,) = compare([before], [after], figure="save_ms")
    assert found.verdict == "no spread recorded"


def test_figures_of_a_group_are_named_with_a_dot():
    before = line(1000.0, phase_ms={"lookup": 4.0, "forward": 1.0})
    after = line(1000.0, phase_ms={"lookup": 3.0, "forward": 1.0})
    (found,) = compare([before], [after], figure="phase_ms.lookup")
    assert (found.ratio, found.verdict) == (0.75, "better")


@pytest.mark.parametrize("other", [{"threads": 1}, {"device": "another CPU"}])
def test_other_machines_are_refused_unless_forced(other, tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", line(1000.0))
    two = write(tmp_path / "b.jsonl", line(2000.0, **other))
    assert main([one, two]) == 2
    message = capsys.readouterr().err
    assert "one CPU with 2 threads against" in message
    assert "or give --force" in message
    assert main([one, two, "--force"]) == 0
    assert "| 2.000 |" in capsys.readouterr().out


def test_the_same_case_on_two_machines_is_paired_on_each():
    lines = [line(1000.0), line(600.0, threads=1)]
    found = compare(lines, lines)
    assert [it.ratio for it in found] == [1.0, 1.0]
    assert "with 1 threads" in table(found)


def test_two_commits_of_one_file(tmp_path, capsys):
    mixed = [
        line(1000.0, commit="aaa1111"),
        line(1500.0, commit="bbb2222"),
        line(9.0, commit="bbb2222-dirty"),
    ]
    path = write(tmp_path / "all.jsonl", *mixed)
    assert main([path, "--commits", "aaa", "bbb"]) == 0
    assert "| 1.500 |" in capsys.readouterr().out
    assert main([path, "--commits", "aaa", "ccc"]) == 2
    assert "'ccc' is 0 of the commits" in capsys.readouterr().err


def test_without_commits_the_last_one_of_each_case_counts(tmp_path, capsys):
    before = write(tmp_path / "a.jsonl", line(500.0), line(1000.0, commit="bbb2222"))
    after = write(tmp_path / "b.jsonl", line(1200.0))
    assert main([before, after]) == 0
    assert "| 1.200 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no line"), ('{"a": 1}\n{"b": \n', "line 2: no JSON"), ('{"a": 1}\n', "no case")],
)
def test_what_cannot_be_compared_is_said(text, message, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert main([str(path), str(path)]) == 2
    assert message in capsys.readouterr().err


def test_one_file_needs_commits(tmp_path, capsys):
    assert main([write(tmp_path / "a.jsonl", line(1.0))]) == 2
    assert "--commits BEFORE AFTER" in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


NO_SPEED = ("first_light", "probes", "probes_low_rates", "routers")
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))


@pytest.mark.parametrize(
    "path",
    [path for path in RECORDS if path.stem not in NO_SPEED],
    ids=lambda path: path.stem,
)
def test_every_record_equals_itself(path: Path):
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    found = compare(lines, lines)
    assert {it.ratio for it in found} == {1.0}
    assert not {it.verdict for it in found} & {"better", "worse"}
