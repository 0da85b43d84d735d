"""``progress.json``, the manifest of a checkpoint: where the run stood, and its files' checksums.

It is written last and names every other file with its size and its CRC-32, so that a folder
without it is no checkpoint, and one whose files differ from it is a damaged one.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from torch import distributed as dist
from torch.distributed import checkpoint as dcp

from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.runtime.documents import (
    build,
    DocumentError,
    misfit_of_parts,
    parse_json,
    read_text,
)
from torchrec_hilomoe.runtime.paths import open_text, to_json
from torchrec_hilomoe.runtime.process import versions

__all__ = [
    "PROGRESS_FILE",
    "Best",
    "Brought",
    "CheckpointError",
    "FileChecksum",
    "Progress",
    "RoutingDecision",
    "cause_of",
    "own_checksum",
    "read_manifest",
    "rewrite_manifest",
    "write_manifest",
]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged, or not this run's; or cannot be written."""


def cause_of(error: BaseException) -> str:
    """Return one line: DCP's own errors carry every rank's traceback."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
    return str(error)


PROGRESS_FILE = "progress.json"
FORMAT = 2
OLDER = "Give an older checkpoint with --resume PATH."


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far.

    Attributes:
        metric: Name of the metric that is compared.
        value: Best value of the metric so far.
        step: Optimizer step at which that value was reached.
        validations_since: Number of validations since that step, none of which was better.
    """

    metric: str
    value: float
    step: int
    validations_since: int = 0


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What experts had brought when their warm-up ended, on rows of the validation split.

    Attributes:
        step: Optimizer steps done.
        gain: Logloss without them less that with them, in nats a row.
        low: Lower end of its 95 % interval.
        high: Upper end.
        rows: Rows that it was measured on.
    """

    step: int
    gain: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """What ``model.hilomoe.route_by`` ``auto`` has chosen.

    Attributes:
        step: Optimizer steps done before it was chosen.
        route_by: Features that decide, one list for each expert layer; None for no experts.
        gains: What each layer was predicted to add, in nats a sample.
        verdict: The same in words.
        brought: What experts so routed then brought; None where it was not measured.
    """

    step: int
    route_by: tuple[tuple[str, ...], ...] | None
    gains: tuple[float, ...]
    verdict: str
    brought: Brought | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside its tensors.

    Attributes:
        step: Number of optimizer steps done.
        stage: Name of the stage of the last step.
        position: Position in the training data, from which it goes on.
        total_steps: Length of the run in steps, which places its stages.
        best: Best validation so far; None before the first, or where none is looked for.
        stopping: Best validation by which the run is stopped early, if it may be.
        schedule: State of the stages' timeline, as JSON has it.
        decision: What ``route_by`` ``auto`` has chosen; None before it has, and without it.
        to_validate: Whether the run was stopped in the validation after this step, which is due.
        steps_before: Optimizer steps that the model had learned for when the run began with it.
    """

    step: int
    stage: str
    position: LoaderState
    total_steps: int
    best: Best | None = None
    stopping: Best | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    decision: RoutingDecision | None = None
    to_validate: bool = False
    steps_before: int = 0

    @property
    def age(self) -> int:
        """Optimizer steps that the model has learned for, in this run and before it."""
        return self.steps_before + self.step


@dataclass(frozen=True, kw_only=True)
class FileChecksum:
    """What a file must be.

    Attributes:
        bytes: Length of the file in bytes.
        crc32: CRC-32 of the file's bytes.
    """

    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as it is read."""

    progress: Progress
    files: Mapping[str, FileChecksum]


PARTS = {
    **get_type_hints(Progress),
    "position": Mapping[str, int],
    "format": int,
    "files": Mapping[str, FileChecksum],
}
LATER = "decision", "to_validate", "steps_before"  # older runs do not have them


def write_manifest(folder: str, progress: Progress, files: Mapping[str, FileChecksum]) -> None:
    """Declare a checkpoint whole."""
    described: dict[str, Any] = {
        "format": FORMAT,
        **asdict(progress),
        "world_size": dist.get_world_size(),
        "versions": versions(),
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    _write(folder, described)


def rewrite_manifest(old: str, new: str, files: Mapping[str, FileChecksum]) -> None:
    """Declare a checkpoint whole that holds what another does, in files with other sums."""
    described = _read(old)
    del described["crc32"]
    _write(new, {**described, "files": {name: asdict(files[name]) for name in sorted(files)}})


def _write(folder: str, described: Mapping[str, Any]) -> None:
    with open_text(f"{folder}/{PROGRESS_FILE}", "w") as sink:
        sink.write(to_json({**described, "crc32": own_checksum(described)}) + "\n")


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of the checkpoint at ``path``.

    Raises:
        CheckpointError: If there is none, it is damaged, or its format is another.
    """
    try:
        raw = _read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"there is no checkpoint at {path} ({PROGRESS_FILE} is missing). Give the path of a "
            "folder step_N, in the folder checkpoints of a run."
        ) from error
    except DocumentError as error:
        raise CheckpointError(f"{path}/{PROGRESS_FILE} is damaged: {error}. {OLDER}") from error
    found = raw.get("format")
    if type(found) is int and found != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {found}, this package reads {FORMAT}. "
            "Train again, or load it with the version of the package that wrote it."
        )
    try:
        if raw.pop("crc32", None) != own_checksum(raw):
            raise DocumentError("its own CRC-32 is another")
        needed = [part for part in PARTS if part not in LATER]
        if problem := misfit_of_parts(raw, PARTS, needed):
            raise DocumentError(problem)
        files = {name: FileChecksum(**entry) for name, entry in raw["files"].items()}
        progress = _progress_of(raw)
        names = ("step", "total_steps", "steps_before")
        counts = {name: getattr(progress, name) for name in names}
        for name, count in {**counts, **asdict(progress.position)}.items():
            if count < (name == "num_canonical_shards"):
                raise DocumentError(f"{name} is {count}, and counts something")
        return Manifest(progress=progress, files=files)
    except DocumentError as error:
        raise CheckpointError(f"{path}/{PROGRESS_FILE} is damaged: {error}. {OLDER}") from error


def _read(folder: str | Path) -> dict[str, Any]:
    return parse_json(read_text(f"{folder}/{PROGRESS_FILE}"), "it")


def own_checksum(described: Mapping[str, Any]) -> int:
    """Return the CRC-32 of what a manifest says, which stands in it as ``crc32``."""
    return zlib.crc32(json.dumps(described, sort_keys=True).encode())


def _progress_of(raw: Mapping[str, Any]) -> Progress:
    return Progress(
        step=raw["step"],
        stage=raw["stage"],
        position=build(LoaderState, LoaderState.renewed(raw["position"])),
        total_steps=raw["total_steps"],
        best=Best(**raw["best"]) if raw["best"] is not None else None,
        stopping=Best(**raw["stopping"]) if raw["stopping"] is not None else None,
        schedule=raw["schedule"],
        decision=_decision_of(raw.get("decision")),
        to_validate=raw.get("to_validate", False),
        steps_before=raw.get("steps_before", 0),
    )


def _decision_of(raw: Mapping[str, Any] | None) -> RoutingDecision | None:
    if raw is None:
        return None
    route_by, brought = raw["route_by"], raw.get("brought")
    return RoutingDecision(
        step=raw["step"],
        route_by=None if route_by is None else tuple(tuple(layer) for layer in route_by),
        gains=tuple(raw["gains"]),
        verdict=raw["verdict"],
        brought=None if brought is None else Brought(**brought),
    )
