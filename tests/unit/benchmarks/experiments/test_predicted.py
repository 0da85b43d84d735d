"""What a probe predicted is compared with its own seed's runs, and so is its verdict."""

from benchmarks.experiments.evidence import views, with_auto
from benchmarks.experiments.predicted import points_of, rank_correlation, table
from benchmarks.experiments.report import Line
from benchmarks.experiments.variants import PROBED_VARIANT
from tests.helpers.rounding import rounded


def run(variant: str, seed: int, auc: float) -> Line:
    test = {"auc": auc, "gauc": auc, "logloss": 1 - auc}
    return {
        "data": "tree",
        "backbone": "din",
        "variant": variant,
        "seed": seed,
        "test": test,
        "flops": 100,
    }


def probe(seed: int, names: str, *, pays: bool, gain: float) -> Line:
    features = [{"name": name, "site": "up", "gain": gain / 2**at} for at, name in enumerate(names)]
    return {
        "data": "tree",
        "backbone": "din",
        "seed": seed,
        "features": features,
        "layers": [{"feature": names[0], "gain": gain, "total": gain}] if gain else [],
        "route_by": [[names[0]]] if gain else [],
        "pays": pays,
    }


RUNS = [
    *(run("plain", seed, 0.80) for seed in range(4)),
    *(run(PROBED_VARIANT, seed, auc) for seed, auc in enumerate((0.81, 0.8022, 0.799, 0.8051))),
]
PROBES = [
    probe(0, "abc", pays=True, gain=0.02),
    probe(1, "abc", pays=True, gain=0.003),  # brought 22, too near the line of 20
    probe(2, "bac", pays=True, gain=0.004),  # cost 10
    probe(3, "abc", pays=False, gain=0.0),  # brought 51
    probe(9, "abc", pays=True, gain=0.1),  # was not trained
]


def test_pairs_are_of_one_seed_and_verdicts_are_held_to_them():
    points = points_of(RUNS, PROBES)
    assert [point.seed for point in points] == [0, 1, 2, 3]
    assert [point.auc for point in points] == rounded([100, 22, -10, 51], scale=1e4)
    assert [point.predicted for point in points] == rounded([200, 30, 40, 0], scale=1e4)
    assert [point.near for point in points] == [False, True, False, False]
    assert [point.right for point in points] == [True, True, False, False]
    assert points[2].features == ("b", "a", "c")


def test_the_table_counts_what_is_not_near_the_line():
    row = table(points_of(RUNS, PROBES)).splitlines()[-1]
    name, *cells = row.strip("| ").split(" | ")
    assert name == "tree, din"
    assert cells[:5] == ["0 of 4", "1 of 3", "1", "0 to 200", "0 to 200"]
    assert cells[5:] == ["+41 (-10 to 100)", "2 (-10), 3 (+51)"]


def test_a_second_look_overrules_the_first():
    (point,) = points_of(RUNS, [{**PROBES[0], "later": {"steps": 600, "total": 0.004}}])
    assert not point.pays
    assert point.predicted == rounded(200, scale=1e4)
    assert point.left == rounded(40, scale=1e4)


def test_ranks_agree_where_the_order_does():
    points = points_of(RUNS[:3] + RUNS[4:7], PROBES)
    assert rank_correlation(points) == rounded(0.5)  # 1, 3, 2 against 1, 2, 3


def test_auto_ends_as_the_experts_or_as_the_plain_model():
    auto = {it["seed"]: it for it in with_auto(RUNS, PROBES) if it["variant"] == "auto"}
    assert {seed: line["test"]["auc"] for seed, line in auto.items()} == {
        0: 0.81,
        1: 0.8022,
        2: 0.799,
        3: 0.80,
    }


def test_views_are_the_choice_or_the_best_or_the_last():
    assert views(PROBES[0]) == [["a"]]
    assert views(PROBES[3]) == [["a"], ["b"], ["c"]]  # nothing stood out
    assert views(PROBES[0], last=True) == [["c"], ["b"], ["a"]]
