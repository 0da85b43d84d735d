"""Variants of a seed go on from the same plain model, whatever ran before them."""

import pytest

from benchmarks.experiments import routers


@pytest.mark.slow
def test_a_variant_is_the_same_alone_and_after_others(monkeypatch):
    sizes = {"STEPS": 24, "PLAIN_STEPS": 8, "HEARD": 4, "TEST_ROWS": 8192}
    for name, size in sizes.items():
        monkeypatch.setattr(routers, name, size)
    (alone,) = routers.run("din", 0, ["spectral"], "composed")
    *_, after = routers.run("din", 0, ["plain", "keys x 5", "spectral"], "composed")
    assert after == alone
