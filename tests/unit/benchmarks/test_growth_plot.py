"""The picture of growth: which lines are of one series, and what a panel without any says."""

import pytest

from benchmarks.growth_plot import draw_growth, series_of


def line(step=10.0, **varied):
    case = {"backbone": "bst", "layers": 3, "experts": 8, "sites": "head", "feed": "ready"}
    case |= {"pipeline": "sparse_dist", "length": 50, "max_length": 50, "rows": 1000, "width": 16}
    case |= {"precision": "fp32", "dataset": "random", "options": "", "batch_size": 64}
    figures = {"step_ms": {"p10": step - 1, "p50": step, "p90": step + 1}, "conclusive": True}
    figures |= {"peak_bytes": 2**20, "threads": 2, "device": "one CPU", "commit": "aaa1111"}
    return {"bench": "train_throughput", "world_size": 1, **case, **figures, **varied}


@pytest.mark.parametrize("varied", ["rows", "layers", "experts"])
def test_a_series_differs_in_one_thing_alone(varied):
    other = {"rows": "layers", "layers": "experts", "experts": "rows"}[varied]
    lines = [line(**{varied: value}) for value in (16, 4, 64)]
    lines += [line(**{varied: 128, other: 7}), line(**{varied: 256}, threads=1)]
    (found,) = series_of(lines, varied)
    assert found.values(varied) == [4, 16, 64]


def test_the_last_line_of_a_case_counts():
    lines = [line(rows=10, step=1.0), line(rows=20), line(rows=10, step=3.0)]
    (found,) = series_of(lines, "rows")
    assert found.values("p50", "step_ms") == [3.0, 10.0]


def test_the_plain_model_is_no_layer_of_experts():
    lines = [line(layers=0), line(layers=1), line(layers=2)]
    (found,) = series_of(lines, "layers")
    assert found.values("layers") == [1, 2]


def test_ranks_grow_with_the_batch_or_without():
    lines = [line(world_size=ranks, batch_size=64, threads=4 // ranks) for ranks in (1, 2, 4)]
    lines += [line(world_size=ranks, batch_size=64 * ranks) for ranks in (2, 4)]
    strong, weak = series_of(lines, "world_size")
    assert (strong.name, weak.name) == ("strong scaling", "weak scaling")
    assert [it["batch_size"] for it in strong.lines] == [64, 64, 64]
    assert [it["batch_size"] for it in weak.lines] == [64, 128, 256]


def test_weak_scaling_is_found_where_no_line_has_one_rank():
    """As on hosts of eight, whose own batch is cut into eight."""
    lines = [line(world_size=ranks, batch_size=64) for ranks in (8, 32)]
    lines += [line(world_size=ranks, batch_size=64 * ranks) for ranks in (8, 32)]
    strong, weak = series_of(lines, "world_size")
    assert [it["batch_size"] for it in strong.lines] == [64, 64]
    assert [it["batch_size"] for it in weak.lines] == [512, 2048]


def test_one_line_is_no_growth():
    assert series_of([line()], "rows") == []
    assert series_of([line()], "world_size") == []


def test_a_panel_says_what_is_not_measured_and_a_mark_what_is_unsure(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "growth.svg"
    draw_growth([line(rows=1000), line(rows=10**5, conclusive=False)], picture)
    drawn = picture.read_text()
    assert "<!-- 1e5 -->" in drawn  # matplotlib notes a text beside its outlines
    for how in ("--ranks 1 2 4 8", "--sweep layers", "--sweep experts"):
        assert f"not measured: {how}".replace("--", "- -") in drawn
    assert "not measured: - -sweep rows" not in drawn
