"""``progress.json``: where a run stood, and the mark that its checkpoint is whole.

It is written last and names every other file with its size and its CRC-32, so that a folder
without it is no checkpoint, and one whose files differ from it is a damaged one.
"""

import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import distributed as dist

from torchrec_hilomoe.data.batch import Position
from torchrec_hilomoe.runtime.paths import open_text
from torchrec_hilomoe.training.checkpoint.errors import CheckpointError

__all__ = ["PROGRESS_FILE", "Best", "FileSum", "Progress", "read_progress", "write_marker"]

PROGRESS_FILE = "progress.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far.

    Attributes:
        metric: What is compared.
        value: Its best value.
        step: Where it was reached.
        validations_since: Validations since then, none of which was better.
    """

    metric: str
    value: float
    step: int
    validations_since: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside its tensors.

    Attributes:
        step: Optimizer steps done.
        stage: Name of the stage of the last step.
        position: Where the data goes on.
        total_steps: Length of the run, which places its stages.
        best: The best validation so far; None before the first, or where none is looked for.
        stopping: The best by which the run is stopped early, if it may be.
        schedule: What else the stages depend on, as JSON has it.
    """

    step: int
    stage: str
    position: Position
    total_steps: int
    best: Best | None = None
    stopping: Best | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """What a file must be: its length and the CRC-32 of its bytes."""

    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A marker as it is read."""

    progress: Progress
    files: Mapping[str, FileSum]


def write_marker(folder: str, progress: Progress, files: Mapping[str, FileSum]) -> None:
    """Declare a checkpoint whole."""
    described: dict[str, Any] = {
        "format": FORMAT,
        **asdict(progress),
        "world_size": dist.get_world_size(),
        "versions": {name: version(name) for name in ("torch", "torchrec", "torchrec-hilomoe")}
        | {"python": platform.python_version()},
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    with open_text(f"{folder}/{PROGRESS_FILE}", "w") as sink:
        sink.write(json.dumps({**described, "crc32": _own_sum(described)}, indent=2) + "\n")


def read_marker(path: str | Path) -> Marker:
    """Read the marker of the checkpoint at ``path``.

    Raises:
        CheckpointError: If there is none, it is damaged, or its format is another.
    """
    file = f"{path}/{PROGRESS_FILE}"
    try:
        with open_text(file) as source:
            raw = json.load(source)
        if raw["format"] == FORMAT:
            said = raw.pop("crc32")
            if said != _own_sum(raw):
                raise ValueError("its own CRC-32 is another")
            files = {name: FileSum(**entry) for name, entry in raw["files"].items()}
            return Marker(progress=_progress_of(raw), files=files)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"there is no checkpoint at {path} ({PROGRESS_FILE} is missing). Give the path of a "
            "folder step_N, or --resume auto to go on from the newest in --out_dir if any."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: {error!r}. Give an older checkpoint with --resume PATH."
        ) from error
    raise CheckpointError(
        f"checkpoint {path} has format {raw['format']}, this package reads {FORMAT}. "
        "Train again, or load it with the version of the package that wrote it."
    )


def read_progress(path: str | Path) -> Progress:
    """Read where the run of a checkpoint stood.

    Raises:
        CheckpointError: If there is none at ``path``, it is damaged, or its format is another.
    """
    return read_marker(path).progress


def _own_sum(described: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(described, sort_keys=True).encode())


def _progress_of(raw: Mapping[str, Any]) -> Progress:
    return Progress(
        step=raw["step"],
        stage=raw["stage"],
        position=Position(**raw["position"]),
        total_steps=raw["total_steps"],
        best=Best(**raw["best"]) if raw["best"] is not None else None,
        stopping=Best(**raw["stopping"]) if raw["stopping"] is not None else None,
        schedule=raw["schedule"],
    )
