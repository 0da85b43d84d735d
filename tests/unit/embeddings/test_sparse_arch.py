"""Lookups laid out: each vector where the schema says, against one lookup at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers.datasets import SCHEMA, without
from tests.helpers.models import batches
from tests.helpers.rounding import assert_within, by_chance, of_sums
from torchrec_hilomoe.backbones.layers.jagged import mean_rows
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import FrozenTable, IdFeature, Schema, SequenceGroup
from torchrec_hilomoe.embeddings.features import HistoryWidths, ModelInputs, SequenceFeatures
from torchrec_hilomoe.embeddings.freezing import freeze_lookups
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch

DIM = 4
ROWS = 9


def arch(schema: Schema = SCHEMA) -> SparseArch:
    return SparseArch(schema, DIM, torch.device("cpu"))


def run(sparse: SparseArch, batch: CTRBatch) -> SequenceFeatures:
    return sparse(ModelInputs.of(batch))


def table(sparse: SparseArch, name: str) -> Tensor:
    found = [p for key, p in sparse.named_parameters() if key.endswith(f".{name}.weight")]
    assert len(found) == 1
    return found[0]


def test_the_candidate_is_its_fields_in_the_order_of_the_schema():
    sparse, batch = arch(), next(batches(ROWS, ROWS))
    found = run(sparse, batch).candidate
    for row in range(ROWS):
        item, kind = (int(batch.unpooled[key].values()[row]) for key in ("item", "kind"))
        want = torch.cat([table(sparse, "item")[item], table(sparse, "kind")[kind]])
        assert torch.equal(found[row], want)


def test_histories_are_jagged_and_use_the_candidates_tables():
    sparse, batch = arch(), next(batches(ROWS, ROWS))
    clicks, views = run(sparse, batch).histories
    assert torch.equal(clicks.lengths, batch.unpooled["clicks_item"].lengths().long())
    assert torch.equal(views.lengths, batch.unpooled["views_item"].lengths().long())
    items, kinds = (batch.unpooled[key].values() for key in ("clicks_item", "clicks_kind"))
    want = torch.cat([table(sparse, "item")[items], table(sparse, "kind")[kinds]], dim=1)
    assert torch.equal(clicks.events, want)
    assert torch.equal(views.events, table(sparse, "item")[batch.unpooled["views_item"].values()])


def test_the_target_is_laid_out_like_an_event_with_zeros_for_what_only_events_have():
    clicks = SequenceGroup(
        name="clicks",
        fields=(
            IdFeature(name="clicks_kind", table="kind"),
            IdFeature(name="clicks_place", table="place"),  # a property that no candidate has
            IdFeature(name="clicks_item", table="item"),
        ),
        max_length=4,
    )
    sparse = arch(replace(SCHEMA, sequences=(clicks,), pooled=()))
    unpooled = KeyedJaggedTensor.from_lengths_sync(
        keys=["item", "kind", "clicks_kind", "clicks_place", "clicks_item"],
        values=torch.tensor([7, 8, 1, 2, 3, 3, 9]),
        lengths=torch.tensor([1, 1, 1, 1, 1, 0, 1, 0, 1, 0]),
    )
    given = ModelInputs(pooled=unpooled, unpooled=unpooled, dense=torch.empty(2, 0), max_seqlen=1)
    (history,) = sparse(given).histories
    item, kind, place = (table(sparse, name) for name in ("item", "kind", "place"))
    assert torch.equal(history.events, torch.cat([kind[[3]], place[[3]], item[[9]]], dim=1))
    want = torch.cat([kind[[1, 2]], torch.zeros(2, DIM), item[[7, 8]]], dim=1)
    assert torch.equal(history.target, want)
    assert sparse.widths.histories[0].event_only == (1,)


def test_the_context_is_pooled_features_in_order_then_dense_ones():
    sparse, batch = arch(), next(batches(ROWS, ROWS))
    found = run(sparse, batch).context
    largest = max(weight.abs().max().item() for weight in sparse.parameters())
    assert found.shape == (ROWS, 3 * DIM + 2)
    for row in range(ROWS):
        pooled = []
        for key, name in (("user", "user"), ("place", "place"), ("tags", "tag")):
            ids = batch.pooled[key].to_dense()[row]
            vectors = table(sparse, name)[ids]
            pooled.append(vectors.double().mean(dim=0) if len(ids) else torch.zeros(DIM))
        want = torch.cat([*pooled, batch.dense[row].double()])
        terms = batch.pooled["tags"].lengths().max().item()
        unit = of_sums(int(terms)) * torch.finfo(torch.float32).eps
        assert_within(found[row], want, unit * max(want.abs().max().item(), largest))


def test_pooled_features_have_one_gradient_together():
    """A slice of each would have one as wide as all of them, for every feature."""
    context = run(arch(), next(batches(ROWS, ROWS))).sample
    assert context.grad_fn is not None
    seen, ahead = set(), [context.grad_fn]
    while ahead:
        node = ahead.pop()
        seen.add(node.name())
        ahead += [before for before, _ in node.next_functions if before is not None]
    assert "SplitWithSizesBackward0" in seen
    assert "SliceBackward0" not in seen


def test_only_lists_are_averaged():
    sparse = arch()
    assert sparse.pooled is not None
    found = {table.name: table.pooling for table in sparse.pooled.embedding_bag_configs()}
    one, many = PoolingType.SUM, PoolingType.MEAN
    assert found == {"user": one, "place": one, "tag": many}


@pytest.mark.parametrize("kinds", [("pooled",), ("dense",), ("pooled", "dense"), ("sequences",)])
def test_kinds_of_features_may_be_absent(kinds):
    schema = without(SCHEMA, *kinds)
    sparse = arch(schema)
    batch = next(batches(ROWS, ROWS))
    dense = batch.dense if schema.dense else torch.empty(ROWS, 0)
    every = KeyedJaggedTensor.concat([batch.unpooled, batch.pooled])
    places = {key: place for place, key in enumerate(every.keys())}
    unpooled, pooled = (
        every.permute([places[key] for key in keys])
        for keys in (schema.unpooled_keys, schema.pooled_keys)
    )
    inputs = replace(ModelInputs.of(batch), unpooled=unpooled, pooled=pooled, dense=dense)
    features = sparse(inputs)
    for place, field in enumerate(schema.candidate):
        vectors = table(sparse, field.table)[every[field.name].values().long()]
        assert torch.equal(features.candidate[:, place * DIM : (place + 1) * DIM], vectors)
    widths = sparse.widths
    assert features.context.shape == (ROWS, widths.context)
    assert features.candidate.shape == (ROWS, widths.candidate)
    assert [h.events.shape[1] for h in features.histories] == [w.event for w in widths.histories]


def test_widths_are_those_of_the_features():
    widths = arch().widths
    assert (widths.candidate, widths.context) == (2 * DIM, 3 * DIM + 2)
    assert widths.histories == (
        HistoryWidths(event=2 * DIM, max_length=4),
        HistoryWidths(event=DIM, max_length=3),
    )


def test_a_table_that_both_collections_use_has_two_copies():
    pooled = (replace(SCHEMA.pooled[0], table="item"),)
    sparse = arch(replace(SCHEMA, pooled=pooled))
    assert sparse.pooled is not None
    assert list(sparse.pooled.embedding_bags) == ["item_pooled"]
    assert sparse.unpooled is not None
    assert list(sparse.unpooled.embeddings) == ["item", "kind"]


def test_without_histories_one_collection_has_all_tables():
    user, *others = without(SCHEMA, "sequences").pooled
    schema = replace(without(SCHEMA, "sequences"), pooled=(replace(user, table="item"), *others))
    sparse = arch(schema)
    assert (sparse.unpooled, schema.unpooled_keys) == (None, ())
    assert sparse.pooled is not None
    shared = sparse.pooled.embedding_bag_configs()[0].feature_names
    assert shared == [schema.candidate[0].name, user.name]
    whole = {table: FrozenTable(file="x.npy", width=8) for table in schema.tables}
    with pytest.raises(ValueError, match="has every table .*a table that is trained"):
        arch(replace(schema, frozen=whole))


def test_candidate_and_history_learn_into_one_table():
    sparse, batch = arch(), next(batches(ROWS, ROWS))
    weight = table(sparse, "item")
    features = run(sparse, batch)
    from_candidate = torch.autograd.grad(features.candidate.sum(), weight, retain_graph=True)[0]
    from_events = torch.autograd.grad(features.histories[1].events.sum(), weight)[0]
    assert from_candidate.any()
    assert from_events.any()


def test_frozen_lookups_are_the_same_numbers_without_a_gradient():
    sparse, batch = arch(), next(batches(ROWS, ROWS))
    learning = run(sparse, batch)
    freeze_lookups(sparse, True)
    frozen = run(sparse, batch)
    for features, learns in ((learning, True), (frozen, False)):
        events, targets = zip(*((h.events, h.target) for h in features.histories), strict=True)
        vectors = [features.candidate, features.context, *events, *targets]
        assert all(tensor.requires_grad == learns for tensor in vectors)
    assert torch.equal(learning.candidate, frozen.candidate)
    assert torch.equal(learning.context, frozen.context)


def test_vectors_start_near_zero_and_differ():
    weight = table(arch(replace(SCHEMA, tables={**SCHEMA.tables, "item": 5000})), "item")
    deviation = 0.1 / DIM**0.5
    of_mean = deviation / weight.numel() ** 0.5
    assert weight.mean().item() == by_chance(0.0, of_mean)
    # A sample's deviation deviates by less than its mean does, of whatever light-tailed law.
    assert weight.std().item() == by_chance(deviation, of_mean)


@pytest.mark.parametrize("embed_dense", [False, True])
def test_columns_are_where_each_feature_stands(embed_dense):
    """In candidate, context and a history's mean event: what one feature changes, it alone has."""
    sparse = SparseArch(SCHEMA, DIM, torch.device("cpu"), embed_dense=embed_dense)
    batch = next(batches(ROWS, ROWS))

    def joined(changed: str) -> Tensor:
        ids = {"pooled": batch.pooled, "unpooled": batch.unpooled}
        for kind, jagged in ids.items():
            if changed in jagged.keys():  # noqa: SIM118  # no mapping
                place = jagged.keys().index(changed)
                start, end = jagged.offset_per_key()[place : place + 2]
                values = jagged.values().clone()
                values[start:end] = (values[start:end] + 1) % SCHEMA.tables[tables[changed]]
                ids[kind] = KeyedJaggedTensor(jagged.keys(), values, lengths=jagged.lengths())
        dense = batch.dense.clone()
        if changed in SCHEMA.dense:
            dense[:, SCHEMA.dense.index(changed)] += 1
        found = sparse(replace(ModelInputs.of(batch), **ids, dense=dense))
        return torch.cat([found.candidate, found.context, *map(mean_rows, found.histories)], dim=1)

    tables = {feature.name: feature.table for feature in SCHEMA.id_features}
    before = joined("nothing")
    assert set(sparse.columns) == {*tables, *SCHEMA.dense}
    assert sum(map(len, sparse.columns.values())) == before.shape[1]
    for name, columns in sparse.columns.items():
        changed = (joined(name) != before).any(dim=0).nonzero().flatten().tolist()
        assert changed == list(columns), name
