"""What a probe refuses, or says that it cannot judge."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.probed_hosts import (
    build,
    EventHost,
    FEATURES,
    Features,
    make_batch,
    probe_of,
    probed,
    steps,
)
from torchrec_hilomoe.hilomoe import LossTerms


def test_a_feature_with_one_value_cannot_be_judged():
    class WithConstant(Features):
        def forward(self, ids_B2, number_B1):
            found = super().forward(ids_B2, number_B1)
            return torch.cat([found, torch.ones_like(number_B1)], dim=1)

    model = build()
    model.features, model.first = WithConstant(), nn.Linear(10 + 6, 8)
    report = probed(model, features={**FEATURES, "constant": range(9, 10)}).report()
    assert list(report.not_judged) == ["constant"]
    assert "constant: cannot judge: all rows are in one bucket" in report.table()
    assert "constant" not in [gain.name for gain in report.features]


def test_refuses_features_that_all_have_one_value():
    class Constant(Features):
        def forward(self, ids_B2, number_B1):
            return torch.ones_like(super().forward(ids_B2, number_B1))

    model = build()
    model.features = Constant()
    probe = probed(model)
    one_value = r"none of \['a', 'b', 'number'\].*1 value.*2 are the least"
    with pytest.raises(ValueError, match=one_value):
        probe.report()


def test_refuses_to_fit_after_rows_have_judged():
    probe = probed(build())
    with (
        pytest.raises(ValueError, match=r"InteractionProbe.fit: rows have judged already"),
        probe.fit(),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": None}, r"must say which columns .* got None. Give a mapping"),
        ({"features": ["a", "b"]}, r"must say which columns .* got \['a', 'b'\]"),
        ({"features": {"a": [0, 1], "b": range(4)}}, r"'a' is \[0, 1\], but .* range of columns"),
        ({"features": {1: range(4), 2: range(4)}}, r"1 is range\(0, 4\), but a feature has a name"),
        ({"features": {"a": range(4)}}, r"features must be two at least.*got \['a'\].*Name"),
        ({"features": {"a": range(4), "b": range(3, 3)}}, r"'b' is range\(3, 3\).*not empty"),
        ({"features": FEATURES | {"random": range(9, 10)}}, r"'random' is the name of a control"),
        ({"features": FEATURES | {"wider": range(9, 10)}}, r"'wider' is the name of a control"),
        ({"query_module": "nowhere"}, r"query_module: 'nowhere' is no module.*features"),
        ({"query_module": "featurs"}, r"query_module: 'featurs' is no module.*mean 'features'"),
        ({"query_module": "tables.1"}, r"'tables.1' is no module.*mean 'features.tables.1'"),
        ({"tokens": {"first": "gone"}}, r"tokens: 'gone' is no module"),
        ({"sites": ["middle*"]}, r"sites pattern 'middle\*' matches none.*first, last"),
        ({"sites": "first"}, r"sites must be a list.*got 'first'"),
        ({"draws": 0}, r"draws must be at least 1, got 0"),
        ({"blocks": 1}, r"blocks must be at least 2, got 1"),
        ({"sketch": 0}, r"sketch must be at least 1, got 0"),
        ({"every": 0}, r"every must be at least 1, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_what_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        probe_of(build(), **options)


def test_refuses_columns_that_are_not_there():
    model = build()
    probe = probe_of(model, features={**FEATURES, "far": range(9, 12)})
    with (
        pytest.raises(ValueError, match=r"'far' is columns 9 to 12.*'features' has 9 columns"),
        probe.fit(),
    ):
        steps(model, [0])


def test_refuses_too_few_rows_to_fit_and_to_judge():
    model = build()
    probe = probe_of(model)
    with probe.fit():
        steps(model, [0], rows=100)
    with pytest.raises(ValueError, match=r"saw 100 fit rows, and 4 buckets need 128.*probe.fit"):
        probe.report()
    probe = probe_of(model)
    with probe.fit():
        steps(model, [0, 1])
    with pytest.raises(ValueError, match=r"saw 0 held-out rows.*need 128.*probe.judge"):
        probe.report()


def test_refuses_a_site_or_a_query_that_never_ran():
    model = build()
    model.idle = nn.Linear(3, 3)
    probe = probe_of(model, sites=["idle"])
    with probe.fit():
        steps(model, range(4))
    with pytest.raises(ValueError, match=r"'idle' had no gradient.*leave this site out"):
        probe.report()
    with pytest.raises(ValueError, match=r"'features' did not run.*probe.fit\(\)"):
        probe_of(model).report()


def test_refuses_rows_of_which_nobody_knows_whose_they_are():
    torch.manual_seed(0)
    model = EventHost(jagged=True)
    probe = probe_of(model, sites=["up"])
    (ids, number, _), clicks = make_batch(0, rows=64)
    with (
        pytest.raises(ValueError, match=r"64 samples.*'up' has shape \(192, 6\).*tokens"),
        probe.fit(),
    ):
        F.binary_cross_entropy_with_logits(
            model(ids, number, torch.randn(64, 3, 6)), clicks
        ).backward()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (None, r"loss_terms must return LossTerms, got None"),
        (LossTerms(weights=torch.ones(255)), r"256 samples, but weights have shape \(255,\)"),
        (LossTerms(weights=torch.ones(256, 1)), r"256 samples, but weights have shape \(256, 1\)"),
        (LossTerms(denominator=0.0), r"denominator must be above 0 and finite, got 0.0"),
    ],
)
def test_refuses_terms_of_another_loss(terms, message):
    model = build()
    with (
        pytest.raises(ValueError, match=message),
        probe_of(model, loss_terms=lambda *_: terms).fit(),
    ):
        steps(model, [0])
