"""What training asks of a model that another one learns from; :mod:`..serving.teacher` is one.

Checkpoints keep which model it was, so that a resumed run goes on with no other one.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Protocol

import torch

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.documents import parse_json
from torchrec_hilomoe.runtime.paths import to_json
from torchrec_hilomoe.training.checkpoint import Checkpoint, CheckpointError

__all__ = ["OpenTeacher", "Teacher", "documents_of", "refuse_another"]

DOCUMENT = "teacher.json"


class Teacher(Protocol):
    """A model whose logits another one learns, besides the clicks."""

    @property
    def description(self) -> Mapping[str, object]:
        """What it is, as summaries and checkpoints keep it; no two have the same ``program``."""
        ...

    def teach(
        self, batches: Generator[CTRBatch, None, None], device: torch.device
    ) -> Generator[CTRBatch, None, None]:
        """Yield batches with the teacher's logits; closing this closes what they come from."""
        ...


# From train.teacher, the columns of the data, its folder, and the run's seed; without a folder the
# data is generated.
OpenTeacher = Callable[[str, Schema, str | None, int], Teacher]


def documents_of(teacher: Teacher | None) -> dict[str, str]:
    """Return what checkpoints keep of a run's teacher: a text by the name of its file."""
    return {} if teacher is None else {DOCUMENT: to_json(teacher.description) + "\n"}


def refuse_another(resumed: Checkpoint, teacher: Teacher | None, path: str | None) -> None:
    """Refuse to go on from a checkpoint that has learned from another model, or without it.

    Args:
        resumed: Where the run goes on; one that has learned from clicks alone may begin to.
        teacher: The model that it would learn from; None for clicks alone.
        path: Value of ``train.teacher``.

    Raises:
        CheckpointError: If they differ.
    """
    if not resumed.has(DOCUMENT):
        return
    before = parse_json(resumed.document(DOCUMENT), f"{resumed.path}/{DOCUMENT}")
    if teacher is None:
        raise CheckpointError(
            f"checkpoint {resumed.path} has learned from {before.get('backbone')} of "
            f"{before.get('checkpoint')}, and train.teacher is null. Name its folder, with "
            "--train.teacher_weight 0 if clicks are to decide alone from here, or begin another "
            f"run with --init_from {resumed.path}"
        )
    here = parse_json(to_json(teacher.description), str(path))
    if before.get("program") == here["program"]:
        return
    models = [f"{it.get('backbone')} of {it.get('checkpoint')}" for it in (before, here)]
    programs = [it.get("program") for it in (before, here)]
    raise CheckpointError(
        f"checkpoint {resumed.path} has learned from another model than train.teacher {path} is "
        f"now: {models[0]}, {programs[0]}, against {models[1]}, {programs[1]}. Name the former "
        f"one, or begin another run with --init_from {resumed.path}"
    )
