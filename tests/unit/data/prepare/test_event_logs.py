"""Logs of events of any size: the same folder however they are cut, whole or absent, in memory
that does not grow with them.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.event_logs import EVENT_LOGS
from tests.helpers.processes import ROOT, run_command
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.prepare import (
    counting,
    event_runs,
    log,
    order_statistics,
    sources,
    split_rules,
)

EVENTS = 3000


@pytest.fixture(params=EVENT_LOGS)
def name(request):
    return request.param


@pytest.fixture
def raw(name, tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    EVENT_LOGS[name].write(folder, EVENTS)
    return folder


@pytest.fixture
def shuffled(monkeypatch):
    """Shards of some hundred rows, a few for a stretch of the log."""
    monkeypatch.setattr(log, "shard_rows", lambda bytes_per_row: 200)
    monkeypatch.setattr(split_rules, "OPEN_SHARDS", 4)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.usefixtures("shuffled")
def test_parts_pieces_and_threads_change_nothing(name, raw, tmp_path, monkeypatch):
    case = EVENT_LOGS[name]
    whole = case.prepare(name, raw, tmp_path / "whole", workers=1)
    parts = []
    read = event_runs.EventRuns.read

    def spy(self, part):
        parts.append(part)
        return read(self, part)

    monkeypatch.setattr(event_runs.EventRuns, "read", spy)
    for limit in ("RUN_BYTES", "PART_BYTES"):
        monkeypatch.setattr(event_runs, limit, 1 << 12)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 999)
    monkeypatch.setattr(log, "ENCODED_BYTES", 1 << 12)
    for module in (counting, order_statistics):
        monkeypatch.setattr(module, "PENDING", 50)
    monkeypatch.setattr(counting, "DISTINCT_IN_MEMORY", 20)
    cut = case.prepare(name, raw, tmp_path / "cut", workers=3)
    assert len(set(parts)) > 10
    assert cut == whole
    files = contents(tmp_path / "whole")
    assert contents(tmp_path / "cut") == files
    assert sum(path.startswith("train/") for path in files) > 4


def test_other_users_change_no_row_of_a_user(tmp_path):
    """Negatives of a user, too, are the same whoever else is there."""
    case = EVENT_LOGS["amazon-sequences"]
    raw = tmp_path / "raw"
    raw.mkdir()
    case.write(raw, EVENTS)
    text = (raw / "Toy.txt").read_text().splitlines()
    lines_by_user = dict(sorted((int(line.split()[0]), line) for line in text))
    negatives = []
    for place, kept in enumerate((1.0, 0.5)):
        # All items stay known, whoever is left out: two users train all of them between them.
        halves = [[*range(start, 300, 2), start, start] for start in (0, 1)]
        extra = [f"9999{at} {' '.join(map(str, items))}" for at, items in enumerate(halves)]
        some = [*list(lines_by_user.values())[: int(len(lines_by_user) * kept)], *extra]
        (raw / "Toy.txt").write_text("\n".join(some) + "\n")
        out = tmp_path / f"out{place}"
        case.prepare("amazon-sequences", raw, out)
        rows = pq.read_table(out / "test", columns=["user", "label", "attributes"]).to_pylist()
        half = len(lines_by_user) // 2
        negatives.append([row for row in rows if not row["label"] and row["user"] < half])
    assert len(negatives[0]) > 100
    assert negatives[0] == negatives[1]


STOPPED = """
import os, sys, time
from pathlib import Path
from tests.helpers.event_logs import EVENT_LOGS
from torchrec_hilomoe.data.prepare import log
from torchrec_hilomoe.data.prepare.shards import Shards
name, raw, out, step = sys.argv[1:]

def stop(*args, **options):
    os.write(1, b"here\\n")  # whole, whichever of several threads come here
    time.sleep(60)

if step == "encode":
    log._encode = stop
elif step == "count":
    log.EventRuns.read = stop
else:
    Shards.write_split = stop
EVENT_LOGS[name].prepare(name, Path(raw), Path(out))
"""


# The steps after the count are the same for all.
@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(pytest.param(name, "count", marks=pytest.mark.slow) for name in EVENT_LOGS),
        ("movielens", "encode"),
        pytest.param("movielens", "write", marks=pytest.mark.slow),
    ],
    indirect=["name"],
)
def test_a_killed_run_leaves_nothing_that_looks_done(raw, name, tmp_path, step):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPED, name, raw, out, step]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "raw")
    with pytest.raises(DataError, match="not a whole data folder"):
        ParquetSource(str(left), "train")
    report = EVENT_LOGS[name].prepare(name, raw, out)
    assert sum(ParquetSource(str(out), "train").block_rows) == report.splits["train"].rows


def test_scratch_files_go_where_they_are_told_and_vanish(raw, name, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen = []
    parts = event_runs.EventRuns.parts

    def spy(self, least):
        found = parts(self, least)
        seen.extend(path.name for path in scratch.rglob("*.run"))
        return found

    monkeypatch.setattr(event_runs.EventRuns, "parts", spy)
    EVENT_LOGS[name].prepare(name, raw, tmp_path / "out", scratch=str(scratch))
    assert seen == ["events-00000.run"]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("workers", 0, r"--workers must be at least 1, got 0"), ("seed", -1, r"--seed must be at")],
)
def test_refuses_options_out_of_range(raw, name, tmp_path, option, value, message):
    case = EVENT_LOGS[name]
    options = {key: kept for key, kept in case.options.items() if key != option}
    with pytest.raises(ValueError, match=message):
        type(case)(write=case.write, options=options).prepare(
            name, raw, tmp_path / "out", **{option: value}
        )


PEAKS = """
import json, os, sys
from pathlib import Path
from tests.helpers.event_logs import EVENT_LOGS
from torchrec_hilomoe.data.prepare import event_runs, log, shards, sources
from torchrec_hilomoe.runtime.process import peak_resident_bytes

name, folder = sys.argv[1], Path(sys.argv[2])
event_runs.RUN_BYTES, event_runs.PART_BYTES, sources.BLOCK_BYTES = 1 << 20, 1 << 19, 1 << 18
log.ENCODED_BYTES = shards.SHARD_BYTES = 1 << 20
peaks = []
for number, events in enumerate(map(int, sys.argv[3:])):
    raw = folder / f"raw{number}"
    raw.mkdir()
    writing = os.fork()  # its memory is not this process's
    if not writing:
        EVENT_LOGS[name].write(raw, events)
        os._exit(0)
    os.waitpid(writing, 0)
    EVENT_LOGS[name].prepare(name, raw, folder / f"out{number}")
    peaks.append(peak_resident_bytes())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_events(name, tmp_path):
    small, large = 60_000, 480_000
    # The heap finds its size in the first two.
    sizes = map(str, [small, small, small, large])
    command = [sys.executable, "-c", PEAKS, name, tmp_path, *sizes]
    done = run_command(command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    *_, before, after = json.loads(done.stdout)
    rows = [
        sum(pq.read_table(tmp_path / f"out{number}" / split).nbytes for split in ("train", "test"))
        for number in (2, 3)
    ]
    # The heap comes and goes by some pieces; whoever held the rows, or the events that they are
    # made of, would need more than a fourth of the rows' growth.
    assert after - before < (rows[1] - rows[0]) / 4
