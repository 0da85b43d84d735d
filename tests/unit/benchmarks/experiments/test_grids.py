"""A grid's cells differ from the default in one option, and are compared within their seed."""

import argparse

from benchmarks.experiments.grids import AXES, cells, DEFAULT, paired, PLAIN
from tests.helpers.rounding import rounded


def asked(axes):
    return argparse.Namespace(seeds=[5], data=["toys"], backbones=["din"], axes=axes)


def test_a_cell_leaves_the_default_in_its_own_options_alone():
    found = {(it.axis, it.value): it.case.options for it in cells(asked(list(AXES)), [])}
    default = found["", DEFAULT]
    assert found["", PLAIN]["model.hilomoe"] == "null"
    for (axis, value), options in found.items():
        if axis:
            changed = {name for name in options if options[name] != default.get(name)}
            views = {"model.hilomoe.route_by"} if axis == "layers" else set()
            assert changed == {*AXES[axis][value], *views}, (axis, value)


def test_layers_take_the_named_features_in_turn():
    found = {it.value: it.case.options for it in cells(asked(["layers"]), [])}
    assert found["1"]["model.hilomoe.route_by"] == "[[category]]"
    assert found["4"]["model.hilomoe.route_by"] == (
        "[[category], [attributes], [history_category], [category]]"
    )


def test_values_are_compared_with_their_own_seed():
    def line(axis, value, seed, auc):
        scores = {"auc": auc}
        where = {"data": "toys", "backbone": "din", "seed": seed}
        return {"axis": axis, "value": value, **where, "valid": scores, "test": scores}

    lines = [
        line("", DEFAULT, 0, 0.75),
        line("", DEFAULT, 1, 0.80),
        line("", PLAIN, 1, 0.79),
        line("rank", "1", 1, 0.81),
    ]
    assert paired(lines, lines[3], "test", DEFAULT) == rounded(100, scale=1e4)
    assert paired(lines, lines[3], "valid", PLAIN) == rounded(200, scale=1e4)
    assert paired(lines, lines[0], "test", PLAIN) is None
