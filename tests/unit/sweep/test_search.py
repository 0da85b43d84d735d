"""The search: the options of the space, the best kept, and no trial lost when it is interrupted."""

import json

import pytest

from torchrec_hilomoe.sweep.search import search
from torchrec_hilomoe.sweep.space import Dimension
from torchrec_hilomoe.sweep.trials import Outcome

pytest.importorskip("optuna")

RATE = "train.learning_rate"
SITES = "model.hilomoe.sites"
SPACE = (
    Dimension(option=RATE, low=0.001, high=1.0, log=True),
    Dimension(option="train.warmup_steps", low=0, high=100, step=10),
    Dimension(option=SITES, choices=(["head"], ["head", "ffn"])),
)


class Runs:
    """Stands where trials would run for hours; the value is the learning rate's."""

    def __init__(self, ends=()):
        self.seen = []
        self._ends = list(ends)

    def __call__(self, options, folder):
        self.seen.append((dict(it.removeprefix("--").split("=") for it in options), folder.name))
        end = self._ends.pop(0) if self._ends else None
        if isinstance(end, BaseException):
            raise end
        return end or Outcome(value=float(self.seen[-1][0][RATE]))


def test_options_lie_in_the_space_and_the_best_is_returned(tmp_path):
    runs = Runs()
    best = search(SPACE, tmp_path, runs, trials=8, metric="auc")
    assert best is not None
    assert len(runs.seen) == 8
    for options, _ in runs.seen:
        assert 0.001 <= float(options[RATE]) <= 1
        assert int(options["train.warmup_steps"]) in range(0, 101, 10)
        assert json.loads(options[SITES]) in (["head"], ["head", "ffn"])
    largest = max(float(options[RATE]) for options, _ in runs.seen)
    assert best["value"] == best["options"][RATE] == largest
    table = json.loads((tmp_path / "sweep.json").read_text())
    values = [trial["value"] for trial in table["trials"]]
    assert values == sorted(values, reverse=True)
    assert table["trials"][0] == best


def test_a_loss_is_made_small(tmp_path):
    runs = Runs()
    best = search(SPACE, tmp_path, runs, trials=5, metric="logloss")
    assert best is not None
    assert best["value"] == min(float(options[RATE]) for options, _ in runs.seen)


@pytest.mark.parametrize("end", [Outcome(value=None, stopped=True), KeyboardInterrupt()])
def test_an_interrupted_trial_is_gone_on_with_in_its_folder(tmp_path, end):
    first = Runs([None, end])
    if isinstance(end, Outcome):
        assert search(SPACE, tmp_path, first, trials=4, metric="auc") is None
    else:
        with pytest.raises(KeyboardInterrupt):
            search(SPACE, tmp_path, first, trials=4, metric="auc")
    second = Runs()
    search(SPACE, tmp_path, second, trials=4, metric="auc")
    assert second.seen[0] == first.seen[-1]
    folders = [folder for _, folder in second.seen]
    assert len(folders) == len(set(folders)) == 3
    third = Runs()
    search(SPACE, tmp_path, third, trials=4, metric="auc")
    assert third.seen == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"metric": "logloss"}, "metric 'auc', and now 'logloss'"),
        ({"space": SPACE[1:]}, "space "),
        ({"space": (Dimension(option=RATE, low=0.01, high=1.0, log=True), *SPACE[1:])}, "space "),
        ({"options": ["--train.max_steps", "9"]}, r"options \['--train.max_steps=7'\], and now"),
        ({"ranks": 2}, "ranks 1, and now 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_trials_were_asked_for_stays(tmp_path, other, message):
    asked = {"space": SPACE, "metric": "auc", "options": ["--train.max_steps=7"], "ranks": 1}

    def go(trials, **changed):
        given = {**asked, **changed}
        runs = Runs()
        search(given.pop("space"), tmp_path, runs, trials=trials, **given)
        return len(runs.seen)

    assert go(1) == 1
    with pytest.raises(ValueError, match=f"was begun with {message}.*another --out_dir"):
        go(2, **other)
    assert go(2) == 1
    assert go(3, options=["--train.max_steps", "7"]) == 1  # the same, written otherwise


def test_a_folder_has_one_search_at_a_time(tmp_path):
    def run(options, folder):
        with pytest.raises(ValueError, match=r"in use|another process|owns"):
            search(SPACE, tmp_path, Runs(), trials=2, metric="auc")
        return Outcome(value=1.0)

    assert search(SPACE, tmp_path, run, trials=1, metric="auc") is not None


def test_trials_without_the_metric_say_so(tmp_path):
    nothing = Outcome(value=None)
    with pytest.raises(ValueError, match="the last with: no validation has gauc"):
        search(SPACE, tmp_path, Runs([nothing] * 3), trials=9, metric="gauc")


def test_a_failed_trial_is_left_behind_and_three_end_the_search(tmp_path, caplog):
    bad = Outcome(value=None, error="error: the disk is full")
    runs = Runs([bad, None, bad, bad])
    search(SPACE, tmp_path, runs, trials=3, metric="auc")
    assert len(runs.seen) == 6
    assert "failed: error: the disk is full" in caplog.text
    with pytest.raises(ValueError, match="3 trials in a row have failed.*disk is full.*log.txt"):
        search(SPACE, tmp_path, Runs([bad] * 3), trials=9, metric="auc")
