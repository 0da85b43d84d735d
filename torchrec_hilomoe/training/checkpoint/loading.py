"""A checkpoint, read into a model and its optimizers."""

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.paths import open_text
from torchrec_hilomoe.training.checkpoint.audit import audit, CHOICES
from torchrec_hilomoe.training.checkpoint.errors import cause_of, CheckpointError
from torchrec_hilomoe.training.checkpoint.index import Reader
from torchrec_hilomoe.training.checkpoint.marker import read_marker
from torchrec_hilomoe.training.checkpoint.recut import find_recuts, load_recut
from torchrec_hilomoe.training.checkpoint.saver import device_rng
from torchrec_hilomoe.training.checkpoint.state import flatten, OpenWindow, sizes_over_ranks
from torchrec_hilomoe.training.checkpoint.storage import find_damage

__all__ = ["check_schema", "load", "read_document"]

logger = logging.getLogger(__name__)

SCHEMA = "schema.json"


def load(
    path: str | Path,
    state: Mapping[str, Any],
    *,
    allow_missing: Sequence[str] = (),
    restore_random: bool = True,
) -> OpenWindow | None:
    """Fill ``state``'s tensors from a checkpoint, in place; a collective call.

    Args:
        path: The checkpoint, saved on any number of ranks.
        state: Tensors, replicated or sharded, in nested mappings.
        allow_missing: Patterns of names that may be missing on either side, or have another
            size; they keep their values.
        restore_random: Whether this rank's random state is restored, if the checkpoint has one
            for it.

    Returns:
        The window that was open, this rank's share of its rows, if there is one.

    Raises:
        CheckpointError: If it is damaged, or a tensor is missing on either side or has another
            size.
    """
    find_damage(str(path), read_marker(path).files)
    reader = Reader(str(path))
    flat = flatten(state)
    try:
        metadata = reader.read_metadata()
        sizes = sizes_over_ranks(flat)
        recuts = {recut.name: recut for recut in find_recuts(metadata, flat, sizes)}
        checked = audit(str(path), metadata, sizes, allow_missing, recut=recuts)
        apart = checked.fresh | recuts.keys()
        whole = {name: value for name, value in flat.items() if name not in apart}
        own = _of_this_rank(metadata)
        dcp.load({**whole, **own}, storage_reader=reader)
        for name, recut in recuts.items():
            load_recut(recut, flat.get(name), reader)
    except (OSError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete or damaged: {cause_of(error)}. Give an older one "
            "with --resume PATH."
        ) from error
    if checked.fresh or checked.ignored:
        names = ", ".join(sorted(checked.fresh | checked.ignored))
        logger.info("allowed to differ from %s, and left as they are: %s", path, names)
    if recuts:
        logger.info("tables are cut into other columns than in %s: %s", path, ", ".join(recuts))
    rank = dist.get_rank()
    if restore_random and f"rng.rank{rank}" in own:
        torch.set_rng_state(own[f"rng.rank{rank}"])
        if f"rng_device.rank{rank}" in own and device_rng() is not None:
            torch.cuda.set_rng_state(own[f"rng_device.rank{rank}"])
    return _window(own)


def read_document(path: str | Path, name: str) -> str:
    """Return a text that lies beside a checkpoint's tensors.

    Raises:
        CheckpointError: If it is missing.
    """
    try:
        with open_text(f"{path}/{name}") as source:
            return source.read()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete: {name} cannot be read ({error.strerror or error})."
        ) from error


def check_schema(path: str | Path, schema: Schema) -> None:
    """Refuse a checkpoint of other columns.

    Raises:
        CheckpointError: Listing what differs.
    """
    saved = Schema.from_json(read_document(path, SCHEMA))
    differences = replace(saved, dataset=schema.dataset).differences(schema)
    if differences:
        shown = "\n  ".join(differences)
        raise CheckpointError(
            f"checkpoint {path} (here) and the data (there) have different schemas: "
            f"{len(differences)} differences.\n  {shown}\n"
            "Give the data that it was trained on, or prepared in the same way (--data.path)."
        )


def _window(own: Mapping[str, Tensor]) -> OpenWindow | None:
    rows = [tensor for name, tensor in own.items() if name.startswith("window.")]
    choices = {
        name.removeprefix(CHOICES).rpartition(".rank")[0]: counts
        for name, counts in own.items()
        if name.startswith(CHOICES)
    }
    return OpenWindow(rows=torch.cat(rows), choices=choices) if rows else None


def _of_this_rank(metadata: Metadata) -> dict[str, Tensor]:
    """Room for what belongs to a rank: its own random state, and its share of all windows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    room = {}
    for name, entry in metadata.state_dict_metadata.items():
        kind, _, saved_by = name.rpartition(".rank")
        if not isinstance(entry, TensorStorageMetadata) or not saved_by.isdecimal():
            continue
        if (kind.startswith(("rng", CHOICES)) and int(saved_by) == rank) or (
            kind == "window" and int(saved_by) % size == rank
        ):
            room[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return room
