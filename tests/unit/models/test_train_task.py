"""The loss over the global batch, and what metrics need."""

from dataclasses import replace

import pytest
import torch
from torchrec.fx import Tracer

from tests.helpers.models import batches, in_memory, MODEL
from torchrec_hilomoe.runtime.world import World

ROWS = 13


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    click = torch.sigmoid(logits.double())
    return -(labels * click.log() + (1 - labels) * (1 - click).log())


def test_the_loss_is_the_mean_over_rows_that_count():
    task, batch = in_memory(), next(batches(ROWS, ROWS))
    weights = torch.ones(ROWS)
    weights[[0, 5]] = 0.0  # bad records keep their place in the batch
    batch = replace(batch, weights=weights, mean_rows=float(ROWS - 2))
    loss, output = task(batch)
    want = cross_entropy(output.logits, batch.labels)[weights > 0].mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert output.loss.item() == loss.item()


def test_the_average_over_ranks_is_the_loss_of_the_global_batch():
    """However unevenly the rows are spread: 13 rows over 2 ranks, the last batch has 5."""
    task = in_memory().eval()
    (alone, last), shares = list(batches(ROWS, 8)), []
    for rank in range(2):
        shares.append(list(batches(ROWS, 8, world=World(rank=rank, size=2))))
    for at, batch in enumerate((alone, last)):
        losses = [task(share[at])[0].item() for share in shares]
        assert sum(losses) / 2 == pytest.approx(task(batch)[0].item(), rel=1e-5)


def test_outputs_carry_no_gradient_and_the_batchs_position():
    task, batch = in_memory(), next(batches(ROWS, 8))
    loss, output = task(batch)
    assert loss.requires_grad
    assert not output.loss.requires_grad
    assert not output.logits.requires_grad
    assert torch.equal(output.labels, batch.labels)
    assert torch.equal(output.weights, batch.weights)
    assert torch.equal(output.groups, batch.groups)
    assert (output.position, output.mean_rows) == (batch.position, batch.mean_rows)


def test_a_row_without_weight_has_no_gradient():
    task, batch = in_memory(replace(MODEL, hilomoe=None)), next(batches(1, 1))
    loss, _ = task(replace(batch, weights=torch.zeros(1)))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
def test_is_fx_traceable_around_its_lookups(training):
    """What TorchRec's pipelines trace; a branch on a tensor would break them."""
    task, batch = in_memory().train(training), next(batches(ROWS, ROWS))
    leaves = ["EmbeddingCollection", "EmbeddingBagCollection"]
    traced = torch.fx.GraphModule(task, Tracer(leaf_modules=leaves).trace(task))
    (loss, output), (want_loss, want) = traced(batch), task(batch)
    assert torch.equal(loss, want_loss)
    assert torch.equal(output.logits, want.logits)
    assert output.position == want.position
