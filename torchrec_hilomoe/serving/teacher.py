"""An exported model as a teacher: its logits go into the batches that another model trains on.

Shape legend:
    B  rows
"""

import logging
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace

import torch
from torch import nn

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.vocabularies import read_vocabulary
from torchrec_hilomoe.runtime.paths import path_manager
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact, PROGRAM_FILE
from torchrec_hilomoe.serving.inputs import InputLayout
from torchrec_hilomoe.serving.program import load_program
from torchrec_hilomoe.serving.requests import vocabulary_of

__all__ = ["Teacher"]

logger = logging.getLogger(__name__)


class Teacher:
    """The program of an artifact, which is loaded when the first batch asks for it.

    Args:
        path: A folder that ``export`` has written.
        schema: Columns of the data that the other model trains on.
        data: The prepared folder of that data; None for generated data.
        seed: Of generated data: it draws the population and the map.

    Raises:
        ArtifactError: If the artifact is missing, damaged or of another release.
        ValueError: If it was trained on other columns, its ids mean other values, or its data was
            generated in another way.
    """

    def __init__(
        self, path: str, schema: Schema, data: str | None, seed: int | None = None
    ) -> None:
        try:
            self._artifact = Artifact(path)
        except ArtifactError as error:
            raise ArtifactError(f"train.teacher: {error}") from error
        self._layout = InputLayout(schema)
        self._program: nn.Module | None = None
        taught = self._artifact.schema
        if data is not None:  # another folder may have the same columns and values
            taught = replace(taught, dataset=schema.dataset)
        if differences := InputLayout(taught).schema.differences(self._layout.schema):
            shown = "\n  ".join(differences)
            raise ValueError(
                f"train.teacher {path} (here) and the data (there) have different schemas: "
                f"{len(differences)} differences.\n  {shown}\nName a teacher that was trained on "
                "this data, or prepared in the same way."
            )
        if data is not None:
            self._check_vocabularies(schema, data)
        origin = self._artifact.origin
        if data is None and None not in (seed, origin.data_seed) and seed != origin.data_seed:
            raise ValueError(
                f"train.teacher {path} was trained on data that was generated with seed "
                f"{origin.data_seed}, and this data with seed {seed} is of other users and another "
                f"map. Name a teacher of seed {seed}, or train with --seed {origin.data_seed}."
            )
        auc = f"{origin.split} AUC {origin.metrics['auc']:.4f}" if origin.split else "not evaluated"
        logger.info("teacher %s: %s of step %d, %s", path, origin.backbone, origin.step, auc)

    @property
    def description(self) -> Mapping[str, object]:
        """What the artifact is of, and the size and the CRC-32 of its program."""
        program = self._artifact.checksum(PROGRAM_FILE)
        return {**asdict(self._artifact.origin), "program": asdict(program)}

    def teach(
        self, batches: Generator[CTRBatch, None, None], device: torch.device
    ) -> Generator[CTRBatch, None, None]:
        """Yield batches with the teacher's logits; closing this closes what they come from.

        Args:
            batches: Of the training split.
            device: Where the teacher computes.
        """
        if self._program is None:
            path = self._artifact.file(PROGRAM_FILE)
            assert path is not None
            self._program = load_program(path, device)
        with closing(batches):
            for batch in batches:
                with torch.no_grad():  # inference tensors are not kept for a backward pass
                    logits_B = self._program(*self._layout.of_batch(batch).to(device).arguments)
                yield replace(batch, teacher_logits=logits_B)

    def _check_vocabularies(self, schema: Schema, data: str) -> None:
        for table, rule in schema.vocabularies.items():
            taught = self._artifact.file(vocabulary_of(table))
            if (
                rule.file is None
                or taught is None
                or not path_manager.isfile(f"{data}/{rule.file}")
            ):
                continue
            if not read_vocabulary(taught).equals(read_vocabulary(f"{data}/{rule.file}")):
                raise ValueError(
                    f"train.teacher {self._artifact.path} has another vocabulary of table "
                    f"{table!r} than {data}/{rule.file}, so that ids mean other values. Name a "
                    "teacher that was trained on this folder, or train on the teacher's."
                )
