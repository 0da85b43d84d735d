"""The folder of a run: made, owned by one run at a time, gone on from, and what is written there.

config.yaml   plan.txt, plan.json   metrics.jsonl   summary.json   checkpoints/step_N/
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import distributed as dist

from torchrec_hilomoe.command_line import ParsedRun
from torchrec_hilomoe.runtime.distributed import broadcast_text, DistributedContext
from torchrec_hilomoe.runtime.documents import DocumentError, parse_yaml
from torchrec_hilomoe.runtime.ownership import owned
from torchrec_hilomoe.runtime.paths import to_json, write_text
from torchrec_hilomoe.runtime.process import versions
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint.storage import Folder
from torchrec_hilomoe.training.log.reading import METRICS_FILE, read_summary, SUMMARY_FILE
from torchrec_hilomoe.training.sharding.plan_report import PlanReport

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)

OWNER = ".owner"
OF_A_START = ("out_dir", "resume")  # options that say how a run is started, not what it is


class RunFolder:
    """Made for a run, or found; every rank has one, and the first writes. A collective call.

    Args:
        parsed: The run.
        context: This process among the ranks.

    Attributes:
        path: Of the folder, the same on every rank.
        checkpoints: Path of the folder of checkpoints, local or remote.

    Raises:
        ValueError: If it cannot be made, or holds a run that would be overwritten.
    """

    def __init__(self, parsed: ParsedRun, context: DistributedContext) -> None:
        config = parsed.config
        now = f"{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(config.out_dir or broadcast_text(f"runs/{parsed.recipe}-{now}"))
        self.checkpoints = config.checkpoint.folder or str(self.path / "checkpoints")
        self._parsed, self._context = parsed, context
        used = (self.path / METRICS_FILE).exists() or checkpoint.latest(self.checkpoints)
        dist.barrier()  # every rank has looked before the first one writes
        if used and (config.dry_run or config.resume == "never"):
            option = "dry_run is true" if config.dry_run else "resume is 'never'"
            raise ValueError(
                f"out_dir {self.path} already holds a run and {option}. Give another --out_dir, or "
                "--resume auto to go on with that run."
            )
        if context.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"out_dir {self.path} cannot be made: {error}. Give another --out_dir."
                ) from error
        dist.barrier()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own what the run writes to, or refuse it on every rank; a collective call.

        Raises:
            ValueError: If another run owns it.
        """
        places = {f"out_dir {self.path}": str(self.path)}
        if not self._parsed.config.dry_run:
            elsewhere = self._parsed.config.checkpoint.folder
            what = "out_dir" if elsewhere is None else "checkpoint.folder"
            places[f"{what} {self.checkpoints}"] = self.checkpoints
        with ExitStack() as held:
            problem = ""
            if self._context.is_main:
                try:
                    locks: dict[str, str] = {}  # both may be one folder, under two names
                    for what, place in places.items():
                        if "://" not in place:
                            Path(place).mkdir(parents=True, exist_ok=True)
                            locks.setdefault(os.path.realpath(place), what)
                    for place, what in locks.items():
                        held.enter_context(owned(Path(place) / OWNER, what))
                except (ValueError, OSError) as error:
                    problem = str(error)
            if problem := broadcast_text(problem):
                raise ValueError(problem)
            yield

    def resumed(self) -> checkpoint.Checkpoint | None:
        """Open the checkpoint that the run goes on from; None if it begins. A collective call.

        Raises:
            CheckpointError: If there are some, and none can be gone on with.
            ValueError: If it is of an earlier step than others here, which it would overwrite.
        """
        resume = self._parsed.config.resume
        if resume == "never":
            return None
        if resume == "auto":
            return checkpoint.newest_sound(self.checkpoints)
        found = checkpoint.open(resume.rstrip("/"))
        newest = max(Folder(self.checkpoints).checkpoints(), default=0)
        if newest > found.progress.step:
            raise ValueError(
                f"resume is a checkpoint of step {found.progress.step}, but {self.checkpoints} "
                f"already holds step {newest}, which would be overwritten. Give another --out_dir, "
                "or --resume auto."
            )
        return found

    def changes_since(self, saved: checkpoint.Checkpoint) -> str:
        """Say which options a checkpoint was saved with that are others now; empty if none are.

        A run may go on with another rate, or batch size: that is the user's, and is told.
        """
        if not saved.has("config.yaml"):
            return ""
        where = f"{saved.path}/config.yaml"
        before = dict(_options(parse_yaml(saved.document("config.yaml"), where)))
        now = dict(_options(parse_yaml(self._parsed.resolved, "the configuration")))
        return ", ".join(
            f"{name} {now.get(name)} (was {before.get(name)})"
            for name in {**before, **now}
            if before.get(name) != now.get(name) and name not in OF_A_START
        )

    def is_tested(self) -> bool:
        """Whether a summary is there and whole, by the first rank's disk; a collective call.

        One that is not whole is told, and is made again.
        """
        tested = ""
        if self._context.is_main:
            try:
                tested = "test" if "test" in read_summary(self.path) else ""
            except DocumentError as error:
                logger.warning("%s It is made again.", str(error).partition(". ")[0] + ".")
        return bool(broadcast_text(tested))

    def write_config(self) -> None:
        """Keep the configuration; only once it is known to fit what the folder already holds."""
        if self._context.is_main:
            write_text(str(self.path / "config.yaml"), self._parsed.resolved)

    def write_plan(self, plan: PlanReport) -> None:
        """Keep where the tables are, for people and for programs."""
        if self._context.is_main:
            write_text(str(self.path / "plan.txt"), plan.text())
            write_text(str(self.path / "plan.json"), plan.to_json())

    def write_summary(self, content: Mapping[str, object]) -> None:
        """Write ``summary.json``: ``content``, and where it was computed."""
        if not self._context.is_main:
            return
        where = {
            "world_size": self._context.world.size,
            "device": str(self._context.device),
            "versions": versions(),
        }
        write_text(str(self.path / SUMMARY_FILE), to_json({**content, **where}) + "\n")


def _options(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
