"""Tables that come with the data: loaded, projected by feature, never trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches
from tests.helpers.rounding import assert_within, of_sums
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.schema import FrozenTable, IdFeature, Schema
from torchrec_hilomoe.embeddings.features import ModelInputs, SequenceFeatures
from torchrec_hilomoe.embeddings.frozen import load_frozen_tables
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch

DIM = 4
ROWS = 9
# Widths of their own: one used by candidate and histories, one pooled.
FROZEN = replace(
    SCHEMA,
    frozen={
        "kind": FrozenTable(width=8, file="kind.npy"),
        "tag": FrozenTable(width=12, file="sub/tag.npy"),
    },
)


def vectors(schema: Schema, table: str) -> np.ndarray:
    shape = (schema.tables[table], schema.frozen[table].width)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> str:
    (tmp_path / "sub").mkdir()
    for name, table in FROZEN.frozen.items():
        np.save(tmp_path / table.file, vectors(FROZEN, name))
    return str(tmp_path)


@pytest.fixture
def sparse(folder) -> SparseArch:
    made = SparseArch(FROZEN, DIM, torch.device("cpu"))
    load_frozen_tables(made, folder)
    return made


def run(sparse: SparseArch) -> SequenceFeatures:
    batch = next(batches(ROWS, ROWS))
    return sparse(ModelInputs.of(batch))


def projection(sparse: SparseArch, feature: str) -> Tensor:
    found = sparse.projections[feature]
    assert isinstance(found, torch.nn.Linear)
    assert found.bias is None
    return found.weight


def test_every_feature_projects_the_given_vectors_by_a_map_of_its_own(sparse):
    batch, found = next(batches(ROWS, ROWS)), run(sparse)
    kinds, tags = (torch.from_numpy(vectors(FROZEN, name)) for name in ("kind", "tag"))

    def projected(x: Tensor, feature: str) -> tuple[Tensor, Tensor]:
        """In float64, and what float32 makes of the terms."""
        weight = projection(sparse, feature).double()
        unit = of_sums(x.shape[-1] + 4) * torch.finfo(torch.float32).eps  # 4: a mean before
        return F.linear(x.double(), weight), unit * F.linear(x.double().abs(), weight.abs())

    target, rounding = projected(kinds[batch.unpooled["kind"].values()], "kind")
    assert_within(found.candidate[:, DIM:], target, rounding)
    assert_within(found.histories[0].target[:, DIM:], target, rounding)
    ids = batch.unpooled["clicks_kind"].values()
    assert_within(found.histories[0].events[:, DIM:], *projected(kinds[ids], "clicks_kind"))
    for row, ids in enumerate(batch.pooled["tags"].to_dense()):
        mean = tags[ids].double().mean(dim=0) if len(ids) else torch.zeros(12)
        _, rounding = projected(tags[ids].abs().sum(dim=0), "tags")
        want, _ = projected(mean, "tags")
        assert_within(found.context[row, 2 * DIM : 3 * DIM], want, rounding)
    assert len({projection(sparse, name).data_ptr() for name in sparse.projections}) == 3


def test_widths_do_not_tell_frozen_features_from_others(sparse):
    assert sparse.widths == SparseArch(SCHEMA, DIM, torch.device("cpu")).widths
    found = run(sparse)
    assert found.candidate.shape == (ROWS, sparse.widths.candidate)
    assert found.context.shape == (ROWS, sparse.widths.context)


def test_only_the_projections_learn(sparse):
    found = run(sparse)
    total = found.candidate.sum() + found.context.sum() + found.histories[0].events.sum()
    total.backward()
    assert all(table.grad is None for table in sparse.frozen_tables)
    assert all(table.grad is not None for table in sparse.trained_tables)
    assert all(weight.grad is not None for weight in sparse.projections.parameters())


def test_every_parameter_is_a_table_or_replicated_and_frozen_ones_are_counted_apart(sparse):
    named = {id(p) for p in sparse.parameters()}
    parts = [sparse.trained_tables, sparse.frozen_tables, tuple(sparse.projections.parameters())]
    assert sorted(map(id, (p for part in parts for p in part))) == sorted(named)
    assert sum(p.numel() for p in sparse.frozen_tables) == 5 * 8 + 9 * 12
    assert {id(p) for p in sparse.tables} == {id(p) for part in parts[:2] for p in part}


@pytest.mark.parametrize("histories", [True, False])
def test_a_candidate_of_nothing_but_given_vectors_is_refused(histories):
    kind = IdFeature(name="kind", table="kind")
    group = replace(SCHEMA.sequences[0], fields=(replace(kind, name="kinds"),))
    schema = replace(FROZEN, candidate=(kind,), sequences=(group,) if histories else (), pooled=())
    said = " of the candidate and the histories" if histories else ""
    with pytest.raises(ValueError, match=rf"has every table{said} \(kind, tag\); give at"):
        SparseArch(schema, DIM, torch.device("meta"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, r"frozen table 'kind' cannot be read from .*kind\.npy .*Prepare the data again"),
        (b"text", r"frozen table 'kind' cannot be read from .*kind\.npy"),
        (np.zeros((5, 9), np.float32), r"shape \(5, 9\), .*float32 of shape \(5, 8\) for"),
        (np.zeros((5, 8)), r"holds float64 of shape \(5, 8\), the schema wants float32"),
    ],
)
def test_a_file_that_does_not_fit_is_named(folder, tmp_path, file, message):
    path = tmp_path / "kind.npy"
    path.unlink()
    if isinstance(file, bytes):
        path.write_bytes(file)
    elif file is not None:
        np.save(path, file)
    with pytest.raises(DataError, match=message):
        load_frozen_tables(SparseArch(FROZEN, DIM, torch.device("cpu")), folder)


def test_dense_features_may_become_embeddings():
    sparse = SparseArch(SCHEMA, DIM, torch.device("cpu"), embed_dense=True)
    batch, found = next(batches(ROWS, ROWS)), run(sparse)
    assert sparse.dense_embedding is not None
    assert (sparse.widths.context, sparse.widths.dense) == (5 * DIM, 0)
    assert found.context.shape == (ROWS, 5 * DIM)
    for place in range(2):
        want = batch.dense[:, place, None] * sparse.dense_embedding[place]
        assert torch.equal(found.context[:, (3 + place) * DIM :][:, :DIM], want)


def test_times_go_to_their_groups():
    clicks, views = SCHEMA.sequences
    timed = replace(SCHEMA, sequences=(clicks, replace(views, time="views_time")), time="time")
    sparse, batch = SparseArch(timed, DIM, torch.device("cpu")), next(batches(ROWS, ROWS))
    moments = torch.arange(len(batch.unpooled["views_item"].values()))
    shown = torch.arange(ROWS)
    given = replace(ModelInputs.of(batch), time=shown, times=(moments,), num_tokens=7)
    found = sparse(given)
    assert [history.times is None for history in found.histories] == [True, False]
    assert torch.equal(found.histories[1].times, moments)
    assert torch.equal(found.time, shown)
    assert found.num_tokens == 7
    assert [history.timed for history in sparse.widths.histories] == [False, True]
    assert sparse.widths.timed
