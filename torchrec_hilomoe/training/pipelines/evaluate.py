"""Metrics of a sharded model on a split."""

from collections.abc import Callable, Iterable

from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.metrics import Metrics, Predictions
from torchrec_hilomoe.training.optimizers.learners import Learners
from torchrec_hilomoe.training.pipelines.pipeline import predict

__all__ = ["evaluate"]


def evaluate(
    model: DistributedModelParallel,
    learners: Learners,
    batches: Iterable[CTRBatch],
    each: Callable[[TaskOutput], None] = lambda _: None,
) -> Metrics:
    """Return the metrics of ``batches``, over all ranks; a collective call.

    The model, detached from a training pipeline, is left in evaluation mode; ``each`` is called
    with the output of every batch, in their order.
    """
    predictions = Predictions()
    for output in predict(model, learners.combined, iter(batches)):
        predictions.add(output.logits, output.labels, output.groups, output.weights)
        each(output)
    return predictions.metrics()
