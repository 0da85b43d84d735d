"""The loss over the global batch, and what metrics need."""

from dataclasses import replace

import pytest
import torch
from torchrec.fx import Tracer

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, in_memory, MODEL
from tests.helpers.rounding import assert_within, rounded, rounding_of
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.microbatches import split_microbatches

ROWS = 13


def loss_of(task: TrainTask, batch: CTRBatch) -> torch.Tensor:
    return task(batch)[0]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    click = torch.sigmoid(logits.double())
    return -(labels * click.log() + (1 - labels) * (1 - click).log())


def test_the_loss_is_the_weighted_sum_over_rows_by_their_number_in_the_batch():
    task, batch = in_memory(), next(batches(ROWS, ROWS))
    batch = replace(batch, weights=torch.rand(ROWS) + 0.5, loss_denominator=ROWS + 2.0)
    loss, output = task(batch)
    want = (cross_entropy(output.logits, batch.labels) * batch.weights).sum() / (ROWS + 2)
    # A row's loss takes a handful of operations; then rows are summed up.
    assert loss.item() == rounded(want.item(), terms=8 + ROWS, dtype=torch.float32)
    assert output.loss.item() == loss.item()


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 2.0), (0.3, 1.0), (1.0, 4.0)])
def test_a_teacher_takes_its_share_of_the_loss(weight, temperature):
    task, batch = in_memory(), next(batches(ROWS, ROWS))
    task.teacher_weight, task.teacher_temperature = weight, temperature
    said = 3 * torch.randn(ROWS)
    loss, output = task(replace(batch, teacher_logits=said))
    target = torch.sigmoid(said.double() / temperature)
    soft = temperature**2 * cross_entropy(output.logits.double() / temperature, target)
    losses = (1 - weight) * cross_entropy(output.logits, batch.labels) + weight * soft
    want = (losses * batch.weights).sum() / batch.loss_denominator
    # Twice a handful of operations a row, and the mixture; then rows are summed up.
    assert loss.item() == rounded(want.item(), terms=20 + ROWS, dtype=torch.float32)


def test_a_batch_without_a_teacher_learns_from_its_labels_alone():
    task, batch = in_memory(), next(batches(ROWS, ROWS))
    task.eval()
    want = task(batch)[0].item()
    task.teacher_weight = 1.0
    assert task(batch)[0].item() == want


def test_micro_batches_keep_what_a_teacher_says():
    said = torch.arange(float(ROWS))
    batch = replace(next(batches(ROWS, ROWS)), teacher_logits=said)
    at = 0
    for part in split_microbatches(batch, 3, SCHEMA.sequences):
        rows = len(part.labels)
        assert part.teacher_logits is not None
        assert torch.equal(part.teacher_logits, said[at : at + rows])
        at += rows
    assert at == ROWS


def test_the_average_over_ranks_is_the_loss_of_the_global_batch():
    """However unevenly the rows are spread: 13 rows over 2 ranks, the last batch has 5."""
    task = in_memory().eval()
    (alone, last), shares = list(batches(ROWS, 8)), []
    for rank in range(2):
        shares.append(list(batches(ROWS, 8, world=World(rank=rank, size=2))))
    for at, batch in enumerate((alone, last)):
        losses = [task(share[at])[0].item() for share in shares]
        rounding = rounding_of(loss_of, task, batch)
        assert_within(torch.tensor(sum(losses) / 2), loss_of(task, batch), rounding)


def test_outputs_carry_no_gradient_and_the_batchs_position():
    task, batch = in_memory(), next(batches(ROWS, 8))
    loss, output = task(batch)
    assert loss.requires_grad
    assert not output.loss.requires_grad
    assert not output.logits.requires_grad
    assert torch.equal(output.labels, batch.labels)
    assert torch.equal(output.weights, batch.weights)
    assert torch.equal(output.grouping_keys, batch.grouping_keys)
    assert (output.position, output.loss_denominator) == (batch.position, batch.loss_denominator)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_batch_without_rows_has_no_loss_and_gradients_of_zero(backbone):
    task = in_memory(replace(MODEL, backbone=backbone, batch_norm=True))
    nothing = next(split_microbatches(next(batches(1, 1)), 2, SCHEMA.sequences))
    before = {key: value.clone() for key, value in task.state_dict().items()}
    loss, output = task(nothing)
    loss.backward()
    assert (loss.item(), output.logits.shape) == (0, (0,))
    assert all(torch.equal(before[key], value) for key, value in task.state_dict().items())
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_is_fx_traceable_around_its_lookups(training, weight):
    """What TorchRec's pipelines trace; a branch on a tensor would break them."""
    task, batch = in_memory().train(training), next(batches(ROWS, ROWS))
    if weight:
        task.teacher_weight = weight
        batch = replace(batch, teacher_logits=torch.randn(ROWS))
    nothing = next(split_microbatches(batch, ROWS + 1, SCHEMA.sequences))
    leaves = ["EmbeddingCollection", "EmbeddingBagCollection"]
    traced = torch.fx.GraphModule(task, Tracer(leaf_modules=leaves).trace(task))
    for rows in (batch, nothing):
        (loss, output), (want_loss, want) = traced(rows), task(rows)
        assert torch.equal(loss, want_loss)
        assert torch.equal(output.logits, want.logits)
        assert output.position == want.position
