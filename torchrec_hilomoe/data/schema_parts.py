"""What a :class:`~torchrec_hilomoe.data.schema.Schema` is made of, each part checked by itself."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

__all__ = ["FrozenTable", "IdFeature", "PooledFeature", "SequenceGroup", "VocabularyRule"]


@dataclass(frozen=True, kw_only=True)
class IdFeature:
    """A categorical column looked up one vector an id.

    Attributes:
        name: Column, and the key in the jagged tensor.
        table: The embedding table that its ids index.
    """

    name: str
    table: str


@dataclass(frozen=True, kw_only=True)
class PooledFeature:
    """A categorical column whose vectors are averaged into one: context, or a bag of ids.

    Attributes:
        name: Column, and the key in the jagged tensor.
        table: The embedding table that its ids index.
        max_length: 1 for a plain integer column; more for a list column, which is cut to its
            last ``max_length`` ids.
    """

    name: str
    table: str
    max_length: int = 1

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(
                f"Schema.pooled[{self.name!r}].max_length must be at least 1 (1 is a plain "
                f"column), got {self.max_length}."
            )


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """Parallel list columns of equal lengths: one entry an event, the oldest first.

    Attributes:
        name: What the events are, for messages.
        fields: The columns; those that share a table with a candidate field describe the same
            property of the event as that field does of the candidate.
        max_length: Longer rows are cut to this many events.
        keep: Which end survives the cut: ``"last"`` (the latest events) or ``"first"``.
        time: A list column parallel to the fields: when each event happened, in whole seconds.
    """

    name: str
    fields: tuple[IdFeature, ...]
    max_length: int
    keep: Literal["last", "first"] = "last"
    time: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1 or not self.fields:
            raise ValueError(
                f"Schema.sequences[{self.name!r}] needs fields and max_length of at least 1, "
                f"got {len(self.fields)} fields and max_length {self.max_length}."
            )
        if self.keep not in ("last", "first"):
            raise ValueError(
                f"Schema.sequences[{self.name!r}].keep must be 'last' or 'first', "
                f"got {self.keep!r}."
            )


@dataclass(frozen=True, kw_only=True)
class FrozenTable:
    """Vectors that come with the data and are never trained, such as those of images.

    Attributes:
        width: Of a vector; a multiple of 4, which FBGEMM's kernels want.
        file: The vectors, one row an id, as a ``.npy`` file of float32 beside the schema.
    """

    width: int
    file: str

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(
                f"Schema.frozen: width must be a multiple of 4, got {self.width}; pad the vectors "
                "with zeros."
            )
        path = PurePosixPath(self.file)
        if not self.file or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"Schema.frozen: file must be a path below the schema's folder, got {self.file!r}."
            )


@dataclass(frozen=True, kw_only=True)
class VocabularyRule:
    """How the raw values of a table's columns became ids; id 0 is padding.

    Attributes:
        kind: ``counted``: the values that occur often enough in training rows; ``given``: those
            of a list; ``hashed``: every value has a row, which it may share.
        min_count: Rarer values are unknown, if ``counted``.
        unknown: The row of unknown values: ``zero``, with padding, or ``last``, their own.
        file: The values and their ids, beside the schema; null if ``hashed``.
    """

    kind: Literal["counted", "given", "hashed"]
    min_count: int = 1
    unknown: Literal["zero", "last"] = "zero"
    file: str | None = None

    def __post_init__(self) -> None:
        for name, valid in (
            ("kind", ("counted", "given", "hashed")),
            ("unknown", ("zero", "last")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"Schema.vocabularies: {name} must be one of {', '.join(valid)}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.min_count < 1 or (self.min_count > 1 and self.kind != "counted"):
            raise ValueError(
                f"Schema.vocabularies: min_count is {self.min_count} for a {self.kind} vocabulary; "
                "it must be at least 1, and only counted ones may have more."
            )
