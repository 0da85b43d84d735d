"""A checkpoint, open for reading: what run it is of, and tensors for a model that wants just those.

Its manifest is parsed once, when it is opened. Loading compares its files with their checksums,
and its tensors with those that the model wants, before it changes any.
"""

import logging
import pickle
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.documents import DocumentError, read_text
from torchrec_hilomoe.training.checkpoint.manifest import (
    cause_of,
    CheckpointError,
    Progress,
    read_manifest,
)
from torchrec_hilomoe.training.checkpoint.reshard import find_resharded_states, load_resharded_state
from torchrec_hilomoe.training.checkpoint.state import (
    CHOICES,
    device_rng,
    flatten,
    OF_A_RANK,
    PROBE,
    sizes_over_ranks,
)
from torchrec_hilomoe.training.checkpoint.storage import Folder, Reader, verify_checksums
from torchrec_hilomoe.training.non_finite import any_rank, find_non_finite, listed

__all__ = ["Checkpoint", "Loaded", "newest_sound", "open"]

logger = logging.getLogger(__name__)

SCHEMA = "schema.json"
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint gave.

    Attributes:
        filled: Names of the tensors that were filled.
        fresh: Names of the tensors that keep the value that they had: missing from the checkpoint,
            or of another size there.
        rank_state: Tensors that the ranks saved for themselves, this rank's share of them, in
            nested mappings; empty if there are none.
    """

    filled: frozenset[str]
    fresh: frozenset[str]
    rank_state: Mapping[str, Any]


def open(path: str | Path) -> "Checkpoint":
    """Open the checkpoint at ``path``.

    Raises:
        CheckpointError: If there is none, its manifest is damaged, or its format is another.
    """
    return Checkpoint(path)


def newest_sound(folder: str | Path) -> "Checkpoint | None":
    """Open the newest checkpoint of a run that can be gone on with, if there is any; collective.

    Later ones that are damaged, or hold values that are no numbers, are passed over and told.

    Raises:
        CheckpointError: If there are some, and none of them can be gone on with.
    """
    problems = []
    for _, path in sorted(Folder(folder).checkpoints().items(), reverse=True):
        try:
            found = Checkpoint(path)
            found.verify()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("passed over: %s", problem)
        return found
    if problems:
        raise CheckpointError(
            f"no checkpoint in {folder} can be gone on with: {' '.join(problems)} Or begin anew in "
            "another --out_dir."
        )
    return None


class Checkpoint:
    """A whole checkpoint, open for reading.

    Args:
        path: A folder ``step_N``, local or remote.

    Attributes:
        path: Folder of the checkpoint.
        progress: Progress of its run when it was saved.

    Raises:
        CheckpointError: If there is none, its manifest is damaged, or its format is another.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        manifest = read_manifest(self.path)
        self.progress: Progress = manifest.progress
        self._files = manifest.files
        self._verified = False

    def has(self, name: str) -> bool:
        """Return whether a file lies in it."""
        return name in self._files

    def document(self, name: str) -> str:
        """Return a text that lies beside the tensors.

        Raises:
            CheckpointError: If it is missing, or no text.
        """
        try:
            return read_text(f"{self.path}/{name}")
        except DocumentError as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.path} is incomplete: {name} cannot be read "
                f"({error.strerror or error})."
            ) from error

    @property
    def schema(self) -> Schema:
        """The columns that it was trained on.

        Raises:
            CheckpointError: If they are missing or damaged.
        """
        text = self.document(SCHEMA)
        try:
            return Schema.from_json(text)
        except ValueError as error:
            raise self._damaged(f"{self.path}/{SCHEMA}: {error}".rstrip(".")) from error

    def schema_differences(self, schema: Schema) -> tuple[str, ...]:
        """Say where its columns ("here") and others ("there") differ, whatever their data set.

        Raises:
            CheckpointError: If its own are missing or damaged.
        """
        return replace(self.schema, dataset=schema.dataset).differences(schema)

    def check_schema(self, schema: Schema) -> None:
        """Refuse a checkpoint of other columns.

        Raises:
            CheckpointError: Listing what differs.
        """
        if differences := self.schema_differences(schema):
            shown = "\n  ".join(differences)
            raise CheckpointError(
                f"checkpoint {self.path} (here) and the data (there) have different schemas: "
                f"{len(differences)} differences.\n  {shown}\n"
                "Give the data that it was trained on, or prepared in the same way (--data.path)."
            )

    def verify(self) -> None:
        """Look at every byte and every number, shared out over the ranks; a collective call.

        Raises:
            CheckpointError: If a file is not what was written, or a number is none.
        """
        verify_checksums(self.path, self._files)
        names, garbled = [], []
        try:
            names = Reader(self.path).non_finite(dist.get_rank(), dist.get_world_size())
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            garbled = [str(error)]
        if garbled := any_rank(garbled):
            raise self._damaged("; ".join(garbled))
        self._refuse_non_finite(any_rank(names))
        self._verified = True

    def load(
        self,
        state: Mapping[str, Any],
        *,
        allow_missing: Sequence[str] = (),
        restore_random: bool = True,
    ) -> Loaded:
        """Fill ``state``'s tensors, in place; a collective call.

        Args:
            state: Tensors, replicated or sharded over any number of ranks, in nested mappings.
            allow_missing: Patterns of names that may be missing on either side, or have another
                size; they keep their values.
            restore_random: Whether this rank's random state is restored, if the checkpoint has one
                for it.

        Raises:
            CheckpointError: If it is damaged or holds what is no number, or a tensor is missing on
                either side or has another size.
        """
        if not self._verified:
            verify_checksums(self.path, self._files)
        reader, flat = Reader(self.path), flatten(state)
        try:
            metadata = reader.read_metadata()
            sizes = sizes_over_ranks(flat)
            resharded = {it.name: it for it in find_resharded_states(metadata, flat, sizes)}
            fresh = self._audit(metadata, sizes, allow_missing, resharded)
            apart = fresh | resharded.keys()
            whole = {name: value for name, value in flat.items() if name not in apart}
            own = _of_this_rank(metadata)
            dcp.load({**whole, **own}, storage_reader=reader)
            for name, it in resharded.items():
                load_resharded_state(it, flat.get(name), reader)
        except (OSError, pickle.UnpicklingError, dcp.CheckpointException) as error:
            raise self._damaged(cause_of(error)) from error
        self._refuse_non_finite(find_non_finite(whole))
        if resharded:
            names = ", ".join(resharded)
            logger.info("tables are cut into other columns than in %s: %s", self.path, names)
        rank = dist.get_rank()
        if restore_random and f"rng.rank{rank}" in own:
            torch.set_rng_state(own[f"rng.rank{rank}"])
            if f"rng_device.rank{rank}" in own and device_rng() is not None:
                torch.cuda.set_rng_state(own[f"rng_device.rank{rank}"])
        return Loaded(
            filled=frozenset(flat.keys() - fresh), fresh=fresh, rank_state=_rank_state(own)
        )

    def _damaged(self, cause: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.path} is incomplete or damaged: {cause}. Give an older one with "
            "--resume PATH."
        )

    def _refuse_non_finite(self, names: Sequence[str]) -> None:
        if names:
            raise CheckpointError(
                f"checkpoint {self.path} holds infinity or NaN in {listed(names)}, so that nothing "
                "can be trained on it. Give an older one with --resume PATH."
            )

    def _audit(
        self,
        metadata: Metadata,
        wanted: Mapping[str, tuple[int, ...]],
        allow_missing: Sequence[str],
        resharded: Container[str],
    ) -> frozenset[str]:
        """Refuse a checkpoint that does not hold the wanted tensors, optimizer state included.

        Args:
            metadata: Its index.
            wanted: Name to size of every tensor that the ranks hold together.
            allow_missing: Patterns of names that may differ.
            resharded: Names whose other size is no difference.

        Returns:
            Names that keep the value that they have.

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
            if saved[key] != wanted[key] and key not in resharded
        }
        differing = missing | extra | reshaped
        problems = [f"{key}: is not a tensor in the checkpoint" for key in objects]
        problems += [
            f"{key}: {text}"
            for key, text in differing.items()
            if not any(fnmatchcase(key, pattern) for pattern in allow_missing)
        ]
        if problems:
            shown = "\n  ".join(sorted(problems)[:SHOWN])
            more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise CheckpointError(
                f"checkpoint {self.path} does not fit this model: {len(problems)} differences.\n  "
                f"{shown}{more}\n{_remedy(self.path, missing, extra)}"
            )
        if differing:
            logger.info(
                "allowed to differ from %s, and left as they are: %s",
                self.path,
                listed(sorted(differing)),
            )
        return frozenset(missing | reshaped)


def _remedy(path: str, missing: Iterable[str], extra: Iterable[str]) -> str:
    changed = (
        (".hilomoe_router.", ".router.", "a shared router was part of its first site"),
        (".sparse.pooled.", ".sparse.unpooled.", "a candidate's tables were apart from others"),
    )
    for now, before, said in changed:
        if any(now in name for name in missing) and any(before in name for name in extra):
            return (
                f"It was saved when {said}. Convert it: python -m torchrec_hilomoe.convert {path} "
                "NEW_FOLDER"
            )
    return (
        "Use the configuration that it was saved with (config.yaml in it), or name what may "
        "differ with --allow_missing '[PATTERN, ...]'."
    )


def _of_this_rank(metadata: Metadata) -> dict[str, Tensor]:
    """Room for what belongs to a rank: its own random state, and its share of all windows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    room = {}
    for name, entry in metadata.state_dict_metadata.items():
        kind, _, saved_by = name.rpartition(".rank")
        if not isinstance(entry, TensorStorageMetadata) or not saved_by.isdecimal():
            continue
        shared_out = kind == "window" or kind.startswith(f"{PROBE}sums.")
        if (
            (kind.startswith(("rng", CHOICES)) and int(saved_by) == rank)
            or (shared_out and int(saved_by) % size == rank)
            or kind.startswith(f"{PROBE}shared.")
        ):
            room[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return room


def _rank_state(own: Mapping[str, Tensor]) -> dict[str, Any]:
    windows = [tensor for name, tensor in own.items() if name.startswith("window.")]
    choices = {
        name.removeprefix(CHOICES).rpartition(".rank")[0]: counts
        for name, counts in own.items()
        if name.startswith(CHOICES)
    }
    probe: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name.startswith(PROBE):
            key = name.removeprefix(PROBE).rpartition(".rank")[0]
            probe[key] = probe[key] + tensor if key in probe else tensor
    found = {"window": torch.cat(windows), "choices": choices} if windows else {}
    return found | ({"probe": probe} if probe else {})
