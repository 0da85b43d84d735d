"""Stages: who computes, who learns, for how long, as data.

A schedule is a list of stages. The trainer reads it; nothing else in the package knows a stage's
name, so that users can write their own.
"""

from torchrec_hilomoe.config.stage import Decay, OptimizerName, PlateauConfig, Stage
from torchrec_hilomoe.training.stages.schedule import StageSchedule, StageSpan
from torchrec_hilomoe.training.stages.timeline import StageTimeline, StageTimelineState

__all__ = [
    "Decay",
    "OptimizerName",
    "PlateauConfig",
    "Stage",
    "StageSchedule",
    "StageSpan",
    "StageTimeline",
    "StageTimelineState",
]
