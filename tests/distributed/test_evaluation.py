"""Metrics over all ranks: the same for any number of them, however the rows are spread."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.datasets import toy_source
from tests.helpers.models import in_memory, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.sharded import assembled, load_whole
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.metrics import compute_metrics, Metrics, Predictions
from torchrec_hilomoe.training.pipelines.pipeline import evaluate

ROWS = 37


def metrics_of_shares(whole: dict[str, Tensor]) -> tuple[Metrics, Metrics]:
    """Metrics of fixed predictions of which rank 0 holds one, and of a model's on the toy data."""
    rank, size = dist.get_rank(), dist.get_world_size()
    predictions = Predictions()
    logits, labels, groups = fixed()
    share = np.array_split(np.arange(1, ROWS), size - 1)[rank - 1] if rank else np.array([0])
    share = np.arange(ROWS) if size == 1 else share
    for at in np.array_split(share, 2):  # two batches, of which rank 0's second is empty
        rows = torch.from_numpy(at)
        predictions.add(logits[rows], labels[rows], groups[rows], torch.ones(len(rows)))
    assembly = assembled(RunConfig(model=MODEL))
    load_whole(assembly.model, whole)
    loader = Loader(
        toy_source(ROWS), batch_size=24, world=World(rank=rank, size=size), epochs=1, prefetch=0
    )
    return predictions.metrics(), evaluate(assembly.model, assembly.optimizers, loader)


def fixed() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(ROWS, generator=rng).round(decimals=1)  # with ties
    labels = torch.randint(0, 2, (ROWS,), generator=rng).float()
    return logits, labels, torch.randint(0, 6, (ROWS,), generator=rng)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_metrics_do_not_depend_on_the_number_of_ranks(ranks):
    whole = {name: t.detach() for name, t in in_memory().state_dict().items()}
    results = run_ranks(metrics_of_shares, ranks, whole)
    assert all(repr(result) == repr(results[0]) for result in results)  # NaN is not equal to NaN
    of_fixed, of_model = results[0]
    logits, labels, groups = (tensor.numpy() for tensor in fixed())
    assert asdict(of_fixed) == rounded(asdict(compute_metrics(logits, labels, groups)), ROWS)
    assert of_model.rows == ROWS

    task = in_memory()
    task.load_state_dict(whole)
    task.eval()
    predictions = []
    for batch in Loader(toy_source(ROWS), batch_size=24, epochs=1, prefetch=0):
        with torch.no_grad():
            _, output = task(batch)
        predictions.append((output.logits, output.labels, output.grouping_keys))
    columns = [torch.cat(column).numpy() for column in zip(*predictions, strict=True)]
    want = compute_metrics(*columns)
    # Logits are of float32, for which as many terms stand as their model has weights.
    terms = sum(parameter.numel() for parameter in task.parameters())
    assert asdict(of_model) == rounded(asdict(want), terms, torch.float32)
