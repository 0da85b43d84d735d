"""The teacher's term is chosen by validation alone; students are compared within their seeds."""

import pytest

from benchmarks.experiments.distillation import best, soft, tables, TUNED_ON
from benchmarks.experiments.report import Line
from benchmarks.experiments.runs import TUNING_SEED


def run(variant: str, seed: int, auc: float, **options: str) -> Line:
    scores = {"auc": auc, "gauc": auc, "logloss": 1 - auc}
    tuning = seed == TUNING_SEED
    return {
        "data": TUNED_ON,
        "backbone": "din",
        "variant": variant,
        "seed": seed,
        "options": options,
        "valid": scores,
        "test": None if tuning else scores,
        "flops": 1000,
    }


RUNS = [
    run("teacher", TUNING_SEED, 0.99),
    run("taught", TUNING_SEED, 0.7, **soft("0.5", "1.0")),
    run("taught", TUNING_SEED, 0.8, **soft("1.0", "3.0")),
    # Better, but of a seed that is compared.
    run("taught", 0, 0.9, **soft("0.5", "3.0")),
    run("student", 0, 0.75),
]


def test_the_term_is_the_best_of_the_seed_of_tuning():
    assert best(RUNS, "din") == soft("1.0", "3.0")
    with pytest.raises(ValueError, match="tune --backbones bst"):
        best(RUNS, "bst")


def test_each_table_has_cells_for_its_columns():
    tuned, compared = "\n".join(tables(RUNS)).split("\n\n")
    for table, rows in ((tuned, 2), (compared, 2)):
        lines = table.splitlines()
        assert len(lines) == 2 + rows
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert compared.splitlines()[-1].endswith("| +1500.0 (one seed) | -1500.0 (one seed) |")
