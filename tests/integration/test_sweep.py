"""A sweep's trials are runs: judged by their validations, and told when they fail."""

import json

import pytest

from tests.helpers.runs import SMALL
from torchrec_hilomoe.sweep.trials import run_trial


@pytest.mark.slow
def test_a_trial_is_a_run_that_is_judged_by_its_best_validation(tmp_path):
    outcome = run_trial(
        [*SMALL, "--train.evaluate_every=6", "--checkpoint.every_steps=9"],
        tmp_path / "trial",
        metric="logloss",
        ranks=1,
    )
    assert outcome.error is None
    rows = map(json.loads, (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines())
    assert outcome.value == min(row["logloss"] for row in rows if row["split"] == "valid")
    assert (tmp_path / "trial" / "summary.json").exists()


@pytest.mark.slow
def test_a_trial_that_fails_says_why(tmp_path):
    outcome = run_trial(["--model.bst.num_heads=5"], tmp_path, metric="auc", ranks=1)
    assert outcome.value is None
    assert outcome.error is not None
    assert "num_heads=5" in outcome.error
