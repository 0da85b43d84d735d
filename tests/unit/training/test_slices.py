"""Slices: each row goes with the value that its own batch had, although batches are read ahead."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.datasets import SCHEMA, toy_source
from tests.helpers.models import in_memory
from tests.helpers.rounding import rounded
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.schema_parts import VocabularyRule
from torchrec_hilomoe.training.evaluation import Slicer
from torchrec_hilomoe.training.metrics import compute_metrics
from torchrec_hilomoe.training.pipelines.microbatches import split_microbatches


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("feature", ["item", "place", "user"])
def test_slices_are_those_of_the_rows(feature):
    slicer = Slicer(SCHEMA, feature)
    task = in_memory().eval()
    read = list(Loader(toy_source(90), batch_size=24, epochs=1, prefetch=0))
    nothing = next(
        split_microbatches(read[0], 99, SCHEMA.sequences)
    )  # a rank may have a batch without rows
    batches = list(slicer.watch([nothing, *read]))
    outputs = []
    for batch in batches:  # all were read before the first output
        with torch.no_grad():
            _, output = task(batch)
        outputs.append(output)
        slicer.take(output)
    values = np.concatenate([values_of(batch, feature) for batch in batches])
    columns = [
        torch.cat([getattr(output, name) for output in outputs]).numpy()
        for name in ("logits", "labels", "grouping_keys")
    ]
    found = slicer.metrics()
    assert set(found) == set(values.tolist())
    for value, metrics in found.items():
        want = compute_metrics(*(column[values == value] for column in columns))
        assert metrics.rows == want.rows
        assert metrics.auc == rounded(want.auc, terms=want.rows)
        assert metrics.logloss == rounded(want.logloss, terms=want.rows)


def values_of(batch, feature):
    if feature == "item":
        return batch.unpooled["item"].values().numpy()
    return batch.pooled[feature].values().numpy()


@pytest.mark.parametrize("feature", ["tags", "clicks_item", "price", "nothing"])
def test_what_is_no_column_of_one_id_is_refused(feature):
    with pytest.raises(ValueError, match=f"slice is '{feature}'.*item, kind, place, user"):
        Slicer(SCHEMA, feature)


def test_the_group_may_be_no_feature():
    schema = replace(SCHEMA, group="session")
    assert Slicer(schema, "session").predictions is not None


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("unknown", "names"), [("zero", ["(unknown)", "b", "a"]), ("last", ["(none)", "b", "a"])]
)
def test_slices_have_the_raw_values_where_the_vocabulary_tells_them(tmp_path, unknown, names):
    (tmp_path / "vocabularies").mkdir()
    known = pa.table({"value": ["b", "a"], "id": [1, 2]})
    pq.write_table(known, tmp_path / "vocabularies" / "place.parquet")
    rule = VocabularyRule(kind="counted", unknown=unknown, file="vocabularies/place.parquet")
    schema = replace(SCHEMA, vocabularies={"place": rule})
    last = schema.tables["place"] - 1
    values = torch.tensor([0, 1, 2, last])
    slicer = Slicer(schema, "place", str(tmp_path))
    slicer.predictions.add(torch.zeros(4), torch.ones(4), values, torch.ones(4))
    rest = last if unknown == "zero" else "(unknown)"
    assert set(slicer.metrics()) == {*names, rest}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("values", [["a", "(unknown)"], ["(unknown)", "((unknown))"], ["(none)"]])
@pytest.mark.parametrize("unknown", ["zero", "last"])
def test_no_slice_is_lost_where_a_value_is_called_as_none_or_unknown(tmp_path, unknown, values):
    (tmp_path / "vocabularies").mkdir()
    known = pa.table({"value": values, "id": [*range(1, 1 + len(values))]})
    pq.write_table(known, tmp_path / "vocabularies" / "place.parquet")
    rule = VocabularyRule(kind="counted", unknown=unknown, file="vocabularies/place.parquet")
    rows = len(values) + (2 if unknown == "last" else 1)
    tables = {**SCHEMA.tables, "place": rows}
    schema = replace(SCHEMA, vocabularies={"place": rule}, tables=tables)
    slicer = Slicer(schema, "place", str(tmp_path))
    slicer.predictions.add(
        torch.zeros(rows), torch.ones(rows), torch.arange(rows), torch.ones(rows)
    )
    found = slicer.metrics()
    assert len(found) == rows
    assert set(values) < set(found)
    assert not {str(name).strip("()") for name in {*found} - {*values}} - {"none", "unknown"}
