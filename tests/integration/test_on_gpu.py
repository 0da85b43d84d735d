"""The script for a GPU, rehearsed on a CPU: what it leaves, and that no case costs another."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.cases import Case, Lines, run_cases
from benchmarks.gpu.table import table
from benchmarks.harness import read_lines
from benchmarks.on_gpu import PARTS
from tests.helpers.processes import ROOT, run_command

FAST = ("ceilings", "sharded")
BLOCKED = """
import sys
import time
from pathlib import Path
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchrec", "fbgemm_gpu", "jsonargparse", "tensordict"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
"""


def rehearse(out, *options, minutes=4.0):
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--out", out]
    command += ["--minutes", str(minutes), "--processes", "2", *options]
    return run_command(command, timeout=60 * minutes + 30)


def test_rehearsed_it_leaves_a_line_for_every_case(tmp_path):
    out = tmp_path / "lines.jsonl"
    ended = rehearse(out, "--only", *FAST)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = read_lines(out)
    assert {line["part"] for line in lines} == set(FAST)
    assert {line["status"] for line in lines} == {"ok"}
    assert all({"commit", "torch", "device", "say"} <= line.keys() for line in lines)
    assert "bags rowwise_adagrad fused: as exact as by hand" in ended.stdout
    again = rehearse(out, "--only", *FAST, "--resume")
    assert again.returncode == 0
    assert read_lines(out) == lines


@pytest.mark.slow
def test_rehearsed_in_full_nothing_fails(tmp_path):
    out = tmp_path / "lines.jsonl"
    ended = rehearse(out, minutes=25)  # it takes five, where nothing else runs
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = read_lines(out)
    assert {line["part"] for line in lines} == set(PARTS)
    assert {line["status"] for line in lines} == {"ok"}


def test_time_that_is_up_is_told(tmp_path):
    out = tmp_path / "lines.jsonl"
    assert rehearse(out, "--only", "ceilings", minutes=0.001).returncode == 0
    assert {line["status"] for line in read_lines(out)} == {"left out"}


@pytest.mark.slow
def test_what_runs_at_the_end_of_the_time_is_ended_and_told(tmp_path):
    out = tmp_path / "lines.jsonl"
    assert rehearse(out, "--only", "training", minutes=0.15).returncode == 0
    assert {line["status"] for line in read_lines(out)} == {"left out"}


def test_parts_of_a_site_alone_need_no_torchrec():
    modules = ["ceilings", "sites", "speed"]
    imports = "; ".join(f"import benchmarks.gpu.{name}" for name in modules)
    ended = run_command([sys.executable, "-c", f"{BLOCKED}\n{imports}; import benchmarks.on_gpu"])
    assert ended.returncode == 0, ended.stderr


def test_a_case_that_fails_is_a_line_and_the_next_one_runs(tmp_path):
    def fail():
        raise KeyError("what")

    out, attempts = tmp_path / "lines.jsonl", tmp_path / "attempts"
    cases = [Case(name="first", run=fail), Case(name="second", run=lambda: {"say": "fine"})]
    lines = Lines(out, {"commit": "abc"})
    everything = {"lines": lines, "attempts": attempts, "device": "cpu"}
    run_cases("part", cases, deadline=float("inf"), **everything)
    first, second = read_lines(out)
    assert (first["status"], second["status"]) == ("failed", "ok")
    assert first["traceback"][-1] == "KeyError: 'what'"
    run_cases("part", cases, deadline=float("inf"), **everything)  # both were attempted
    assert len(read_lines(out)) == 2
    shown = table([first, second], took=1.0)
    assert "part: 1 failed, 1 ok" in shown
    assert "part / first: KeyError: 'what'" in shown
    assert json.dumps(first)


@pytest.mark.slow
def test_stopped_it_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--minutes", "4"]
    command += ["--only", "training", "--out", str(tmp_path / "lines.jsonl")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("lines.scratch/*.log")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 143
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            commands.append(path.read_bytes())
    assert not [command for command in commands if str(tmp_path).encode() in command]
