"""Starting from a trained plain model: what is taken over, what is fresh, what must not differ.

Injection keeps every base parameter's name, so names map to themselves. What the experts brought,
and their optimizer's state, is fresh; anything else that differs is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer

__all__ = ["WarmStart", "warm_start"]

# Optimizers that a plain run of another configuration has not: see ``OptimizersContainer``.
ALWAYS_FRESH = ("optimizer.state.experts*", "optimizer.state.backbone_*", "loss_scale.*")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a start from a checkpoint did.

    Attributes:
        path: The checkpoint.
        model: Names of the model's tensors that were taken over.
        optimizer: Names of the optimizers' tensors that were taken over.
        fresh: Names of the experts' tensors, which keep the values that they were drawn with.
    """

    path: str
    model: tuple[str, ...]
    optimizer: tuple[str, ...]
    fresh: tuple[str, ...]

    def text(self) -> str:
        """One line for the log."""
        fresh = f"fresh: {', '.join(self.fresh)}" if self.fresh else "nothing is fresh"
        return (
            f"started from {self.path}: {len(self.model)} tensors of the model and "
            f"{len(self.optimizer)} of its optimizers taken over; {fresh}"
        )


def warm_start(
    path: str,
    model: DistributedModelParallel,
    optimizers: OptimizersContainer,
    *,
    with_optimizer: bool,
) -> WarmStart:
    """Fill a model, fresh but sharded, from a checkpoint; a collective call.

    Args:
        path: A checkpoint of this package, of any number of ranks.
        model: Takes over everything but experts.
        optimizers: Take over the states of tables and backbone.
        with_optimizer: Whether they do; false starts them afresh, which large row-wise Adagrad
            steps make felt.

    Raises:
        CheckpointError: Listing what is missing, unexpected or of another size.
    """
    saved = checkpoint.open(path.rstrip("/"))
    state = {"model": model.state_dict(), **(optimizers.state_dict() if with_optimizer else {})}
    fresh = [f"model.{name}" for name in expert_parameters(model.module)]
    allowed = [*fresh, *ALWAYS_FRESH, *([] if with_optimizer else ["optimizer.*"])]
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
        optimizer=_of("optimizer.", taken),
        fresh=_of("model.", sorted(loaded.fresh)),
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
