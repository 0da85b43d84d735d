"""Benchmarks end to end, tiny: what they write is whole, comparable, and can be drawn."""

import contextlib
import importlib
import io
import os
from pathlib import Path

import pytest

from benchmarks import bench_server, bench_serving, compare, growth_plot, serving_plot
from benchmarks.harness import read_lines
from benchmarks.launching import exit_code
from benchmarks.side_by_side import contenders
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded

THROUGHPUT, SIDE_BY_SIDE = "bench_train_throughput", "bench_side_by_side"
PNG = b"\x89PNG"
REFUSED = [
    (THROUGHPUT, ["--sweep", "depth"], "there is no 'depth'. Take some of base, plain"),
    (THROUGHPUT, ["--sweep", "rows=many"], "write rows=1000,1e6"),
    (THROUGHPUT, ["--sweep", "base", "--ranks", "0"], "--ranks must be at least 1, got 0"),
    (THROUGHPUT, ["--model.backbone", "bts"], "Did you mean 'bst'?"),
    (SIDE_BY_SIDE, ["--only", "dcn"], "invalid choice: 'dcn' (choose from"),
    (SIDE_BY_SIDE, ["--sweeps"], "unrecognized arguments: --sweeps"),
    (SIDE_BY_SIDE, ["--threads", "0"], "--threads must be at least 1, got 0"),
]


def bench(name, argv):
    """Run a benchmark in this process, which is a rank; return its exit code and what it showed."""
    main = importlib.import_module(f"benchmarks.{name}").main
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.redirect_stderr(io.StringIO()) as told,
    ):
        try:
            code = exit_code(main, argv)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, shown.getvalue() + told.getvalue()


def bench_unequal(argv):
    """Run one of models with other weights than each other's; return how it refuses."""
    contenders.copy_weights = lambda *_: None
    with pytest.raises(AssertionError) as refused:
        bench(SIDE_BY_SIDE, argv)
    return str(refused.value)


def bench_refused(folder):
    """Run what cannot be, from a process that no launcher started."""
    del os.environ["RANK"]
    return [
        bench(name, [*flags, "--quick", "--out", str(folder / "lines.jsonl")])
        for name, flags, _ in REFUSED
    ]


def on_ranks(ranks, name, *argv):
    """Run a benchmark on ranks, as a launcher does; return what the first of them returned."""
    return run_ranks(bench, ranks, name, [str(word) for word in argv], joined=False)[0]


@pytest.fixture(scope="module")
def throughput(tmp_path_factory):
    out = tmp_path_factory.mktemp("throughput") / "lines.jsonl"
    sweeps = ("base", "plain", "rows=1000,2000")
    code, shown = on_ranks(1, THROUGHPUT, "--quick", "--out", out, "--sweep", *sweeps)
    assert code == 0, shown
    return out


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    pytest.importorskip("fuxictr", reason="pip install --no-deps -r requirements/dev.txt")
    out = tmp_path_factory.mktemp("side_by_side") / "lines.jsonl"
    code, shown = on_ranks(1, SIDE_BY_SIDE, "--quick", "--out", out, "--device", "cpu")
    assert code == 0, shown
    return out


@pytest.mark.slow
def test_throughput_is_taken_apart(throughput):
    cases = [(line["layers"] > 0, line["rows"]) for line in read_lines(throughput)]
    assert cases == [(True, 1000), (False, 1000), (True, 2000)]
    for line in read_lines(throughput):
        assert line["samples_per_second"] > 0
        steps = line["step_ms"]
        assert steps["p10"] <= steps["p50"] <= steps["p90"] <= steps["p99"]
        assert sum(line["phase_ms"].values()) == rounded(
            line["unpipelined_ms"], len(line["phase_ms"])
        )
        assert line["sent_bytes"] == 0  # there is nobody to send to
        assert 0 < line["state_bytes"] < line["peak_bytes"] < line["process_bytes"]


def test_all_contenders_are_beside_each_other(side_by_side):
    ours = ["ours", "ours with experts"]
    found = {}
    for line in read_lines(side_by_side):
        found.setdefault(line["model"], {})[line["provider"]] = line
    assert {model: sorted(them) for model, them in found.items()} == {
        "din": ["fuxictr", *ours],
        "dlrm": [*ours, "torchrec"],
    }
    for them in found.values():
        assert them["ours"]["ratio"] == 1
        assert them["ours with experts"]["layers"] * them["ours with experts"]["experts"] > 0
        for line in them.values():
            per_second = line["batch_size"] / line["median_us"] * 1e6
            assert line["rows_per_second"] == rounded(per_second)
            assert line["commit"]
            assert line["torchrec"]
            assert line["device"]
    tables = [sum(line["plan"].values()) for line in found["dlrm"].values()]
    assert tables == [4, 4, 4]
    assert found["din"]["fuxictr"]["plan"] == {}


@pytest.mark.slow
def test_two_ranks_train_the_same_and_fuxictr_sits_out(tmp_path):
    pytest.importorskip("fuxictr", reason="pip install --no-deps -r requirements/dev.txt")
    out = tmp_path / "lines.jsonl"
    code, shown = on_ranks(2, SIDE_BY_SIDE, "--quick", "--out", out, "--device", "cpu")
    assert code == 0, shown
    assert "fuxictr trains in one process only" in shown
    lines = read_lines(out)
    assert "fuxictr" not in {line["provider"] for line in lines}
    assert {line["world_size"] for line in lines} == {2}


def test_models_that_differ_are_not_timed(tmp_path):
    out = tmp_path / "lines.jsonl"
    argv = ["--quick", "--only", "dlrm", "--device", "cpu", "--out", str(out)]
    (said,) = run_ranks(bench_unequal, 1, argv, joined=False)
    assert "losses of step 0 are not the same" in said
    assert not out.exists()


@pytest.mark.parametrize("record", ["throughput", "side_by_side"])
def test_a_record_compares_to_itself(record, request, capsys):
    path = request.getfixturevalue(record)
    assert compare.main([str(path), str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert len(rows) == len(read_lines(path))
    for row in rows:
        assert "| 1.000 |" in row
        assert "within noise" in row or "spread too wide" in row


def test_growth_is_drawn(throughput, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "docs" / "growth.png"
    assert growth_plot.main([str(throughput), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)


def test_requests_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    record, picture = (
        Path(serving_plot.__file__).parent / "results/serving.jsonl",
        tmp_path / "it.png",
    )
    assert serving_plot.main([str(record), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    others = tmp_path / "others.jsonl"
    others.write_text('{"tables": "int8", "threads": 1}\n')
    assert serving_plot.main([str(others), "--out", str(tmp_path / "none.png")]) == 2
    assert "no line is of a request by one thread" in capsys.readouterr().err


def test_what_cannot_be_is_said_in_a_sentence_before_anything_is_measured(tmp_path):
    (found,) = run_ranks(bench_refused, 1, tmp_path, joined=False)
    for (name, flags, said), (code, shown) in zip(REFUSED, found, strict=True):
        assert code == 2, (name, flags)
        assert said in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "no two lines differ"),
        ('{"bench": "data", "median_us": 1.5}\n', "no two lines differ"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(text, said, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = tmp_path / "lines.jsonl"
    if text is not None:
        lines.write_text(text)
    assert growth_plot.main([str(lines), "--out", str(tmp_path / "none.png")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_requests_are_timed_in_every_form(tmp_path, monkeypatch):
    out = tmp_path / "lines.jsonl"
    argv = ["--models", "dlrm", "--candidates", "1", "20", "--seconds", "0.1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench_serving", *argv])
    bench_serving.main()
    lines = read_lines(out)
    assert [(line["candidates"], line["form"], line["provider"]) for line in lines] == [
        (candidates, form, provider)
        for candidates in (1, 20)
        for form in ("eager", "program", "request", "package")
        for provider in ("plain", "experts")
    ]
    assert all(line["median_us"] <= line["p99_us"] for line in lines)


@pytest.mark.slow
def test_a_server_is_put_under_load(tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="pip install --no-deps -r requirements/dev.txt")
    out = tmp_path / "lines.jsonl"
    argv = ["--models", "dlrm", "--form", "program", "--candidates", "3", "--clients", "1", "3"]
    monkeypatch.setattr("sys.argv", ["bench", *argv, "--seconds", "0.2", "--out", str(out)])
    bench_server.main()
    lines = read_lines(out)
    assert [line["clients"] for line in lines] == [1, 3]
    assert all(0 < line["median_us"] <= line["p99_us"] for line in lines)
    assert all(line["requests"] >= 5 * line["clients"] for line in lines)
