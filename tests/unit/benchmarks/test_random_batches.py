"""Random batches are such as the loader gives, whatever the schema."""

from dataclasses import replace

import pytest
import torch

from benchmarks.random_batches import click_log, draw, draw_batches, draw_lengths, Stream
from benchmarks.throughput.feeds import table_of, write_folder
from tests.helpers.datasets import SCHEMA, TableSource
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource

(CLICKS, VIEWS) = SCHEMA.sequences
TIMED = replace(
    SCHEMA, time="shown", weight="counts", sequences=(replace(CLICKS, time="click_times"), VIEWS)
)
SCHEMAS = pytest.mark.parametrize(
    "schema", [SCHEMA, TIMED, click_log(50, 6)], ids=["toy", "timed", "log"]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_ids(one, other):
    assert one.keys() == other.keys()
    assert one.stride() == other.stride()
    assert one.length_per_key() == other.length_per_key()
    for mine, its in ((one.values(), other.values()), (one.lengths(), other.lengths())):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


@SCHEMAS
def test_a_file_of_them_is_read_as_the_same_batch(schema):
    drawn = draw(Stream(schema=schema, mean_length=2), 30, generator())
    table = table_of(Stream(schema=schema, mean_length=2), drawn)
    loader = Loader(TableSource((table,), schema), batch_size=30, shuffle=False, epochs=1)
    (read,) = loader
    assert_same_ids(drawn.unpooled, read.unpooled)
    assert_same_ids(drawn.pooled, read.pooled)
    for name in ("dense", "labels", "weights"):
        mine, its = getattr(drawn, name), getattr(read, name)
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its), name
    assert (drawn.max_seqlen, drawn.num_tokens, drawn.loss_denominator) == (
        read.max_seqlen,
        read.num_tokens,
        read.loss_denominator,
    )
    assert len(drawn.times) == len(read.times)
    assert all(torch.equal(a, b) for a, b in zip(drawn.times, read.times, strict=True))
    assert (drawn.time is None) == (read.time is None)


def test_a_folder_of_them_is_a_prepared_one(tmp_path):
    stream = Stream(schema=click_log(50, 6), mean_length=3)
    write_folder(str(tmp_path / "data"), stream, 10_000)
    source = ParquetSource(str(tmp_path / "data"), "train")
    assert sum(source.block_rows) == 10_000
    assert source.schema == stream.schema
    rows = [len(batch.labels) for batch in Loader(source, batch_size=1000, epochs=1)]
    assert rows == [1000] * 10


def test_ids_are_rows_of_their_tables_and_none_is_padding():
    batch = draw(Stream(schema=click_log(5, 6), mean_length=6), 500, generator())
    items = batch.unpooled["item"].values()
    assert set(items.tolist()) == {1, 2, 3, 4}


def test_skewed_ids_are_low_ones():
    even, skewed = (
        draw(Stream(schema=click_log(1000, 6), mean_length=6, skew=skew), 500, generator())
        for skew in (1.0, 4.0)
    )
    means = [batch.unpooled["item"].values().double().mean().item() for batch in (even, skewed)]
    assert 450 < means[0] < 550
    assert 150 < means[1] < 250  # a fifth of the rows, the mean of u^4


def test_lengths_are_full_or_about_their_mean():
    assert set(draw_lengths(100, 8, 8, generator()).tolist()) == {8}
    lengths = draw_lengths(10_000, 5, 1000, generator())
    assert lengths.min() >= 1
    assert 4.3 < lengths.double().mean().item() < 5.2


def test_ranks_share_a_global_batch():
    stream = Stream(schema=click_log(50, 6), mean_length=3)
    kwargs = {"batch_size": 11, "ranks": 3, "device": torch.device("cpu")}
    shares = [draw_batches(stream, 2, rank=rank, **kwargs) for rank in range(3)]
    assert [[len(batch.labels) for batch in share] for share in shares] == [[3, 3], [4, 4], [4, 4]]
    assert {batch.loss_denominator for share in shares for batch in share} == {11 / 3}
    again = draw_batches(stream, 2, rank=1, **kwargs)
    assert torch.equal(again[1].unpooled.values(), shares[1][1].unpooled.values())
    assert not torch.equal(again[0].labels, again[1].labels)


@pytest.mark.gpu
def test_they_are_made_on_the_device():
    device = torch.device("cuda")
    stream = Stream(schema=TIMED, mean_length=2)
    (batch,) = draw_batches(stream, 1, batch_size=8, rank=0, ranks=1, device=device)
    tensors = [batch.unpooled.values(), batch.pooled.lengths(), batch.dense, batch.labels]
    tensors += [batch.weights, batch.grouping_keys, *batch.times]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert batch.time is not None
    assert batch.time.is_cuda
