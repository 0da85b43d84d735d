"""Kill -9 of one rank or of all, at random moments: the run goes on as if nothing had happened."""

import pytest

from tests.helpers.faults import assert_same_run, Kill, run_with
from tests.helpers.processes import RankFailed
from torchrec_hilomoe.training import checkpoint

RANKS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    for ended in run_with(None, [f"--out_dir={out}"], ranks=RANKS):
        assert ended.code == 0, ended.shown
    return out


def kill_and_resume(whole, out, seed):
    argv = [f"--out_dir={out}"]
    checkpoints = out / "checkpoints"
    kill = Kill(seed=seed, folder=checkpoints, ranks=RANKS)
    with pytest.raises(RankFailed, match="exit code -9"):
        run_with(kill, argv, ranks=RANKS)
    newest = checkpoint.latest(checkpoints)
    before = checkpoint.open(newest).progress.step if newest else 0
    ended = run_with(None, argv, ranks=RANKS)
    assert [rank.code for rank in ended] == [0, 0], ended
    if 0 < before < 8:
        assert f"at step {before} of 8" in ended[0].shown
    assert_same_run(out, whole)
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize("seed", range(1))
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, seed):
    kill_and_resume(whole, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 55))
def test_a_killed_run_ends_with_the_same_bits_however_often(whole, tmp_path, seed):
    kill_and_resume(whole, tmp_path, seed)
