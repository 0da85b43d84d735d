"""Stages: who computes, who learns, for how long, as data.

A schedule is a list of stages. The trainer reads it; nothing else in the package knows a stage's
name, so that users can write their own.
"""

from torchrec_hilomoe.config.rates import Decay, DecayKind
from torchrec_hilomoe.config.stage import OptimizerName, Plateau, Stage
from torchrec_hilomoe.training.stages.course import Course, CourseState
from torchrec_hilomoe.training.stages.schedule import StageSchedule, StageSpan

__all__ = [
    "Course",
    "CourseState",
    "Decay",
    "DecayKind",
    "OptimizerName",
    "Plateau",
    "Stage",
    "StageSchedule",
    "StageSpan",
]
