"""``Scorer``: an artifact, loaded; raw rows in, probabilities out.

Shape legend:
    B  rows
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from torchrec_hilomoe.data.decode import DecodedBlock
from torchrec_hilomoe.data.decode import Rows as DecodedRows
from torchrec_hilomoe.serving.artifact import Artifact, PROGRAM_FILE, REQUEST_FILE
from torchrec_hilomoe.serving.inputs import RequestLayout
from torchrec_hilomoe.serving.package import load_package
from torchrec_hilomoe.serving.program import load_program, load_request
from torchrec_hilomoe.serving.requests import names_of, Requests, Rows, Values

__all__ = ["Scorer"]

ROWS_AT_ONCE = 4096  # bounds memory, however many rows there are

logger = logging.getLogger(__name__)


class Scorer:
    """Scores rows by an exported model; it keeps no state, so threads may share it.

    Args:
        path: A folder that ``export`` has written.
        compiled: Whether the AOTInductor package computes instead of the program. It is machine
            code: load one that you have made yourself.

    Raises:
        ArtifactError: If the artifact is missing, damaged, of another release, or has no package.

    Attributes:
        artifact: What was loaded.

    Example:
        >>> import tempfile
        >>> from torchrec_hilomoe.config import ModelConfig
        >>> from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup
        >>> from torchrec_hilomoe.models.build import build_task
        >>> from torchrec_hilomoe.serving import export_model, Scorer
        >>> clicks = IdFeature(name="clicks", table="item")
        >>> schema = Schema(
        ...     dataset="mine",
        ...     tables={"item": 100},
        ...     candidate=(IdFeature(name="item", table="item"),),
        ...     sequences=(SequenceGroup(name="clicks", fields=(clicks,), max_length=9),),
        ...     group="item",
        ... )
        >>> task = build_task(ModelConfig(backbone="din"), schema, torch.device("cpu"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     origin = export_model(task.model, f"{folder}/din")
        ...     scorer = Scorer(f"{folder}/din")
        >>> scorer.score({"item": [7, 8], "clicks": [[1, 2], []]}).shape
        (2,)
        >>> scorer.score_request({"clicks": [1, 2, 3]}, {"item": range(50)}).shape
        (50,)
    """

    def __init__(self, path: str | Path, *, compiled: bool = False) -> None:
        self.artifact = artifact = Artifact(path)
        self._requests = Requests(artifact)
        program = artifact.file(PROGRAM_FILE)
        assert program is not None
        self._of_request: RequestLayout | None = None
        if compiled:
            self._run = load_package(artifact)
        else:
            self._run = model = load_program(program)
            if (request := artifact.file(REQUEST_FILE)) is not None:
                self._of_request = RequestLayout(self._requests.layout)
                self._run_request = load_request(request, model)
        origin = artifact.origin
        logger.info(
            "%s: %s of step %d, %d expert layers, tables in %s, computed by the %s",
            artifact.path,
            origin.backbone,
            origin.step,
            origin.expert_layers,
            origin.tables,
            "package" if compiled else "program",
        )

    def score(self, rows: Rows, *, values: Values = "raw", where: str = "the rows") -> np.ndarray:
        """Return the probability of a click for each row, ``(B,)`` float32, in their order.

        Args:
            rows: An Arrow table or record batch, or an array or list of each column. The label,
                weights and times are not needed, other columns are left alone.
            values: Whether columns hold ``raw`` values, which go through the vocabularies, or the
                ``ids`` of a prepared folder.
            where: What the rows are, for messages.

        Raises:
            ValueError: If a column is missing or of another type, a row is bad, or ``values`` is
                neither.
        """
        _check_values(values)
        table = self._requests.table_of(rows)
        return self._score(table if values == "ids" else self._encode(table), where)

    def score_request(
        self, user: Mapping[str, Any], candidates: Rows, *, values: Values = "raw"
    ) -> np.ndarray:
        """Return the probability of a click for each candidate of one user.

        The user's values are looked up in the vocabularies once. Where all histories are the
        user's, a program of its own computes once what they alone decide; a package computes each
        candidate's row by itself.

        Args:
            user: A value, or a list of them, of each column that all candidates have in common.
            candidates: The other columns, as in :meth:`score`.
            values: As in :meth:`score`.

        Raises:
            ValueError: As in :meth:`score`; or if a column is given of both, or none of the
                candidates.
        """
        _check_values(values)
        names = self._requests.columns
        given = names_of(candidates)
        if both := [name for name in names if name in user and name in given]:
            raise ValueError(
                f"column {both[0]!r} is given of the user and of the candidates; leave one out."
            )
        if not any(name in given for name in names):
            raise ValueError(
                "no column is given of the candidates, so that it is not known how many there are; "
                f"give at least one of {', '.join(names)} for each candidate."
            )
        shared = [name for name in names if name in user]
        own = [name for name in names if name not in user]
        one = self._requests.table_of({name: [user[name]] for name in shared}, shared)
        table = self._requests.table_of(candidates, own)
        if values == "raw":
            one, table = self._encode(one), self._encode(table)
        layout = self._of_request
        histories = () if layout is None else layout.events
        once = bool(histories) and set(histories) <= set(shared) and table.num_rows > 0
        every_B = pa.array(np.zeros(table.num_rows, dtype=np.int64))
        for name, column in zip(shared, one.columns, strict=True):
            if not (once and name in histories):
                table = table.append_column(name, column.take(every_B))
        if layout is None or not once:
            return self._score(table.select(names), "the candidates")
        where = "the candidates"
        block = self._requests.decode(table, where, layout.candidates)
        first = table.slice(0, 1)
        for name in histories:
            first = first.append_column(name, one.column(name))
        decoded = self._requests.decode(first.select(names), "the user with the first candidate")
        return self._in_pieces(block, partial(self._of_user, decoded.rows))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows need."""
        return tuple(self._requests.columns)

    def warm_up(self, sizes: Sequence[int] = (1, 200)) -> None:
        """Run rows of id 0, so that the first request does not wait for what is done once."""
        for rows in sizes:
            empty = {
                name: pa.array([[]] * rows, pa.list_(pa.int64()))
                if name in self._requests.layout.list_columns
                else np.zeros(rows, dtype=np.int64)
                for name in self._requests.columns
            }
            self.score(empty, values="ids")
            if self._of_request is not None:
                user = {name: [] for name in self._of_request.events}
                own = {name: column for name, column in empty.items() if name not in user}
                self.score_request(user, own, values="ids")

    def _encode(self, table: pa.Table) -> pa.Table:
        return self._requests.encode(table)

    def _score(self, table: pa.Table, where: str) -> np.ndarray:
        if not table.num_rows:
            return np.zeros(0, dtype=np.float32)
        return self._in_pieces(self._requests.decode(table, where), self._of_rows)

    def _in_pieces(
        self, block: DecodedBlock, logits_of: Callable[[DecodedRows], Tensor]
    ) -> np.ndarray:
        rows = block.rows.dense.shape[0]
        borders = [*range(0, rows, ROWS_AT_ONCE), rows]
        with torch.inference_mode():
            parts = [torch.sigmoid(logits_of(piece)) for piece in block.pieces(borders)]
        return torch.cat(parts).numpy()

    def _of_rows(self, rows: DecodedRows) -> Tensor:
        return self._run(*self._requests.layout.of(rows).arguments)

    def _of_user(self, user: DecodedRows, candidates: DecodedRows) -> Tensor:
        assert self._of_request is not None
        return self._run_request(*self._of_request.of(user, candidates).arguments)


def _check_values(values: str) -> None:
    if values not in get_args(Values):
        raise ValueError(f"values is {values!r}, but must be 'raw' or 'ids'; name one of them.")
