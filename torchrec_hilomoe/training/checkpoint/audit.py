"""Whether a checkpoint holds exactly the tensors that a model and its optimizers want."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_hilomoe.training.checkpoint.errors import CheckpointError

__all__ = ["CHOICES", "OF_A_RANK", "Audit", "audit"]

CHOICES = "choices."

# Tensors that belong to one rank, not to the model: a rank of another job may have none.
OF_A_RANK = ("rng.", "rng_device.", "window.", CHOICES)
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What differs, and may.

    Attributes:
        fresh: Names that keep the value that they have: missing from the checkpoint, or of
            another size there.
        ignored: Names that only the checkpoint has.
    """

    fresh: frozenset[str]
    ignored: frozenset[str]


def audit(
    path: str,
    metadata: Metadata,
    wanted: Mapping[str, tuple[int, ...]],
    allow_missing: Sequence[str] = (),
    *,
    recut: Container[str] = (),
) -> Audit:
    """Refuse a checkpoint that does not hold the wanted tensors, optimizer state included.

    Args:
        path: For the message.
        metadata: The checkpoint's index.
        wanted: Name to size of every tensor that the ranks hold together.
        allow_missing: Patterns of names that may differ.
        recut: Names whose other size is no difference.

    Raises:
        CheckpointError: Listing what is missing, unexpected or of another size.
    """
    entries = metadata.state_dict_metadata
    # DCP unpickles what is no tensor, and with it any code; that is never allowed.
    objects = [key for key, it in entries.items() if not isinstance(it, TensorStorageMetadata)]
    saved = {
        key: tuple(entry.size)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(OF_A_RANK)
    }
    missing = dict.fromkeys(wanted.keys() - entries.keys(), "missing from the checkpoint")
    extra = dict.fromkeys(saved.keys() - wanted.keys(), "in the checkpoint only")
    reshaped = {
        key: f"{saved[key]} in the checkpoint, {wanted[key]} in the model"
        for key in saved.keys() & wanted.keys()
        if saved[key] != wanted[key] and key not in recut
    }
    problems = [f"{key}: is not a tensor in the checkpoint" for key in objects]
    problems += [
        f"{key}: {text}"
        for key, text in (missing | extra | reshaped).items()
        if not any(fnmatchcase(key, pattern) for pattern in allow_missing)
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit this model: {len(problems)} differences.\n  "
            f"{shown}{more}\nUse the configuration that it was saved with (config.yaml in it), or "
            "name what may differ with --allow_missing '[PATTERN, ...]'."
        )
    return Audit(fresh=frozenset(missing | reshaped), ignored=frozenset(extra))
