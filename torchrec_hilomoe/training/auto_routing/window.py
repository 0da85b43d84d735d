"""To which steps of a run a probe listens, if to any, and why what it hears may be too little."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.hilomoe.probe.gathered import ROWS_OF_A_BUCKET
from torchrec_hilomoe.training.stages import Stage, StageTimeline

__all__ = ["WANTED_ROWS", "Window", "window_of"]

MOST_STEPS = 2000
WANTED_ROWS = 200_000  # half of them found nothing where something decides


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps to which a probe listens, counted from 0.

    Attributes:
        start: The first one.
        stop: Here experts begin.
        every: Steps of which one is heard.
        held_out: Whether nothing was trained on their rows before.
        aside: Whether nothing is heard, since a plain model is trained and probed aside, first.
        shortage: Why too little is heard to judge by; empty where it is enough.
    """

    start: int
    stop: int
    every: int
    held_out: bool
    aside: bool = False
    shortage: str = ""

    def hears(self, step: int) -> bool:
        """Whether a step is listened to."""
        return self.start <= step < self.stop and (step - self.start) % self.every == 0


def window_of(config: RunConfig, timeline: StageTimeline, steps_per_epoch: int) -> Window:
    """Say to which steps of a run its probe listens.

    Rows judge only if nothing was trained on them: in the first epoch of a run that begins
    afresh. Otherwise rows of the validation split do, each other and what was heard.

    Raises:
        ValueError: If the schedule leaves no step without experts, or none with them, if nobody
            knows when they begin, or more steps are to be listened to than there are.
    """
    experts, where = config.model.hilomoe, "model.hilomoe.route_by is auto"
    stages = timeline.schedule.stages
    plain = tuple(takewhile(lambda stage: stage.active_layers == 0, stages))
    if len(plain) == len(stages):
        raise ValueError(f"{where}, but experts compute in no stage. Add one, or set hilomoe null.")
    if _probes_first(config, timeline, plain):
        return Window(start=0, stop=0, every=1, held_out=False, aside=True)
    if not plain:
        raise ValueError(
            f"{where}, which needs steps without experts, but the run begins with stage "
            f"{stages[0].name!r}: train.backbone_share is {config.train.backbone_share} and "
            f"init_from is {config.init_from}. Raise train.backbone_share, give the checkpoint of "
            "a plain model as init_from, set model.hilomoe.probe_first, or name the features."
        )
    for stage in plain:
        if stage.plateau is not None:
            raise ValueError(
                f"{where}, which listens to the last steps before experts begin, but stage "
                f"{stage.name!r} ends with a plateau of {stage.plateau.metric}, nobody "
                "knows when. Give that stage a length, set model.hilomoe.probe_first, or name the "
                "features."
            )
    stop = _steps_of(plain, timeline)
    fresh, asked = config.init_from is None, experts.probe_steps
    if asked is not None and asked > stop:
        raise ValueError(
            f"model.hilomoe.probe_steps is {asked}, but experts begin after {stop} steps. Lower "
            "it, or raise train.backbone_share."
        )
    steps = asked or (_listened(stop) if fresh else min(MOST_STEPS, stop))
    every = max(1, steps * config.train.batch_size // WANTED_ROWS)
    heard = range(stop - steps, stop, every)
    return Window(
        start=heard.start,
        stop=stop,
        every=every,
        held_out=fresh and stop <= steps_per_epoch,
        shortage=_shortage(config, config.train.batch_size * len(heard), timeline, stop)
        or _doubt(config, config.train.batch_size * len(heard)),
    )


def _probes_first(config: RunConfig, timeline: StageTimeline, plain: Sequence[Stage]) -> bool:
    """Whether a plain model is probed aside: as asked, or where only that has rows to tell from."""
    experts, batch = config.model.hilomoe, config.train.batch_size
    if experts.probe_first is not None:
        return experts.probe_first
    if experts.probe_steps is not None or config.init_from is not None:
        return False
    ends = all(stage.plateau is None for stage in plain)
    heard = _listened(_steps_of(plain, timeline)) if ends else 0
    return heard * batch < WANTED_ROWS <= timeline.total_steps * batch


def _steps_of(plain: Sequence[Stage], timeline: StageTimeline) -> int:
    return max((span.stop for span in timeline.spans if span.stage in plain), default=0)


def _listened(plain_steps: int) -> int:
    """To how many of the steps without experts a run listens, if nothing else is asked for."""
    return min(MOST_STEPS, math.ceil(plain_steps * 2 / 3))


def _shortage(config: RunConfig, rows: int, timeline: StageTimeline, stop: int) -> str:
    """Say why a run that hears so many rows cannot judge; empty if it can."""
    least = ROWS_OF_A_BUCKET * config.model.hilomoe.num_experts
    if rows < least:
        return (
            f"cannot judge: {rows:,} rows of the {least:,} that "
            f"{config.model.hilomoe.num_experts} experts need are heard before experts would "
            "begin. Train for more steps, or raise train.backbone_share or probe_steps."
        )
    if stop >= timeline.total_steps:
        return (
            f"cannot judge: the run ends after {timeline.total_steps} steps, before experts would "
            "begin. Train for more steps."
        )
    return ""


def _doubt(config: RunConfig, rows: int) -> str:
    """Say why nothing is believed of so few rows, in a run that nobody asked to listen to them.

    Its model is young then, too, and promises what it will soon learn by itself.
    """
    experts = config.model.hilomoe
    asked = experts.probe_steps is not None or experts.probe_first is not None
    if asked or config.init_from is not None or rows >= WANTED_ROWS:
        return ""
    return (
        f"cannot judge: {rows:,} rows would be heard before experts begin, and the whole run has "
        f"fewer than the {WANTED_ROWS:,} that tell what decides from chance. Train for more steps, "
        "listen to fewer with probe_steps, or name the features."
    )
