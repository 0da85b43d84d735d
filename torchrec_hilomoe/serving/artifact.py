"""The folder of an exported model: written beside its place and renamed, checked when it is opened.

- ``manifest.json``: what it is of, and the size and CRC-32 of every other file; written last;
- ``program.pt2``: the model, tables included;
- ``request.pt2``: the same for one user with many candidates, without weights; where there are
  histories;
- ``package.pt2``: ``program.pt2`` as machine code, where it was asked for;
- ``schema.json``: the columns that the model was trained on;
- ``vocabularies/``: raw values and their ids, a file a table.
"""

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE
from torchrec_hilomoe.runtime.documents import DocumentError, misfit, parse_json, read_text
from torchrec_hilomoe.runtime.paths import remove_tree, sync_folder, to_json, write_text
from torchrec_hilomoe.runtime.process import versions
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.training.checkpoint.manifest import FileChecksum, own_checksum
from torchrec_hilomoe.training.checkpoint.storage import find_difference

__all__ = [
    "PACKAGE_FILE",
    "PROGRAM_FILE",
    "REQUEST_FILE",
    "Artifact",
    "Origin",
    "artifact_folder",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
PROGRAM_FILE = "program.pt2"
PACKAGE_FILE = "package.pt2"
REQUEST_FILE = "request.pt2"
FORMAT = 1
AGAIN = "Export the checkpoint again: python -m torchrec_hilomoe export CHECKPOINT --out DIR"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an exported model is of.

    Attributes:
        checkpoint: Path of the checkpoint.
        step: Number of optimizer steps that it was trained for.
        stage: Name of the stage of the last step.
        commit: Commit of the code that exported it; ``none`` outside a checkout.
        backbone: Name of the model.
        expert_layers: Number of expert layers that compute; 0 is the plain model.
        tables: Type in which numbers of tables are kept: ``fp32``, ``fp16`` or ``int8``.
        split: Split that the metrics are of; null if none was evaluated.
        metrics: Metrics of the exported program on that split, by name.
        fp32_metrics: The same with tables in fp32, where the artifact's are of another type.
        data_seed: Seed of the generated data that it was trained on; null for a prepared folder,
            and where it is not known.
    """

    checkpoint: str
    step: int
    stage: str
    commit: str
    backbone: str
    expert_layers: int
    tables: str
    split: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    fp32_metrics: Mapping[str, float | None] = field(default_factory=dict)
    data_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    format: int
    origin: Origin
    versions: Mapping[str, str]
    files: Mapping[str, FileChecksum]


class Artifact:
    """An artifact, open for reading: whole, of this release, and so far not executed.

    Args:
        path: A local folder that ``export`` has written.

    Attributes:
        path: The folder.
        origin: What it is of.
        schema: The columns that the model was trained on.

    Raises:
        ArtifactError: If it is missing, damaged, or of another release.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path).rstrip("/")
        manifest = _read_manifest(self.path)
        self.origin = manifest.origin
        self._files = manifest.files
        for name, wanted in sorted(manifest.files.items()):
            if name.startswith("/") or ".." in name.split("/"):
                raise self._damaged(f"its manifest names {name!r}")
            if problem := find_difference(f"{self.path}/{name}", wanted):
                raise self._damaged(problem)
        for name in (PROGRAM_FILE, SCHEMA_FILE):
            if name not in manifest.files:
                raise self._damaged(f"its manifest does not name {name}")
        try:
            self.schema = Schema.load(f"{self.path}/{SCHEMA_FILE}")
        except ValueError as error:
            raise self._damaged(f"{SCHEMA_FILE}: {error}".rstrip(".")) from error

    def file(self, name: str) -> str | None:
        """Return the path of a file; None if the artifact has none of this name."""
        return f"{self.path}/{name}" if name in self._files else None

    def checksum(self, name: str) -> FileChecksum:
        """Return the size and the CRC-32 of a file that the artifact has."""
        return self._files[name]

    def _damaged(self, cause: str) -> ArtifactError:
        return ArtifactError(f"artifact {self.path} is damaged: {cause}. {AGAIN}")


@contextmanager
def artifact_folder(out: str) -> Iterator[str]:
    """Give a folder to write in; on leaving without an error it appears as ``out``, whole.

    A process that is killed leaves a folder ``.NAME.partial-PID``, which nothing takes for an
    artifact.

    Args:
        out: A local folder that does not exist yet, or is empty.

    Yields:
        The folder, which must get a manifest by :func:`write_manifest` in the end.

    Raises:
        ValueError: If there is something at ``out``, or it is remote.
    """
    out = out.rstrip("/")
    if "://" in out:
        raise ValueError(f"--out {out} is remote; name a local folder, and copy it afterwards.")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"--out {out} exists already; name a new folder.")
    parent, name = os.path.split(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    partial = os.path.join(parent, f".{name}.partial-{os.getpid()}")
    os.makedirs(partial)
    try:
        yield partial
        assert os.path.exists(f"{partial}/{MANIFEST_FILE}")
        os.replace(partial, out)
        sync_folder(parent)
    finally:
        if os.path.isdir(partial):
            remove_tree(partial)


def write_manifest(folder: str, origin: Origin) -> None:
    """Say what a folder is of, and the checksum of every file in it."""
    names = [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, found in os.walk(folder)
        for name in found
    ]
    described: dict[str, Any] = {
        "format": FORMAT,
        "origin": asdict(origin),
        "versions": versions(),
        "files": {name: asdict(_checksum(f"{folder}/{name}")) for name in sorted(names)},
    }
    described = parse_json(to_json(described), "a manifest")  # as it will be read
    write_text(
        f"{folder}/{MANIFEST_FILE}", to_json({**described, "crc32": own_checksum(described)}) + "\n"
    )


def _read_manifest(path: str) -> _Manifest:
    where = f"{path}/{MANIFEST_FILE}"
    try:
        raw = parse_json(read_text(where), where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(
            f"there is no artifact at {path} ({MANIFEST_FILE} is missing). Name a folder that "
            "export has written."
        ) from error
    except DocumentError as error:
        raise ArtifactError(f"artifact {path} is damaged: {error}. {AGAIN}") from error
    if raw.get("format") != FORMAT:
        raise ArtifactError(
            f"artifact {path} has format {raw.get('format')!r}, this package reads {FORMAT}. "
            f"{AGAIN}"
        )
    if raw.pop("crc32", None) != own_checksum(raw):
        raise ArtifactError(f"artifact {path} is damaged: the CRC-32 of {where} differs. {AGAIN}")
    if problem := misfit(raw, _Manifest):
        raise ArtifactError(f"artifact {path} is damaged: {where}: {problem}. {AGAIN}")
    here = versions()
    for name in ("torch", "torchrec-hilomoe"):
        found = raw["versions"].get(name, "none")
        if _release(found) != _release(here[name]):
            raise ArtifactError(
                f"artifact {path} was exported with {name} {found}, and this is {here[name]}: "
                f"programs are not read across releases. {AGAIN}"
            )
    return _Manifest(
        format=raw["format"],
        origin=Origin(**raw["origin"]),
        versions=raw["versions"],
        files={name: FileChecksum(**entry) for name, entry in raw["files"].items()},
    )


def _release(version: str) -> str:
    """The part of a version that programs depend on: without patch and build."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def _checksum(path: str) -> FileChecksum:
    size = crc32 = 0
    with open(path, "rb") as source:
        while chunk := source.read(1 << 22):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return FileChecksum(bytes=size, crc32=crc32)
