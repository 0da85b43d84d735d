"""A plan is drawn, whatever its size, with every part that it has."""

from dataclasses import replace

import matplotlib.image
import pytest

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import RunConfig, ShardingConfig, TableSharding, TrainConfig
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run
from torchrec_hilomoe.planning.plots import draw_plan


def color_share(picture, color: tuple[int, int, int]) -> float:
    """The share of pixels of a colour, in the upper half, where memory is."""
    upper = (picture[: len(picture) // 2, :, :3] * 255).round()
    return float((upper == color).all(axis=-1).mean())


def shares_of(sizes, ranks, folder) -> list[float]:
    """The share that is blue, the largest table's colour, with so many rows in that table."""
    wide = replace(MODEL, embedding_dim=16)
    options = ShardingConfig(hbm="1GB", tables={"user": TableSharding(type="row_wise")})
    config = RunConfig(model=wide, train=TrainConfig(batch_size=96 * 64), sharding=options)
    shares = []
    for rows in sizes:
        schema = replace(SCHEMA, tables={**SCHEMA.tables, "user": rows})
        file = folder / "plans" / f"{rows}.png"
        file.parent.mkdir(exist_ok=True)
        draw_plan(plan_run(config, schema, Cluster(world_size=ranks)), file)
        shares.append(color_share(matplotlib.image.imread(file), (31, 119, 180)))
    return shares


@pytest.mark.slow
def test_memory_is_drawn_in_proportion(tmp_path):
    """Each million rows adds as much: ends of bars are off by a row of pixels at most."""
    one, two, three = shares_of((1_000_000, 2_000_000, 3_000_000), 1, tmp_path)
    picture = matplotlib.image.imread(tmp_path / "plans" / "3000000.png")
    row = 1 / (len(picture) // 2)
    assert two - one > 2 * row
    assert abs((three - two) - (two - one)) <= 2 * row


def test_many_ranks_are_one_band(tmp_path):
    small, large = shares_of((1_000, 4_000_000), 96, tmp_path)
    assert large > 2 * small
