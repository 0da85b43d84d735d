"""No tolerance is picked by hand: ``tests/helpers/rounding.py`` derives all bounds.

A literal was right on the processor that it was picked on, and wrong by a last digit on the next.
"""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

BOUNDS = "helpers/rounding.py"
SMALL = 1e-3  # a number below is no share of anything that tests speak of
NAMED = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol", "delta", "tolerance"}
# What compares to within a tolerance; where positional tolerances begin; whether it has its own.
COMPARISONS = {
    "allclose": 2,
    "approx": 1,
    "assert_allclose": 2,
    "assert_almost_equal": 2,
    "assert_array_almost_equal": 2,
    "assert_close": 2,
    "isclose": 2,
}


def number_in(node: ast.expr, below: float = math.inf) -> float | None:
    """The first literal number in an expression, wherever in it; if ``below``, a fraction."""
    for part in ast.walk(node):
        value = part.value if isinstance(part, ast.Constant) else None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if below == math.inf or 0 < value < below:
            return value
    return None


def picked_by_hand(source: str) -> Iterator[str]:
    """What compares to within a number, or to what a package has picked: ``line: reason``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[-1], (ast.Lt, ast.LtE)):
            number = number_in(node.comparators[-1], below=SMALL)
            if number is not None:
                yield f"{node.lineno}: compares with {number}"
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg in NAMED}
        if name in COMPARISONS:
            positional = node.args[COMPARISONS[name] :]
            given |= {f"argument {at}": value for at, value in enumerate(positional)}
            if not given:
                yield f"{node.lineno}: {name} with the tolerance of its package"
        for argument, value in given.items():
            if (number := number_in(value)) is not None:
                yield f"{node.lineno}: {name} with {argument} = {number}"


@pytest.mark.parametrize(
    "source",
    [
        "torch.testing.assert_close(got, want, rtol=1e-5, atol=tolerance)",
        "assert_close(got, want, rtol=0, atol=0)",
        "torch.testing.assert_close(got, want)",
        "torch.allclose(got, want, 1e-5)",
        "torch.isclose(got, want, tolerance, 1e-8).all()",
        "got.allclose(want, atol=2e-5 * max(1, largest))",
        "got == pytest.approx(want)",
        "got == pytest.approx(want, 0.01)",
        "got == approx(want, abs=4)",
        "np.testing.assert_allclose(got, want, atol=tolerance, rtol=1e-9)",
        "math.isclose(got, want, rel_tol=1e-9)",
        "close(got, want, rtol=-1e-3)",
        "assert error <= 2e-5 * max(1, largest)",
        "assert abs(got - want) < 1 + 1e-6",
    ],
)
def test_a_tolerance_that_was_picked_by_hand_is_seen(source):
    assert list(picked_by_hand(source))


@pytest.mark.parametrize(
    "source",
    [
        "assert_within(got, want, rounding_of(model, features))",
        "torch.testing.assert_close(got, want, rtol=unit, atol=unit * largest)",
        "assert got == rounded(want, terms=3)",
        "abs(-3)",
        "assert share < 0.25",
        "assert error <= unit * largest",
        "assert 1e-6 < rate",
        "loader(rows, 1e-3, relative=2)",
    ],
)
def test_a_derived_one_is_not(source):
    assert not list(picked_by_hand(source))


def test_tolerances_are_derived():
    folders = [ROOT / "tests", ROOT / "benchmarks"]
    files = [path for folder in folders for path in folder.rglob("*.py") if not path.match(BOUNDS)]
    assert len(files) > 200
    assert not [f"{path.relative_to(ROOT)}:{found}" for path in files for found in seen(path)]


def seen(path: Path) -> list[str]:
    return list(picked_by_hand(path.read_text(encoding="utf-8")))
