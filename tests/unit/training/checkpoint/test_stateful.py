"""Whatever a checkpoint keeps beside the model is one of torch's ``Stateful``."""

import pytest
from torch.distributed.checkpoint.stateful import Stateful

from torchrec_hilomoe.hilomoe.monitor import RoutingLog
from torchrec_hilomoe.training.log.run_log import StepLog
from torchrec_hilomoe.training.log.window import Window
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer
from torchrec_hilomoe.training.optimizers.precision import LossScale
from torchrec_hilomoe.training.stages import StageTimeline
from torchrec_hilomoe.training.stages.metric_tracker import MetricTracker

KEPT = [LossScale, MetricTracker, OptimizersContainer, RoutingLog, StageTimeline, StepLog, Window]


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_is_stateful(kind):
    assert issubclass(kind, Stateful)
