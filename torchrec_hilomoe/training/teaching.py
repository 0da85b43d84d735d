"""What training asks of a model that another one learns from; :mod:`..serving.teacher` is one."""

from collections.abc import Callable, Generator, Mapping
from typing import Protocol

import torch

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema

__all__ = ["OpenTeacher", "Teacher"]


class Teacher(Protocol):
    """A model whose logits another one learns, besides the clicks."""

    @property
    def description(self) -> Mapping[str, object]:
        """What it is, as it is kept in ``summary.json``."""
        ...

    def teach(
        self, batches: Generator[CTRBatch, None, None], device: torch.device
    ) -> Generator[CTRBatch, None, None]:
        """Yield batches with the teacher's logits; closing this closes what they come from."""
        ...


# From train.teacher, the columns of the data and its folder; None where the data is generated.
OpenTeacher = Callable[[str, Schema, str | None], Teacher]
