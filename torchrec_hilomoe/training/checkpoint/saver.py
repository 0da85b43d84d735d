"""Writing checkpoints, in the background if asked: whole or absent, one at a time."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from torchrec_hilomoe.training.checkpoint.manifest import (
    cause_of,
    CheckpointError,
    FileChecksum,
    Progress,
    write_manifest,
)
from torchrec_hilomoe.training.checkpoint.state import CPUStager, device_rng, flatten
from torchrec_hilomoe.training.checkpoint.storage import Folder, Store

__all__ = ["Saved", "Saver"]

logger = logging.getLogger(__name__)

# Of the slowest store that is still worth waiting for; a dead rank is noticed at once.
SAVE_TIMEOUT = timedelta(hours=2)
Commit = Callable[[Store, Mapping[str, FileChecksum]], None]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was written.

    Attributes:
        path: Folder of the checkpoint.
        step: Optimizer step of the checkpoint.
        bytes: Bytes of all its files but the manifest.
        stall_seconds: Seconds in which training waited, on this rank.
        write_seconds: Seconds from then until it was whole.
    """

    path: str
    step: int
    bytes: int
    stall_seconds: float
    write_seconds: float


@final
class Saver:
    """Writes a run's checkpoints and removes old ones; every method is collective.

    Args:
        folder: Holds them; local, or remote through the ``PathManager``.
        keep: Checkpoints that stay, the best one not counted.
        asynchronous: Whether training goes on while one is written. It then waits for a copy in
            memory only, or, if the one before is not finished, for that one first.
        documents: Texts that are kept in each checkpoint, by file name.
        on_saved: Told of each one, on the first rank; maybe from another thread.

    Attributes:
        folder: Path of the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        asynchronous: bool = False,
        documents: Mapping[str, str] | None = None,
        on_saved: Callable[[Saved], None] | None = None,
    ) -> None:
        self._folder = Folder(folder)
        self.folder = self._folder.path
        self._keep = keep
        self._documents = dict(documents or {})
        self._on_saved = on_saved
        # Its own group, because training exchanges over the other at the same time.
        group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._stager = CPUStager() if asynchronous else None
        self._pending: Future[Any] | None = None
        self._pending_step = 0

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, which :meth:`wait` will raise."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def save(
        self,
        state: Mapping[str, Any],
        progress: Progress,
        *,
        rank_state: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write a checkpoint, or begin to; then remove the oldest.

        Args:
            state: Tensors, replicated or sharded, in nested mappings.
            progress: What belongs to them.
            rank_state: Tensors of this rank alone, in nested mappings; so is random state.

        Raises:
            CheckpointError: If it, or the one before, cannot be written, as on a full disk.
        """
        started = time.perf_counter()
        self.wait()
        step, stager = progress.step, self._stager

        def commit(store: Store, checksums: Mapping[str, FileChecksum]) -> None:
            waited = (time.perf_counter() if stager is None else stager.ended) - started
            self._commit(store, checksums, progress, started, waited)

        writer = _Writer(self._folder, step, commit)
        whole = {**flatten(state), **_of_this_rank(rank_state)}
        if stager is None:
            with self._failures_of(step):
                dcp.save(whole, storage_writer=writer, process_group=self._group)
            return
        pending = dcp.async_save(
            whole, storage_writer=writer, process_group=self._group, async_stager=stager
        )
        assert isinstance(pending, Future)
        self._pending, self._pending_step = pending, step

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: If it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._failures_of(self._pending_step):
                pending.result()

    def close(self) -> None:
        """Wait, without raising: for a run that has failed already."""
        if self._pending is not None:
            wait([self._pending])
            if self.failed:
                logger.warning("the last checkpoint failed too: %s", self._pending.exception())

    def _commit(
        self,
        store: Store,
        checksums: Mapping[str, FileChecksum],
        progress: Progress,
        started: float,
        waited: float,
    ) -> None:
        """Make a checkpoint whole; on the first rank, after all have written their tensors."""
        written = self._folder.partial(progress.step)
        for name, text in self._documents.items():
            with store.create_stream(f"{written}/{name}", "wb") as sink:
                sink.write(text.encode())
        files = {**checksums, **store.checksums}
        write_manifest(written, progress, files)
        path = self._folder.commit(written, progress.step)
        best = progress.best.step if progress.best else None
        self._folder.keep(self._keep, best, progress.step)
        if self._on_saved is not None:
            self._on_saved(
                Saved(
                    path=path,
                    step=progress.step,
                    bytes=sum(found.bytes for found in files.values()),
                    stall_seconds=waited,
                    write_seconds=time.perf_counter() - started - (waited if self._stager else 0),
                )
            )

    @contextmanager
    def _failures_of(self, step: int) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:
            raise CheckpointError(
                f"checkpoint {self._folder.at(step)} could not be written: {cause_of(error)}. Is "
                "the disk full? The checkpoints before it are whole; make room and run again to go "
                "on from the newest."
            ) from error


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, of a checkpoint that is whole or absent.

    DCP tells every rank of an error on any of them. The first one alone makes the folder, before
    any rank writes, and commits it, after all have written.

    Args:
        folder: Of the run's checkpoints.
        step: Whose checkpoint it is.
        commit: Called on the first rank with its store and the checksums of all ranks' files.
    """

    def __init__(self, folder: Folder, step: int, commit: Commit) -> None:
        path = folder.partial(step)
        # What a store of objects holds it has taken whole; there is no file to sync.
        super().__init__(path, sync_files="://" not in path)
        self.fs = self._store = Store()
        self.path = self.fs.init_path(path)
        self._folder, self._step, self._commit = folder, step, commit

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the folder to the first rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, while the other ranks wait for their plans."""
        self._folder.begin(self._step)
        return super().prepare_global_plan(plans)

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's tensors, and tell the first rank the checksum of their file."""

        def summed(written: torch.futures.Future[list[WriteResult]]) -> list[WriteResult]:
            return [_summed(it, self._store.checksums) for it in written.value()]

        return super().write_data(plan, planner).then(summed)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, and commit."""
        super().finish(metadata, results)
        checksums = {
            result.storage_data.relative_path: result.checksum
            for part in results
            for result in part
            if isinstance(result, _SummedResult)
        }
        self._commit(self._store, checksums)


@dataclass(frozen=True)
class _SummedResult(WriteResult):
    """A tensor that was written, with the checksum of the file that it is in."""

    checksum: FileChecksum


def _summed(result: WriteResult, checksums: Mapping[str, FileChecksum]) -> _SummedResult:
    checksum = checksums[result.storage_data.relative_path]
    return _SummedResult(result.index, result.size_in_bytes, result.storage_data, checksum)


def _of_this_rank(rank_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Everything random in this package draws from PyTorch's generators."""
    random = {"rng": torch.get_rng_state(), "rng_device": device_rng()}
    rank = dist.get_rank()
    return {
        f"{name}.rank{rank}": tensor
        for name, tensor in flatten({**random, **rank_state}).items()
        if tensor is not None
    }
