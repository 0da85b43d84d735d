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


@pytest.mark.parametrize("ranks", [1, 96])
def test_memory_is_drawn_in_proportion(ranks, tmp_path):
    wide = replace(MODEL, embedding_dim=16)
    options = ShardingConfig(hbm="1GB", tables={"user": TableSharding(type="row_wise")})
    config = RunConfig(model=wide, train=TrainConfig(batch_size=96 * 64), sharding=options)
    cluster = Cluster(world_size=ranks)
    blue = (31, 119, 180)  # of the largest table
    shares = []
    for name, rows in (("small", 1_000), ("large", 4_000_000)):
        schema = replace(SCHEMA, tables={**SCHEMA.tables, "user": rows})
        file = tmp_path / "plans" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        draw_plan(plan_run(config, schema, cluster), file)
        shares.append(color_share(matplotlib.image.imread(file), blue))
    assert shares[1] > 2 * shares[0]
    assert shares[1] > 0.1
