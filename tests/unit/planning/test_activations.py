"""Bytes saved for the backward pass, counted without numbers, are those of a real forward pass."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm
from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.models.build import BACKBONES, build_task
from torchrec_hilomoe.planning.activations import (
    full_features,
    saved_activations,
    saved_bytes,
)

ROWS = 7


def really_saved(backbone, widths, dtype, rows=ROWS) -> int:
    owned = [*backbone.parameters(), *backbone.buffers()]
    resident = {tensor.untyped_storage().data_ptr() for tensor in owned}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that its memory is not given out again
        return tensor

    kept = []
    with (
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        backbone.train()(full_features(widths, rows))
    return sum(saved.values())


@pytest.mark.parametrize("experts", ["none", "head"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_counted_without_numbers_as_with_them(name, experts):
    hilomoe = MODEL.hilomoe if experts == "head" else InjectionConfig(enabled=False)
    config = replace(MODEL, backbone=name, hilomoe=hilomoe, dropout=0.1)
    model = build_task(config, SCHEMA).model
    counted = saved_bytes(model.backbone, model.sparse.widths, ROWS, None)
    assert counted == really_saved(model.backbone, model.sparse.widths, None)
    assert counted > ROWS * SCHEMA.sequences[0].max_length * config.embedding_dim * 4


@pytest.mark.parametrize("name", ["bst", "din"])
def test_a_row_in_reduced_precision_is_counted(name):
    """Of a batch, PyTorch's shapes take a norm's statistics for bfloat16, which are float32."""
    model = build_task(replace(MODEL, backbone=name), SCHEMA).model
    few, more = (
        saved_bytes(model.backbone, model.sparse.widths, rows, torch.bfloat16) for rows in (7, 70)
    )
    real_few, real_more = (
        really_saved(model.backbone, model.sparse.widths, torch.bfloat16, rows) for rows in (7, 70)
    )
    assert more - few == real_more - real_few
    norms = [m for m in model.backbone.modules() if isinstance(m, GlobalBatchNorm)]
    statistics = sum(2 * norm.num_features for norm in norms)  # a mean and a deviation
    assert 0 <= real_few - few <= 2 * statistics


def test_a_line_goes_through_all_batches_and_nothing_is_changed():
    model = build_task(MODEL, SCHEMA).model
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model.backbone.eval()
    line = saved_activations(model.backbone, model.sparse.widths, None)
    for rows in (64, 1000, 5000):
        counted = saved_bytes(model.backbone, model.sparse.widths, rows, None)
        assert line.bytes(rows) == counted
    assert not model.backbone.training
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
