"""What benchmarks share: who took how long, whether that can be concluded from, whole lines."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import harness
from benchmarks.harness import append, environment, measure, read_lines
from torchrec_hilomoe.runtime.checkout import commit_of


@pytest.fixture
def clock(monkeypatch):
    """A clock that contenders advance, so that a noisy machine can be had at will."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def taking(clock, *seconds):
    """A contender that takes so long, call after call."""
    times = iter(seconds)

    def call():
        clock.seconds += next(times)

    return call


STEADY = [1.0] * 6  # one call warms up
WIDE = [1.0, 1.0, 2.0, 1.0, 2.0, 4.0]


def test_a_steady_machine_is_concluded_from(clock, capsys):
    found = measure({"one": taking(clock, *STEADY), "two": taking(clock, *STEADY)}, 0.0, "cpu")
    assert {it.conclusive for it in found.values()} == {True}
    assert found["two"].ratio == 1.0
    assert capsys.readouterr().err == ""


def test_a_wide_spread_is_said_and_recorded(clock, capsys):
    found = measure({"one": taking(clock, *STEADY), "two": taking(clock, *WIDE)}, 0.0, "cpu")
    assert (found["one"].conclusive, found["two"].conclusive) == (True, False)
    said = capsys.readouterr().err
    assert "two: spread" in said
    assert "too wide to conclude" in said
    assert "one: spread" not in said


def test_a_ratio_is_concluded_from_where_all_slow_down_alike(clock):
    found = measure({"one": taking(clock, *WIDE), "two": taking(clock, *WIDE)}, 0.0, "cpu")
    assert (found["one"].conclusive, found["two"].conclusive) == (False, True)


def test_ranks_make_as_many_rounds_as_they_agree_on(clock):
    wishes = []

    def agree(wish):
        wishes.append(wish)
        return len(wishes) <= 7

    measure({"one": taking(clock, *[1.0] * 8)}, 100.0, "cpu", agree=agree)
    assert wishes == [True] * 8


def test_a_line_that_an_ended_process_left_unfinished_is_no_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    append(path, [{"a": 1}, {"a": 2}])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        before = [{"a": 1}] * (cut >= len(whole) // 2)
        assert read_lines(path) == before
        append(path, [{"a": 3}])
        assert read_lines(path) == [*before, {"a": 3}]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    append(path, [{"a": 1}])
    append(path, [{"a": 2}, {"a": 3}])
    assert [json.loads(text)["a"] for text in path.read_text().splitlines()] == [1, 2, 3]


def test_a_line_says_what_measured_it():
    assert {"commit", "torch", "torchrec", "fbgemm", "device", "threads"} <= set(environment("cpu"))
    assert "none" not in (environment("cpu")["fbgemm"], environment("cpu")["torchrec"])


def test_a_commit_is_marked_where_the_code_is_another(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", tmp_path, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit_of(tmp_path) == "none"
    git("init", "-q")
    (tmp_path / "benchmarks").mkdir()
    code, record = tmp_path / "benchmarks" / "a.py", tmp_path / "benchmarks" / "a.jsonl"
    code.write_text("1\n")
    record.write_text("{}\n")
    git("add", ".")
    git("commit", "-qm", "Begin")
    commit = git("rev-parse", "--short", "HEAD")
    record.write_text("{}\n{}\n")  # what is recorded changes nothing that is measured
    assert commit_of(tmp_path) == commit
    code.write_text("2\n")
    assert commit_of(tmp_path) == f"{commit}-dirty"
