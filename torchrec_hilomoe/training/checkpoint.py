"""Checkpoints: whole or absent, audited when loaded, never executed.

A checkpoint is a folder ``step_N`` with TorchRec's sharded state in DCP's format and
``progress.json``. It is written under another name and renamed when every rank is done.
"""

import json
import logging
import pickle
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from torchrec_hilomoe.data.batch import Position

__all__ = ["CheckpointError", "Progress", "latest", "load", "read_progress", "save"]

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
FORMAT = 1
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or not this run's."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside its tensors.

    Attributes:
        step: Optimizer steps done.
        stage: Name of the stage of the last step.
        position: Where the data goes on.
        total_steps: Length of the run, which places its stages.
    """

    step: int
    stage: str
    position: Position
    total_steps: int


def save(folder: Path, state: Mapping[str, Any], progress: Progress, keep: int) -> Path:
    """Write a checkpoint and remove the oldest beyond ``keep``; a collective call.

    Args:
        folder: Holds the run's checkpoints.
        state: Tensors, replicated or sharded, in nested mappings.
        progress: What belongs to them.
        keep: Checkpoints that stay.

    Returns:
        The finished checkpoint.

    Raises:
        CheckpointError: If it cannot be written, as on a full disk.
    """
    final = folder / f"step_{progress.step}"
    partial = folder / f".{final.name}.partial"
    is_main = dist.get_rank() == 0
    whole = {**state, "rng": {f"rank{dist.get_rank()}": torch.get_rng_state()}}
    try:
        if is_main:
            for left_over in folder.glob(".step_*"):  # by a process that was killed while it saved
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(whole, storage_writer=dcp.FileSystemWriter(partial))
        if is_main:
            _write_progress(partial, progress)
            if final.exists():
                _remove(final)
            partial.rename(final)
            for old in _all(folder)[:-keep]:
                _remove(old)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_cause(error)}. Is the disk full? The "
            "checkpoints before it are whole; make room and run again to go on from the newest."
        ) from error
    dist.barrier()
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``, if there is one."""
    found = _all(folder)
    return found[-1] if found else None


def read_progress(path: Path) -> Progress:
    """Read where the run of a checkpoint stood.

    Raises:
        CheckpointError: If there is none at ``path``, or its format is another.
    """
    try:
        raw = json.loads((path / PROGRESS_FILE).read_text())
        known = raw["format"] == FORMAT
        progress = _progress_of(raw) if known else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"there is no checkpoint at {path} ({PROGRESS_FILE} is missing). Give the path of a "
            "folder step_N, or --resume auto to go on from the newest in --out_dir if any."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path / PROGRESS_FILE} is damaged: {error!r}.") from error
    if progress is None:
        raise CheckpointError(
            f"checkpoint {path} has format {raw['format']}, this package reads {FORMAT}."
        )
    return progress


def load(path: Path, state: Mapping[str, Any]) -> None:
    """Fill ``state``'s tensors from a checkpoint, in place; a collective call.

    This rank's random state is restored if the checkpoint has one for it.

    Raises:
        CheckpointError: If it is damaged, or a tensor is missing on either side or has another
            shape.
    """
    reader = _Reader(path)
    rng_key = f"rank{dist.get_rank()}"
    whole: dict[str, Any] = dict(state)
    try:
        metadata = reader.read_metadata()
        audit(path, metadata, _sizes_over_ranks(state))
        if f"rng.{rng_key}" in metadata.state_dict_metadata:
            whole["rng"] = {rng_key: torch.get_rng_state()}
        dcp.load(whole, storage_reader=reader)
    except (OSError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete or damaged: {_cause(error)}. Give an older one with "
            "--resume PATH."
        ) from error
    if "rng" in whole:
        torch.set_rng_state(whole["rng"][rng_key])


def audit(path: Path, metadata: Metadata, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint that does not hold exactly the wanted tensors, optimizer state included.

    Args:
        path: For the message.
        metadata: The checkpoint's index.
        wanted: Name to size of every tensor that the ranks hold together.

    Raises:
        CheckpointError: Listing what is missing, unexpected or of another size.
    """
    entries = metadata.state_dict_metadata
    # DCP unpickles what is no tensor, and with it any code.
    objects = {
        key
        for key, entry in entries.items()
        if not isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    saved = {
        key: tuple(entry.size)
        for key, entry in entries.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata) and not key.startswith("rng.")
    }
    problems = [
        *(f"{key}: is not a tensor in the checkpoint" for key in objects),
        *(f"{key}: missing from the checkpoint" for key in wanted.keys() - entries.keys()),
        *(f"{key}: in the checkpoint only" for key in saved.keys() - wanted.keys()),
        *(
            f"{key}: {saved[key]} in the checkpoint, {wanted[key]} in the model"
            for key in saved.keys() & wanted.keys()
            if saved[key] != wanted[key]
        ),
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise CheckpointError(
            f"checkpoint {path} does not fit this model: {len(problems)} differences.\n  {shown}\n"
            "Use the configuration that it was saved with (config.yaml beside checkpoints/)."
        )


def _write_progress(folder: Path, progress: Progress) -> None:
    described = {
        "format": FORMAT,
        **asdict(progress),
        "world_size": dist.get_world_size(),
        "versions": {name: version(name) for name in ("torch", "torchrec")}
        | {"python": platform.python_version()},
    }
    (folder / PROGRESS_FILE).write_text(json.dumps(described, indent=2) + "\n")


def _progress_of(raw: Mapping[str, Any]) -> Progress:
    return Progress(
        step=raw["step"],
        stage=raw["stage"],
        position=Position(**raw["position"]),
        total_steps=raw["total_steps"],
    )


def _remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed has no checkpoint's name."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))


def _cause(error: BaseException) -> str:
    """One line: DCP's own errors carry every rank's traceback."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
    return str(error)


def _all(folder: Path) -> list[Path]:
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def _sizes_over_ranks(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Join the ranks' tensors: optimizer state is known only where a table has a shard."""
    parts: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, _sizes(state))
    return {name: size for part in parts for name, size in part.items()}


def _sizes(state: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            sizes |= _sizes(value, f"{prefix}{name}.")
        else:
            sizes[f"{prefix}{name}"] = tuple(value.size())
    return sizes


class _Reader(dcp.FileSystemReader):
    """DCP's reader, except that its index is unpickled from a closed list of classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as source:
            try:
                metadata = _IndexUnpickler(source).load()
            except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
                raise pickle.UnpicklingError(f"the index is garbled: {error!r}") from error
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the index is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _enum_member(kind: Any, name: str) -> Enum:
    """Stand in for ``getattr`` in an index, where it may do nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"the index asks for {name!r} of {kind!r}")
    return kind[name]


class _IndexUnpickler(pickle.Unpickler):
    """Makes data only: exact names, because a dotted one could reach any function through them."""

    ALLOWED = frozenset(
        {("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__}
        | {
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
        | {("torch", str(dtype).rpartition(".")[2]) for dtype in DTYPES}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python before 3.11.4 pickles one
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is not allowed")
