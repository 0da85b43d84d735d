"""A batch cut into micro-batches: the same rows, once each, with the batch's denominator."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, in_memory, MODEL
from tests.helpers.rounding import assert_within, rounding_of
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.pipelines.microbatches import split_microbatches

CLICKS, VIEWS = SCHEMA.sequences
TIMED = (replace(CLICKS, time="clicks_time"), VIEWS)
KEYS = {"pooled": SCHEMA.pooled_keys, "unpooled": SCHEMA.unpooled_keys}


def batch(rows: int, *, timed: bool = False) -> CTRBatch:
    (whole,) = batches(rows, rows)
    if not timed:
        return whole
    events = int(whole.unpooled["clicks_item"].lengths().sum())
    return replace(whole, time=torch.arange(rows), times=(torch.arange(events),))


@pytest.mark.parametrize(("rows", "pieces"), [(8, 2), (7, 3), (5, 5), (9, 1)])
def test_pieces_are_the_rows_in_order(rows, pieces):
    whole = batch(rows, timed=True)
    parts = list(split_microbatches(whole, pieces, TIMED))
    assert len(parts) == pieces
    for name in ("dense", "labels", "weights", "grouping_keys", "time"):
        got = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(got, getattr(whole, name)), name
    assert torch.equal(torch.cat([part.times[0] for part in parts]), whole.times[0])
    for kind in ("pooled", "unpooled"):
        jagged = getattr(whole, kind)
        for key in KEYS[kind]:
            split = [getattr(part, kind)[key] for part in parts]
            assert torch.equal(torch.cat([it.values() for it in split]), jagged[key].values())
            assert torch.equal(torch.cat([it.lengths() for it in split]), jagged[key].lengths())
    for part in parts:
        assert part.loss_denominator == whole.loss_denominator
        assert part.pooled.lengths().is_contiguous()
        assert part.unpooled.lengths().is_contiguous()
        assert part.position == whole.position
        assert part.pooled.stride() == part.unpooled.stride() == len(part.labels)
    assert sum(part.num_tokens for part in parts if part.num_tokens is not None) == whole.num_tokens


@pytest.mark.parametrize("rows", [2, 0])
def test_pieces_may_be_without_a_row(rows):
    whole = next(split_microbatches(batch(2), 1 if rows else 3, SCHEMA.sequences))
    parts = list(split_microbatches(whole, 4, SCHEMA.sequences))
    assert [len(part.labels) for part in parts] == ([0, 1, 0, 1] if rows else [0] * 4)
    for part in parts:
        assert part.pooled.stride() == part.unpooled.stride() == 1
        assert part.unpooled.keys() == whole.unpooled.keys()
        lengths = [part.unpooled[key].lengths() for key in ("clicks_item", "views_item")]
        assert part.num_tokens == max(int(of_row.sum()) for of_row in lengths)
    for key in KEYS["unpooled"]:
        values = torch.cat([part.unpooled[key].values() for part in parts])
        assert torch.equal(values, whole.unpooled[key].values())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("pieces", [2, 3, 7, 19])
def test_losses_and_gradients_add_up_to_the_batchs(pieces, backbone):
    """The task's own; auxiliary losses are means over each piece, and scaled by their number."""
    task, whole = in_memory(replace(MODEL, backbone=backbone)).eval(), batch(16)
    set_auxiliary_loss_scale(task, 0.0)
    parts = list(split_microbatches(whole, pieces, SCHEMA.sequences))
    want = loss_and_gradients(task, [whole])
    rounding = rounding_of(loss_and_gradients, task, [whole])
    assert_within(loss_and_gradients(task, parts), want, rounding)


def loss_and_gradients(task: TrainTask, parts: list[CTRBatch]) -> dict[str, Tensor]:
    loss = torch.stack([task(part)[0] for part in parts]).sum()
    named = dict(task.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: g for name, g in zip(named, grads, strict=True) if g is not None}
    return {"loss": loss, **found}
