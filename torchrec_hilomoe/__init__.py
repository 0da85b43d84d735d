"""HiLoMoE, hierarchical rank-1 LoRA experts, for TorchRec rankers (arXiv 2510.10432).

The tree is the flow; read it in this order:

    1  data/        RECORDS -> BATCHES: schema, preparation, generated worlds, exact loader
    2  embeddings/  KJT -> VECTORS: one pooled and one sequence collection, sharded
    3  hilomoe/     THE CONTRIBUTION: linear maps that carry layers of routed experts
    4  backbones/   SEQUENCE FEATURES -> LOGITS: published models, sites declared
    5  models/      PARTS -> MODEL: what is exported, what is trained, what it costs
    6  training/    MODEL -> TRAINED MODEL: stages, optimizers, sharding, the loop, checkpoints
    7  serving/     TRAINED MODEL -> PROBABILITIES: export, the artifact, the scorer
       planning/    what a run needs on machines that are not here;  sweep/: many runs, the best one
       apps/        the commands;  config/, options.py, command_line.py, recipes/: a run
       runtime/     processes, paths, console

The names below are the public ones. They are imported when first used, so that
``python -m torchrec_hilomoe.doctor`` can explain an environment in which torch does not import.
"""

from importlib import import_module
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_hilomoe.hilomoe import (
        HiLoMoEConfig,
        HiLoMoELinear,
        inject_hilomoe,
        inject_shared_router,
        InteractionProbe,
        load_base_checkpoint,
        reference,
        routing_report,
    )
    from torchrec_hilomoe.training.stages import Stage, StageSchedule
    from torchrec_hilomoe.training.stages.driver import StageDriver

__all__ = [
    "HiLoMoEConfig",
    "HiLoMoELinear",
    "InteractionProbe",
    "Stage",
    "StageDriver",
    "StageSchedule",
    "inject_hilomoe",
    "inject_shared_router",
    "load_base_checkpoint",
    "reference",
    "routing_report",
]

__version__ = "0.1.0"

_HOMES = {
    "HiLoMoEConfig": "torchrec_hilomoe.hilomoe",
    "HiLoMoELinear": "torchrec_hilomoe.hilomoe",
    "InteractionProbe": "torchrec_hilomoe.hilomoe",
    "Stage": "torchrec_hilomoe.training.stages",
    "StageDriver": "torchrec_hilomoe.training.stages.driver",
    "StageSchedule": "torchrec_hilomoe.training.stages",
    "inject_hilomoe": "torchrec_hilomoe.hilomoe",
    "inject_shared_router": "torchrec_hilomoe.hilomoe",
    "load_base_checkpoint": "torchrec_hilomoe.hilomoe",
    "routing_report": "torchrec_hilomoe.hilomoe",
}


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("torchrec_hilomoe.hilomoe.reference")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
