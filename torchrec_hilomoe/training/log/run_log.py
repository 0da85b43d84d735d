"""What a person sees of a run, and what is kept: lines, a bar, ``metrics.jsonl``, TensorBoard."""

import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import distributed as dist
from torch import Tensor
from tqdm import tqdm

from torchrec_hilomoe.hilomoe import ProbeReport
from torchrec_hilomoe.hilomoe.inject import auxiliary_loss
from torchrec_hilomoe.hilomoe.monitor import CollapseWatch, LayerLoad, RoutingLog
from torchrec_hilomoe.hilomoe.scalars import ScalarWriter, write_routing
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask
from torchrec_hilomoe.runtime.documents import DocumentError, read_text
from torchrec_hilomoe.runtime.paths import to_json, write_text
from torchrec_hilomoe.runtime.process import peak_memory_gib
from torchrec_hilomoe.training.checkpoint import RoutingDecision, Saved
from torchrec_hilomoe.training.log.reading import (
    lines_before,
    METRICS_FILE,
    PROBE_FILE,
    read_probe,
    ROUTING_FILE,
)
from torchrec_hilomoe.training.log.window import Window
from torchrec_hilomoe.training.metrics import Metrics

__all__ = ["Curves", "RunLog", "StepLog", "finite"]

logger = logging.getLogger(__name__)


class _Writer(ScalarWriter, Protocol):
    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...
    def close(self) -> None: ...


class Curves:
    """Draws numbers over steps.

    Args:
        folder: Where TensorBoard looks.
        start: Steps from this one on are drawn anew.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self._writer = _writer(folder, start)

    def numbers(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Draw those that are numbers."""
        for name, value in values.items():
            if self._writer is not None and finite(value) is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a remark."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def loads(self, loads: Iterable[LayerLoad], step: int) -> None:
        """Draw what routers did."""
        if self._writer is not None:
            write_routing(self._writer, loads, step)

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


def finite(value: Any) -> Any:
    """Return a value that JSON and curves can show; None where it is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writer(folder: Path, start: int) -> _Writer | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so %s is not written; "
            "pip install 'tensorboard>=2.16,<3'",
            folder,
        )
        return None
    return SummaryWriter(str(folder), purge_step=start)


SHOWN = ("auc", "gauc", "logloss", "ne", "calibration")


class RunLog:
    """Writes and shows metrics; on ranks other than the first, does nothing.

    On a terminal there is one progress bar; elsewhere plain lines.

    Args:
        folder: Of the run.
        total_steps: Length of the run.
        start: Step at which it starts or goes on.
        enabled: Whether this rank writes.
    """

    def __init__(self, folder: Path, total_steps: int, start: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._folder = folder
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )
        self._total = total_steps
        self._start = start
        self._curves = Curves(folder / "tensorboard", start + 1) if enabled else None

    def cut_back(self) -> None:
        """Drop lines of steps that are to be trained again, and of a test that is.

        A run that was killed wrote them after its last checkpoint. A line that was cut short by
        the kill goes too.
        """
        for name in (METRICS_FILE, ROUTING_FILE) if self._enabled else ():
            file = self._folder / name
            if not file.exists():
                continue
            text = read_text(file, errors="replace")
            kept = lines_before(text, self._start)
            if kept != text.splitlines():
                write_text(str(file), "".join(f"{line}\n" for line in kept))

    def step(self, stage: str) -> None:
        """Count one optimizer step."""
        self._bar.set_description(stage, refresh=False)
        self._bar.update()

    def enter(self, stage: str, step: int, until: int) -> None:
        """Tell of a stage."""
        if self._curves is not None:
            self._curves.text("stage", stage, step)
        self.say(f"stage {stage}: steps {step + 1} to {until}")

    def decided(self, decision: RoutingDecision, report: ProbeReport) -> None:
        """Tell what routes the experts, or why there are none, and keep what it was decided by."""
        if self._curves is None:
            return
        self._write_probe(report.to_json(), decision)
        self._curves.text("route_by", decision.verdict, decision.step)
        best: dict[str, float] = {}
        for found in report.features:
            best[found.name] = max(found.gain, best.get(found.name, found.gain))
        self._curves.numbers("predicted_gain", best, decision.step)
        for line in report.table().splitlines()[:-1] if report.features else ():
            self.say(line)
        stays = "" if decision.route_by is not None else " The model stays plain."
        self.say(f"route_by auto, step {decision.step}: {decision.verdict}{stays}")

    def goes_on(self, decision: RoutingDecision) -> None:
        """Let what was kept say what has been made of it by now, where that is not told already."""
        if self._curves is None:
            return
        try:
            if kept := read_probe(self._folder):
                self._write_probe(kept, decision)
        except DocumentError as error:  # a report that is lost is no reason to lose the run
            self.say(str(error))

    def _write_probe(self, report: Mapping[str, Any], decision: RoutingDecision) -> None:
        found = {
            **report,
            "pays": decision.route_by is not None,
            "verdict": decision.verdict,
            "brought": None if decision.brought is None else asdict(decision.brought),
        }
        write_text(str(self._folder / PROBE_FILE), to_json(found) + "\n")

    def confirmed(self, decision: RoutingDecision) -> None:
        """Tell what experts that were found have brought, if it could be measured."""
        brought = decision.brought
        if self._curves is None:
            return
        if brought is None:
            self.say(
                "route_by auto: what experts brought in their warm-up cannot be told: the "
                "validation split has too few rows with a weight, or a loss is no number"
            )
            return
        self.goes_on(decision)
        self._curves.text("route_by", decision.verdict, brought.step)
        ends = {"gain": brought.gain, "low": brought.low, "high": brought.high}
        self._curves.numbers("brought", ends, brought.step)
        self.say(f"route_by auto, step {brought.step}: {decision.verdict}")

    def record(
        self, *, step: int, stage: str, split: str, metrics: Metrics, **more: float | None
    ) -> None:
        """Write one line of ``metrics.jsonl``, and show it.

        Args:
            step: Optimizer steps done.
            stage: Name of the stage.
            split: ``train``, ``valid`` or ``test``.
            metrics: Over all ranks.
            more: Further numbers under their names.
        """
        if self._curves is None:
            return
        values = {name: finite(value) for name, value in {**asdict(metrics), **more}.items()}
        self._append(METRICS_FILE, [{"step": step, "stage": stage, "split": split, **values}])
        self._curves.numbers(split, values, step)
        shown = " ".join(f"{name} {values[name]:.4f}" for name in SHOWN if values[name] is not None)
        speed = values.get("samples_per_second")
        speed_shown = f"{speed:,.0f} samples/s" if speed else ""
        if split == "train":
            loss, auc = (f"{metrics.logloss:.4f}", f"{metrics.auc:.4f}")
            self._bar.set_postfix_str(f"loss {loss}, auc {auc}, {speed_shown}", refresh=False)
        self.say(f"step {step}/{self._total} {stage} {split}: {shown} {speed_shown}".rstrip())

    def routing(self, step: int, stage: str, loads: Iterable[LayerLoad]) -> None:
        """Write where the routers sent their rows, a line of ``routing.jsonl`` a layer."""
        if self._curves is None:
            return
        found = list(loads)
        where = {"step": step, "stage": stage, "split": "train"}
        self._append(ROUTING_FILE, [{**where, **asdict(load)} for load in found])
        self._curves.loads(found, step)

    def saved(self, found: Saved) -> None:
        """Tell of a checkpoint."""
        if self._curves is not None:
            self._curves.numbers(
                "checkpoint",
                {
                    "stall_seconds": found.stall_seconds,
                    "write_seconds": found.write_seconds,
                    "megabytes": found.bytes / 1e6,
                },
                found.step,
            )
        self.say(
            f"saved {found.path}: {found.bytes / 1e6:,.1f} MB in {found.write_seconds:.2f} s; "
            f"training waited for {found.stall_seconds:.2f} s"
        )

    def say(self, text: str) -> None:
        """Show one line, above the bar if there is one."""
        if self._enabled:
            self._bar.clear()
            logger.info("%s", text)
            self._bar.refresh()

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        if self._curves is not None:
            self._curves.close()

    def _append(self, name: str, rows: list[dict]) -> None:
        with (self._folder / name).open("a") as sink:
            sink.writelines(to_json(row, indent=None) + "\n" for row in rows)


class StepLog:
    """Gathers steps, and writes a line of them when asked to.

    Args:
        task: What is trained.
        log: Where lines go.

    Attributes:
        window: Window of the steps since the last line.
    """

    def __init__(self, task: TrainTask, log: RunLog) -> None:
        self.window = Window()
        self._task = task
        self._log = log
        self._logged_step = 0
        self.watch_routers()

    def watch_routers(self) -> None:
        """Watch the routers that the model has now."""
        # Counts are of all ranks, so one of them is enough to warn.
        first = dist.get_rank() == 0
        self._watch = CollapseWatch(self._task) if first else None
        self._routing = RoutingLog(self._task) if first else None

    def add(
        self,
        step: int,
        stage: str,
        output: TaskOutput,
        seconds: float,
        gradient_norm: Tensor | None = None,
    ) -> None:
        """Take a step's output, how long it took, and the norm of its gradients, if it is known."""
        self.window.add(step, output, seconds, gradient_norm)
        if self._watch is not None:
            self._watch.observe()
        if self._routing is not None:
            self._routing.observe()
        self._log.step(stage)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next line is to know of the steps so far; of this rank alone."""
        routing = {} if self._routing is None else self._routing.state_dict()
        return {**self.window.state_dict(), **routing}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave."""
        self.window.load_state_dict(state_dict)
        if self._routing is not None:
            self._routing.load_state_dict(state_dict)

    def log_step(self, step: int, stage: str, rate: float) -> None:
        """Write a line, unless one of this step was written; a collective call.

        Args:
            step: Steps done.
            stage: The one that trained them.
            rate: The learning rate of the last of them.

        Raises:
            NonFiniteError: If one of their losses is no number.
        """
        if self._logged_step == step:
            return
        self._logged_step = step
        self.window.check_finite()
        speed = self.window.speed(since_start=False)
        self._log.record(
            step=step,
            stage=stage,
            split="train",
            metrics=self.window.metrics(),
            samples_per_second=speed,
            auxiliary_loss=_mean_over_ranks(auxiliary_loss(self._task)),
            learning_rate=rate,
            memory_gib=peak_memory_gib(),
        )
        if self._routing is not None:
            self._log.routing(step, stage, self._routing.flush())


def _mean_over_ranks(part: Tensor) -> float:
    mean = part.detach().double().cpu().reshape(1) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()
