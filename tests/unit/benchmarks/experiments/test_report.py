"""Runs are compared with the plain model of their own seed, never across seeds."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.experiments.plot import draw, marks_of, panel
from benchmarks.experiments.report import compare, differences, Line, summary, table, variants_of
from tests.helpers.rounding import rounded


def run(variant: str, seed: int, auc: float, flops: int = 100, data: str = "tree") -> Line:
    return {
        "data": data,
        "backbone": "bst",
        "variant": variant,
        "seed": seed,
        "test": {"auc": auc, "gauc": auc, "logloss": 0.3},
        "flops": flops,
        "output_ratio": None if variant == "plain" else 0.1,
        "samples_per_second": 1000.0,
    }


# Seeds differ by more than variants do, and one variant lacks a seed.
RUNS = [
    run("plain", 0, 0.80),
    run("plain", 1, 0.85),
    run("head rank 4", 0, 0.801, flops=120),
    run("head rank 4", 1, 0.853, flops=120),
    run("head rank 4, random", 1, 0.851, flops=120),
    run("wider", 2, 0.9, flops=110),
]


UNIT = 1e4  # what a score of 1 is in the unit of differences


def test_differences_are_within_seeds():
    # In 1e-4 of scores near 1, which is what differences of theirs are rounded by.
    assert differences(RUNS, "head rank 4") == rounded([10, 30], scale=UNIT)
    assert differences(RUNS, "head rank 4, random") == rounded([10], scale=UNIT)
    assert differences(RUNS, "wider") == []


def test_any_two_variants_can_be_compared_by_any_score(capsys):
    assert differences(RUNS, "head rank 4", "head rank 4, random") == rounded([20], scale=UNIT)
    assert differences(RUNS, "plain", "head rank 4", "gauc") == rounded([-10, -30], scale=UNIT)
    compare([*RUNS, {**RUNS[0], "test": None}], "plain", "head rank 4")
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| tree, bst | -20.0 ± 127.1 (-10.0, -30.0) | -20.0")
    assert row.endswith("| +0.0 ± 0.0 (+0.0, +0.0) |")


def test_variants_come_by_their_cost():
    assert variants_of(RUNS) == ["plain", "wider", "head rank 4", "head rank 4, random"]


def test_a_table_has_a_row_a_variant_with_students_interval():
    rows = table(RUNS).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in variants_of(RUNS)]
    # Two seeds: 12.706 standard errors of 10.
    assert "+20.0 ± 127.1 (+10.0, +30.0)" in rows[2]
    assert "no plain run of its seed" in rows[1]


def test_a_summary_has_gains_and_costs_side_by_side():
    header, _, row = summary({("tree", "bst"): RUNS}, ["head rank 4", "wider"]).splitlines()
    assert header == "| data, backbone | seeds | plain | head rank 4 | wider |"
    assert row == "| tree, bst | 2 | 0.8250 | +20.0 ± 127.1 (1.20) |  |"


def test_marks_are_relative_to_the_plain_model():
    marks = {mark.variant: mark for mark in marks_of(RUNS)}
    assert set(marks) == {"plain", "head rank 4", "head rank 4, random"}
    mark = marks["head rank 4"]
    found = (mark.cost, mark.mean, mark.least, mark.most)
    assert found == rounded((1.2, 20, 10, 30), scale=UNIT)
    assert marks["head rank 4, random"].kind is not mark.kind


@pytest.mark.parametrize("panels", [1, 4])
def test_every_panel_is_drawn(panels: int, tmp_path: Path):
    runs = [{**line, "data": f"world {i}"} for i in range(panels) for line in RUNS]
    draw(runs, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"world {i}" in drawn for i in range(panels))
    assert "routed at random" in drawn


def test_an_axis_is_logarithmic_where_relative_costs_differ_much():
    """Models of other backbones cost other FLOPs, and are still drawn near each other."""
    cheap = [{**line, "backbone": "din", "flops": line["flops"] // 10} for line in RUNS]
    axis = Figure().add_subplot()
    panel(axis, "tree", [*RUNS, *cheap], ["bst", "din"])
    assert axis.get_xscale() == "linear"
    wide = [*RUNS, run("head rank 4, by side", 0, 0.81, flops=900)]
    panel(axis, "tree", wide, ["bst", "din"])
    assert axis.get_xscale() == "log"
