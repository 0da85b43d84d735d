"""``data.num_canonical_shards``: a run goes on with numbers of ranks that it did not start with."""

import pytest

from torchrec_hilomoe.config import DataConfig, RunConfig, TrainConfig
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.inputs import loader_of


def config(batch_size, shards):
    data = DataConfig(train_rows=960, num_canonical_shards=shards)
    return RunConfig(data=data, train=TrainConfig(batch_size=batch_size))


@pytest.mark.parametrize(("starts_with", "goes_on_with"), [(4, 3), (3, 2), (2, 4)])
def test_a_common_multiple_lets_a_run_go_on_with_every_number(starts_with, goes_on_with):
    run = config(96, shards=12)  # of 2, 3 and 4
    first = loader_of(run, "train", World(size=starts_with))
    assert first.num_canonical_shards == 12
    assert (
        loader_of(run, "train", World(size=goes_on_with), start=first.start).num_canonical_shards
        == 12
    )


def test_without_it_a_run_on_four_does_not_go_on_with_three():
    run = config(96, shards=None)
    first = loader_of(run, "train", World(size=4))
    with pytest.raises(ValueError, match="8 canonical shards, which 3 ranks cannot share"):
        loader_of(run, "train", World(size=3), start=first.start)


def test_it_is_a_multiple_and_as_many_as_without_where_it_can_be():
    assert loader_of(config(96, shards=2), "train", World(size=2)).num_canonical_shards == 8


def test_evaluation_does_not_care():
    assert loader_of(config(96, shards=12), "valid", World(size=2)).num_canonical_shards == 8


def test_a_batch_that_cannot_be_shared_is_told():
    told = r"num_canonical_shards 12 and 4 ranks must divide train.batch_size, got 64\. Take 60 or"
    with pytest.raises(ValueError, match=told):
        loader_of(config(64, shards=12), "train", World(size=4))
    with pytest.raises(ValueError, match=r"got 8\. Take 12\."):
        loader_of(config(8, shards=12), "train", World(size=4))


def test_none_at_all_is_refused():
    with pytest.raises(
        ValueError, match=r"data.num_canonical_shards must be at least 1 or null, got 0\."
    ):
        DataConfig(num_canonical_shards=0)
