"""Decoded rows -> the plain tensors that an exported program takes.

Every size that differs from request to request is the size of a tensor's dimension, also those that
training knows as Python numbers: ``torch.export`` leaves dimensions free, and makes numbers
constants.

Shape legend:
    B  rows
    S  columns of one id a row     T  ids of a list column, all rows together
    G  kinds of lengths: of the sequence groups, then of the multi-valued features
    F  dense features
    L  the longest history of the batch, at least 1
    N  events of each row's longest history, summed over rows
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.decode import Rows
from torchrec_hilomoe.data.layout import ColumnLayout
from torchrec_hilomoe.data.schema import Schema

__all__ = ["InputLayout", "ProgramInputs", "RequestInputs", "RequestLayout"]

EXAMPLE_ROWS = 13
EXAMPLE_LONGEST = 17
EXAMPLE_STEPS = 19  # of a schema without histories, which never has one
EXAMPLE_EVENTS = 23  # of a request's first history; each other has one more


@dataclass(frozen=True, kw_only=True)
class ProgramInputs:
    """What a program takes.

    Attributes:
        singles: ``(S, B)`` int64, ids of ``ColumnLayout.singles``.
        lists: ``(T,)`` int64 of each column of ``ColumnLayout.lists``.
        lengths: ``(G, B)`` int64.
        dense: ``(B, F)`` float32.
        longest: ``(L,)`` int64, of which the size counts alone.
        steps: ``(N,)`` int64, likewise.
    """

    singles: Tensor
    lists: tuple[Tensor, ...]
    lengths: Tensor
    dense: Tensor
    longest: Tensor
    steps: Tensor

    @property
    def rows(self) -> int:
        """``B``."""
        return self.singles.shape[1]

    @property
    def arguments(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """In the program's order."""
        return (self.singles, self.lists, self.lengths, self.dense, self.longest, self.steps)

    def to(self, device: torch.device) -> "ProgramInputs":
        """Copy every tensor to ``device``."""
        return ProgramInputs(
            singles=self.singles.to(device),
            lists=tuple(ids.to(device) for ids in self.lists),
            lengths=self.lengths.to(device),
            dense=self.dense.to(device),
            longest=self.longest.to(device),
            steps=self.steps.to(device),
        )

    @property
    def free(self) -> tuple[int | tuple[int, ...], ...]:
        """The dimension of each argument that differs from request to request."""
        return (1, tuple(0 for _ in self.lists), 1, 0, 0, 0)


class InputLayout:
    """Which column of a schema is where among the inputs.

    Labels, weights and times train models and are no inputs: requests do not have them.

    Args:
        schema: The schema of the data that the model was trained on.

    Attributes:
        schema: What of it a request needs: the label's column must be there to decode rows, but may
            hold anything.
        columns: Of :attr:`schema`.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = replace(
            schema,
            sequences=tuple(replace(group, time=None) for group in schema.sequences),
            group=schema.candidate[0].name,
            time=None,
            weight=None,
        )
        self.columns = ColumnLayout(self.schema)

    @cached_property
    def list_columns(self) -> tuple[str, ...]:
        """The columns of :attr:`ProgramInputs.lists`."""
        return tuple(name for lists in self.columns.lists for name in lists.ids)

    @cached_property
    def independent(self) -> tuple[int, ...]:
        """Places of arguments, lists taken apart, whose free sizes no two of which are one."""
        places, at = [0], 1
        for parallel in self.columns.lists:
            places.append(at)
            at += len(parallel.ids)
        return (*places, at + 2, at + 3)

    def of(self, rows: Rows) -> ProgramInputs:
        """Return the inputs of decoded rows."""
        groups = len(self.schema.sequences)
        longest_B = rows.lengths[1 : 1 + groups].max(axis=0, initial=0)
        return ProgramInputs(
            singles=torch.from_numpy(rows.singles.astype(np.int64)),
            lists=tuple(torch.from_numpy(ids.astype(np.int64)) for ids in rows.lists),
            lengths=torch.from_numpy(rows.lengths[1:].astype(np.int64)),
            dense=torch.from_numpy(np.ascontiguousarray(rows.dense, dtype=np.float32)),
            longest=torch.zeros(max(1, int(longest_B.max(initial=0))), dtype=torch.int64),
            steps=torch.zeros(int(longest_B.sum()), dtype=torch.int64),
        )

    def of_batch(self, batch: CTRBatch) -> ProgramInputs:
        """Return the inputs of a batch of the training data's loader."""
        rows, groups = batch.labels.shape[0], len(self.schema.sequences)

        def column(name: str) -> JaggedTensor:
            return (batch.unpooled if name in self.schema.unpooled_keys else batch.pooled)[name]

        lengths = [
            column(next(iter(lists.ids))).lengths()[:rows].long() for lists in self.columns.lists
        ]
        longest_B = torch.stack([torch.zeros(rows, dtype=torch.int64), *lengths[:groups]]).amax(0)
        return ProgramInputs(
            singles=torch.stack([column(name).values() for name in self.columns.singles]).long(),
            lists=tuple(column(name).values().long() for name in self.list_columns),
            lengths=torch.stack(lengths) if lengths else torch.zeros(0, rows, dtype=torch.int64),
            dense=batch.dense,
            longest=torch.zeros(max([1, *longest_B.tolist()]), dtype=torch.int64),
            steps=torch.zeros(int(longest_B.sum()), dtype=torch.int64),
        )

    def example(self) -> ProgramInputs:
        """Return inputs no two free sizes of which are equal by design: rows of id 0.

        A size of 0 or 1, or one that another must equal, would become part of the program.
        """
        rows = EXAMPLE_ROWS
        columns = self.columns.lists
        lengths = [_example_lengths(lists.max_length, at) for at, lists in enumerate(columns)]
        lengths_GB = torch.tensor(lengths, dtype=torch.int64).view(len(lengths), rows)
        groups = len(self.schema.sequences)
        steps = int(lengths_GB[:groups].amax(dim=0).sum()) if groups else EXAMPLE_STEPS
        return ProgramInputs(
            singles=torch.zeros(len(self.columns.singles), rows, dtype=torch.int64),
            lists=tuple(
                torch.zeros(sum(lengths[at]), dtype=torch.int64)
                for at, lists in enumerate(columns)
                for _ in lists.ids
            ),
            lengths=lengths_GB,
            dense=torch.zeros(rows, len(self.schema.dense)),
            longest=torch.zeros(EXAMPLE_LONGEST, dtype=torch.int64),
            steps=torch.zeros(steps, dtype=torch.int64),
        )


@dataclass(frozen=True, kw_only=True)
class RequestInputs:
    """What a program for requests takes: rows without histories, and one user's histories.

    Attributes:
        rows: Of the candidates.
        events: ``(T,)`` int64 of each column of the sequence groups.
        user_lengths: ``(G, 1)`` int64, events of each group.
        longest: ``(L,)`` and
        steps: ``(N,)`` int64, of the user's longest history; their sizes count alone.
    """

    rows: ProgramInputs
    events: tuple[Tensor, ...]
    user_lengths: Tensor
    longest: Tensor
    steps: Tensor

    @property
    def arguments(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """In the program's order."""
        rows = (self.rows.singles, self.rows.lists, self.rows.lengths, self.rows.dense)
        return (*rows, self.events, self.user_lengths, self.longest, self.steps)

    @property
    def free(self) -> tuple[int | tuple[int, ...] | None, ...]:
        """As :attr:`ProgramInputs.free`; there is always one user."""
        return (*self.rows.free[:4], tuple(0 for _ in self.events), None, 0, 0)


class RequestLayout:
    """Which column of a schema is where among a request's inputs.

    Args:
        whole: Of the same schema; it has histories.

    Attributes:
        user: Of the user's one row, histories included.
        candidates: Of all but histories.
        events: The columns of histories.
    """

    def __init__(self, whole: InputLayout) -> None:
        self.user = whole
        self.candidates = InputLayout(replace(whole.schema, sequences=()))
        self.events = tuple(field.name for field in whole.schema.sequence_fields)

    @cached_property
    def independent(self) -> tuple[int, ...]:
        """As :attr:`InputLayout.independent`."""
        *places, at, _ = self.candidates.independent
        for group in self.user.schema.sequences:
            places.append(at)
            at += len(group.fields)
        return (*places, at + 1, at + 2)

    def of(self, user: Rows, candidates: Rows) -> RequestInputs:
        """Return the inputs of one decoded row of the user's, and of those of the candidates."""
        one, rows = self.user.of(user), self.candidates.of(candidates)
        return RequestInputs(
            rows=rows,
            events=one.lists[: len(self.events)],
            user_lengths=one.lengths[: len(self.user.schema.sequences)],
            longest=one.longest,
            steps=one.steps,
        )

    def example(self) -> RequestInputs:
        """As :meth:`InputLayout.example`."""
        groups = self.user.schema.sequences
        counts = [EXAMPLE_EVENTS + place for place in range(len(groups))]
        return RequestInputs(
            rows=self.candidates.example(),
            events=tuple(
                torch.zeros(count, dtype=torch.int64)
                for group, count in zip(groups, counts, strict=True)
                for _ in group.fields
            ),
            user_lengths=torch.tensor(counts).unsqueeze(1),
            longest=torch.zeros(EXAMPLE_LONGEST, dtype=torch.int64),
            steps=torch.zeros(EXAMPLE_STEPS, dtype=torch.int64),
        )


def _example_lengths(max_length: int, at: int) -> list[int]:
    """Of each row: none, one, and as many as fit into a few."""
    return [min(max_length, (row * (at + 2)) % 5) for row in range(EXAMPLE_ROWS)]
