"""Writing checkpoints, in the background if asked: whole or absent, one at a time."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from torchrec_hilomoe.training.checkpoint.audit import CHOICES
from torchrec_hilomoe.training.checkpoint.errors import cause_of, CheckpointError
from torchrec_hilomoe.training.checkpoint.marker import FileSum, Progress, write_marker
from torchrec_hilomoe.training.checkpoint.state import flatten, OpenWindow, Snapshot
from torchrec_hilomoe.training.checkpoint.storage import Folder, write_documents, Writer

__all__ = ["Saved", "Saver"]

logger = logging.getLogger(__name__)

# Of the slowest store that is still worth waiting for; a dead rank is noticed at once.
SAVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was written.

    Attributes:
        path: Where.
        step: Of the run.
        bytes: Of all its files.
        stall_seconds: For how long training waited, on this rank.
        write_seconds: From then until it was whole.
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
        self._keep = keep
        self._documents = dict(documents or {})
        self._on_saved = on_saved
        # Its own group, because training exchanges over the other at the same time.
        group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._snapshot = Snapshot() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, which :meth:`wait` will raise."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def path_of(self, step: int) -> str:
        """Return where the checkpoint of a step is, if it was kept."""
        return self._folder.at(step)

    def save(
        self, state: Mapping[str, Any], progress: Progress, *, window: OpenWindow | None = None
    ) -> None:
        """Write a checkpoint, or begin to; then remove the oldest.

        Args:
            state: Tensors, replicated or sharded, in nested mappings.
            progress: What belongs to them.
            window: What the next line of the log is to know of the steps so far.

        Raises:
            CheckpointError: If it, or the one before, cannot be written, as on a full disk.
        """
        started = time.perf_counter()
        self.wait()
        whole = {**flatten(state), **_of_this_rank(window)}
        if self._thread is None or self._snapshot is None:
            self._write(whole, progress, started, started)
            return
        copied = self._snapshot.take(whole)
        arguments = (copied, progress, started, time.perf_counter())
        self._pending = self._thread.submit(self._write, *arguments)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: If it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, without raising: for a run that has failed already."""
        if self._thread is not None:
            self._thread.shutdown()
            if self.failed:
                assert self._pending is not None
                logger.warning("the last checkpoint failed too: %s", self._pending.exception())

    def _write(
        self, whole: Mapping[str, Any], progress: Progress, started: float, copied: float
    ) -> None:
        step = progress.step
        try:
            where = self._on_first(lambda: self._folder.begin(step), step)
            writer = Writer(where)
            dcp.save(dict(whole), storage_writer=writer, process_group=self._group)
            sums: list[dict[str, FileSum]] = [{}] * dist.get_world_size()
            dist.all_gather_object(sums, writer.sums, group=self._group)
        except (OSError, dcp.CheckpointException) as error:
            raise self._failure(step, cause_of(error)) from error
        files = {name: found for part in sums for name, found in part.items()}
        path = self._on_first(lambda: self._finish(where, progress, files), step)
        if self._on_saved is not None and dist.get_rank() == 0:
            now = time.perf_counter()
            self._on_saved(
                Saved(
                    path=path,
                    step=step,
                    bytes=sum(found.bytes for found in files.values()),
                    stall_seconds=(copied if self._thread else now) - started,
                    write_seconds=now - copied,
                )
            )

    def _finish(self, where: str, progress: Progress, files: Mapping[str, FileSum]) -> str:
        texts = write_documents(where, self._documents)
        write_marker(where, progress, {**files, **texts})
        path = self._folder.commit(where, progress.step)
        self._folder.keep(self._keep, progress.best.step if progress.best else None)
        return path

    def _on_first(self, act: Callable[[], str], step: int) -> str:
        """Act on the first rank, and let every rank have the result, or the error."""
        told: list[str] = ["", ""]
        if dist.get_rank() == 0:
            try:
                told[0] = act()
            except OSError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0, group=self._group)
        if told[1]:
            raise self._failure(step, told[1])
        return told[0]

    def _failure(self, step: int, cause: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder.at(step)} could not be written: {cause}. Is the disk full? "
            "The checkpoints before it are whole; make room and run again to go on from the newest."
        )


def device_rng() -> Tensor | None:
    """Return the random state of this rank's GPU, if it has one."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _of_this_rank(window: OpenWindow | None) -> dict[str, Tensor]:
    """Everything random in this package draws from PyTorch's generators."""
    found = {"rng": torch.get_rng_state(), "rng_device": device_rng()}
    if window is not None:
        choices = {f"{CHOICES}{site}": counts for site, counts in window.choices.items()}
        found |= {"window": window.rows, **choices}
    rank = dist.get_rank()
    return {f"{name}.rank{rank}": it for name, it in found.items() if it is not None}
