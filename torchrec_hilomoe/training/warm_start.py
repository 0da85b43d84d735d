"""Starting from another run's model: what is taken over, what is fresh, what must not differ.

Injection keeps every base parameter's name, so names map to themselves. From a plain model's
checkpoint, what the experts brought and their optimizer's state is fresh; one that has the same
experts gives them, too. Vectors that come with the data are this run's data's. Anything else that
differs is an error, unless the user has named it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.hilomoe.inject import expert_names
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer

__all__ = ["WarmStart", "warm_start"]

logger = logging.getLogger(__name__)

# Optimizers that a plain run of another configuration has not: see ``OptimizersContainer``.
ALWAYS_FRESH = ("optimizer.state.experts*", "optimizer.state.backbone_*", "loss_scale.*")
OF_THE_DATA = "model.model.sparse.given.*"  # as ``load_frozen_tables`` has filled them


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a start from a checkpoint did.

    Attributes:
        path: The checkpoint.
        model: Names of the model's tensors that were taken over.
        experts: Names of those among them that are the experts'.
        optimizer: Names of the optimizers' tensors that were taken over.
        fresh: Names of the model's tensors that keep the values that they were drawn with: the
            experts', and those that were allowed to differ.
        given: Names of the frozen tables, which keep the vectors that came with the data.
        age: Optimizer steps that the model had learned for.
    """

    path: str
    model: tuple[str, ...]
    experts: tuple[str, ...]
    optimizer: tuple[str, ...]
    fresh: tuple[str, ...]
    given: tuple[str, ...]
    age: int

    def text(self) -> str:
        """One line for the log."""
        trained = ""
        if self.experts:
            trained = (
                f", {len(self.experts)} of them those of trained experts, which stages that train "
                "experts alone train further"
            )
        fresh = f"fresh: {', '.join(self.fresh)}" if self.fresh else "nothing is fresh"
        given = f"; as the data has them: {', '.join(self.given)}" if self.given else ""
        return (
            f"started from {self.path}: {len(self.model)} tensors of the model and "
            f"{len(self.optimizer)} of its optimizers taken over{trained}; {fresh}{given}"
        )


def warm_start(
    path: str,
    model: DistributedModelParallel,
    optimizers: OptimizersContainer,
    *,
    with_optimizer: bool,
    allow_missing: Sequence[str] = (),
) -> WarmStart:
    """Fill a model, fresh but sharded, from a checkpoint; a collective call.

    The checkpoint may be of other data, whose columns differ where no tensor's size tells; a
    warning lists how they do.

    Args:
        path: A checkpoint of this package, of any number of ranks.
        model: Takes over everything but experts that the checkpoint does not have, or not in
            their size, and frozen tables.
        optimizers: Take over the states of tables and backbone, and of experts that are taken over.
        with_optimizer: Whether they do; false starts them afresh, which large row-wise Adagrad
            steps make felt.
        allow_missing: Patterns of names of other tensors that may be missing on either side, or
            have another size; they stay fresh.

    Raises:
        CheckpointError: Listing what is missing, unexpected or of another size.
    """
    saved, task = checkpoint.open(path.rstrip("/")), model.module
    assert isinstance(task, TrainTask)
    _tell_differences(saved, task)
    whole = model.state_dict()
    given = [name for name in whole if fnmatchcase(f"model.{name}", OF_THE_DATA)]
    own = {name: tensor for name, tensor in whole.items() if name not in given}
    state = {"model": own, **(optimizers.state_dict() if with_optimizer else {})}
    experts = {f"model.{name}" for name in expert_names(task)}
    allowed = [*experts, OF_THE_DATA, *ALWAYS_FRESH, *allow_missing]
    allowed += [] if with_optimizer else ["optimizer.*"]
    try:
        loaded = saved.load(state, allow_missing=allowed, restore_random=False)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(_for_users(str(error), with_optimizer)) from error
    if with_optimizer:
        optimizers.load_state_dict(state)
    taken = sorted(loaded.filled)
    return WarmStart(
        path=saved.path,
        model=_of("model.", taken),
        experts=_of("model.", [name for name in taken if name in experts]),
        optimizer=_of("optimizer.", taken),
        fresh=_of("model.", sorted(loaded.fresh)),
        given=tuple(given),
        age=saved.progress.age,
    )


def _tell_differences(saved: checkpoint.Checkpoint, task: TrainTask) -> None:
    """Tables may have grown, and histories too, but what ids and numbers mean must be the same."""
    differences = saved.schema_differences(task.model.sparse.schema)
    if differences and dist.get_rank() == 0:
        shown = "\n  ".join(differences)
        logger.warning(
            "init_from: checkpoint %s (here) and the data (there) have different schemas. What is "
            "taken over fits only where ids, numbers and their order mean the same.\n  %s",
            saved.path,
            shown,
        )


def _of(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _for_users(message: str, with_optimizer: bool) -> str:
    remedy = (
        "init_from wants a model that is the same but for its experts: the same backbone, sizes "
        "and tables."
    )
    if with_optimizer and "optimizer." in message:
        remedy += " With another optimizer than the checkpoint's, --train.init_optimizer false."
    return f"{message} {remedy}"
