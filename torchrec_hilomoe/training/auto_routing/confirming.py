"""What experts have brought by the end of their warm-up, on rows that nothing was trained on.

While experts warm up the rest is frozen, so the model without them is still the one that they were
added to, and what both say of the same rows can be compared. Later the backbone leans on them.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.checkpoint import Brought

__all__ = ["brought_by_experts", "brought_of", "sums_of"]

NORMAL_95 = 1.96  # standard errors on either side of a mean, for 95 %
LEAST_ROWS = 100  # of equal weight, for such an interval


@torch.no_grad()
def brought_by_experts(
    model: DistributedModelParallel, batches: Iterable[CTRBatch], *, step: int
) -> Brought | None:
    """Compare the loss of rows with the experts and without them; a collective call.

    A row's gain is the logloss without experts less that with them; the interval is that of a
    weighted mean, rows being independent.

    Args:
        model: In no pipeline; left in evaluation mode.
        batches: Rows that nothing was trained on, as many batches on every rank.
        step: Optimizer steps done.

    Returns:
        What they brought, the same on every rank; None if the rows are worth fewer than 100 of
        equal weight, or one has no finite loss, of which training will tell.
    """
    task = model.module
    assert isinstance(task, TrainTask)
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=model.device)
    # A compiled backbone is not compiled once more for two passes.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = batch.to(model.device)
            with_experts_B = _losses(task, batch)
            with _experts_off(task):
                gains_B = _losses(task, batch) - with_experts_B
            sums += sums_of(gains_B, batch.weights.double())
    dist.all_reduce(sums)
    return brought_of(sums, step=step)


def sums_of(gains_B: Tensor, weights_B: Tensor) -> Tensor:
    """What the rows of a batch add to the sums of which :func:`brought_of` makes an interval."""
    weighed_B = weights_B * gains_B
    return torch.stack(
        [
            (weights_B > 0).sum().double(),
            weights_B.sum(),
            weights_B.square().sum(),
            weighed_B.sum(),
            (weights_B * weighed_B).sum(),
            weighed_B.square().sum(),
        ]
    )


def brought_of(sums: Tensor, *, step: int) -> Brought | None:
    """The weighted mean of gains and its 95 % interval; None where the rows tell of none."""
    rows, weight, weight_squared, weighed, twice_weighed, weighed_squared = sums.tolist()
    # Kish's effective number of rows, weight^2 / weight_squared
    if weight**2 < LEAST_ROWS * weight_squared or weight == 0 or not math.isfinite(weighed_squared):
        return None
    gain = weighed / weight
    # sum of w^2 (d - gain)^2, of which rounding may leave less than nothing
    spread = weighed_squared - 2 * gain * twice_weighed + gain**2 * weight_squared
    error = NORMAL_95 * math.sqrt(max(0.0, spread)) / weight
    return Brought(step=step, gain=gain, low=gain - error, high=gain + error, rows=int(rows))


def _losses(task: TrainTask, batch: CTRBatch) -> Tensor:
    """Logloss of each row, ``(B,)`` in float64."""
    _, output = task(batch)
    return F.binary_cross_entropy_with_logits(
        output.logits.double(), output.labels.double(), reduction="none"
    )


@contextmanager
def _experts_off(task: TrainTask) -> Iterator[None]:
    active = {site: site.active_layers for site in sites_of(task).values()}
    try:
        for site in active:
            site.active_layers = 0
        yield
    finally:
        for site, layers in active.items():
            site.active_layers = layers
