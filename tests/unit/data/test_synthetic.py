"""Generated data: reproducible, fresh, in range, and drawn from the stated probabilities."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from tests.helpers.rounding import rounded
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.synthetic import SyntheticSource, WORLDS, write_synthetic
from torchrec_hilomoe.data.synthetic.source import PROBABILITY
from torchrec_hilomoe.training.metrics.definitions import best_auc

ROWS = 3 * 4096 + 17


def make_source(world: Any = "composed", split="train", rows=ROWS, seed=0):
    return SyntheticSource(world=world, split=split, rows=rows, seed=seed)


def fingerprints(table):
    """Dense values, three together: two rows that share all three are one row."""
    columns = (table[f"dense_{i:02d}"].to_pylist() for i in range(3))
    return set(zip(*columns, strict=True))


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def table(world):
    """About sixteen thousand rows of a world."""
    source = make_source(world, rows=4 * 4096)
    return pa.concat_tables([source.read(0, block) for block in range(4)])


def test_a_block_is_the_same_whoever_reads_it_and_in_whatever_order(world):
    one, other = make_source(world), make_source(world)
    forwards = [one.read(1, block) for block in range(4)]
    backwards = [other.read(1, block) for block in reversed(range(4))]
    assert all(a.equals(b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_a_block_does_not_depend_on_how_many_follow():
    assert make_source(rows=4096).read(0, 0).equals(make_source(rows=ROWS).read(0, 0))


@pytest.mark.parametrize(
    "other",
    [{"epoch": 1}, {"block": 1}, {"split": "valid"}, {"split": "test"}, {"seed": 1}],
    ids=str,
)
def test_no_row_occurs_twice(other):
    source = make_source(split=other.get("split", "train"), seed=other.get("seed", 0))
    fresh = source.read(other.get("epoch", 0), other.get("block", 0))
    seen = make_source().read(0, 0)
    assert not fingerprints(fresh) & fingerprints(seen)


def test_splits_share_users_items_and_the_map():
    """A model of one split's clicks must be right about another's: same leaf for every item."""
    leaves = {}
    for split in ("train", "test"):
        table = make_source(split=split).read(0, 0)
        leaves[split] = dict(
            zip(table["item"].to_pylist(), table["category"].to_pylist(), strict=True)
        )
    common = leaves["train"].keys() & leaves["test"].keys()
    assert len(common) > 500
    assert all(leaves["train"][item] == leaves["test"][item] for item in common)


def test_columns_and_rows_are_the_promised_ones(world):
    source = make_source(world)
    assert sum(source.block_rows) == ROWS
    for block, rows in enumerate(source.block_rows):
        table = source.read(0, block)
        assert table.num_rows == rows
        assert set(table.column_names) == {*source.schema.columns, PROBABILITY}
    assert source.describe(2) == f"synthetic-{world}, train block 2"


def test_ids_are_within_their_tables_and_leave_padding_alone(world, table):
    schema = make_source(world).schema
    for feature in schema.id_features:
        ids = table[feature.name]
        if pa.types.is_list(ids.type):
            ids = ids.combine_chunks().flatten()
        assert 1 <= np.min(ids) <= np.max(ids) < schema.tables[feature.table], feature.name


def test_histories_are_parallel_and_fit_the_schema(world, table):
    group = make_source(world).schema.sequences[0]
    items, leaves = (table[field.name].combine_chunks() for field in group.fields)
    assert items.value_lengths().equals(leaves.value_lengths())
    lengths = items.value_lengths().to_numpy()
    assert lengths.max() <= group.max_length
    assert lengths.min() == 0, "empty histories are part of life"


def test_events_and_candidates_agree_on_the_leaf_of_an_item(table):
    items = np.concatenate([table["item"], table["item_history"].combine_chunks().flatten()])
    leaves = np.concatenate(
        [table["category"], table["category_history"].combine_chunks().flatten()]
    )
    pairs = np.unique(np.stack([items, leaves]), axis=1)
    assert pairs.shape[1] == len(np.unique(items))


def test_labels_are_drawn_from_the_probabilities(table):
    """In tenths of the probability, the click rate is the mean probability, within 5 sigma."""
    probability, label = table[PROBABILITY].to_numpy(), table["label"].to_numpy()
    order = np.argsort(probability)
    for tenth in np.array_split(order, 10):
        p = probability[tenth]
        sigma = np.sqrt((p * (1 - p)).sum())
        assert abs(label[tenth].sum() - p.sum()) < 5 * sigma


def test_click_rate_and_best_auc_are_those_of_an_advertisement_log(world):
    source = make_source(world, split="test", rows=16_384)
    table = pa.concat_tables([source.read(0, block) for block in range(4)])
    assert 0.1 < np.mean(table["label"]) < 0.3
    assert 0.85 < best_auc(source) < 0.93


def test_best_auc_is_the_auc_of_the_probabilities():
    source = make_source(split="valid")
    table = pa.concat_tables([source.read(0, b) for b in range(len(source.block_rows))])
    expected = roc_auc_score(table["label"].to_numpy(), table[PROBABILITY].to_numpy())
    assert best_auc(source) == rounded(expected, terms=len(table))


def test_a_written_folder_is_read_as_the_same_rows(tmp_path):
    out = str(tmp_path / "set")
    write_synthetic(out, world="tree", train_rows=20_000, eval_rows=300, seed=3)
    source = make_source("tree", rows=20_000, seed=3)
    files = ParquetSource(out, "train")
    assert files.schema == source.schema
    made, read = (
        pa.concat_tables([rows.read(0, block) for block in range(len(rows.block_rows))])
        for rows in (source, files)
    )
    assert read.equals(made.select(read.column_names))
    assert sum(ParquetSource(out, "test").block_rows) == 300


def test_the_loader_finds_no_bad_row():
    batches = list(Loader(make_source(rows=5000), batch_size=1000, epochs=1, max_bad_rows=0))
    assert sum(batch.weights.sum().item() for batch in batches) == 5000


def test_writing_never_touches_a_folder_in_use(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that are no prepared data"):
        write_synthetic(str(tmp_path), train_rows=10, eval_rows=10)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("world", "flat", r"world must be one of .*'composed'.*, got 'flat'"),
        ("split", "dev", r"split must be one of .*'valid'.*, got 'dev'"),
        ("rows", 0, r"rows must be at least 1, got 0"),
        ("seed", -1, r"seed must not be negative, got -1"),
    ],
)
def test_rejects(field, value, message):
    with pytest.raises(ValueError, match=message):
        make_source(**{field: value})
