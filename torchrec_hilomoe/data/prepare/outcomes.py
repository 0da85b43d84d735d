"""What the commands beside the data sets come to, and show."""

from dataclasses import dataclass

__all__ = ["Checked", "Draft"]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What ``schema init`` has written.

    Attributes:
        path: Of the schema.
        text: Its content.
        hint: What to do next, in words.
    """

    path: str
    text: str
    hint: str

    def to_text(self) -> str:
        """Return what to do next."""
        return self.hint


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What ``check`` has found.

    Attributes:
        folder: That was checked.
        rows: That were read, by split.
        faults: One line each; none if it is as it should be.
    """

    folder: str
    rows: dict[str, int]
    faults: tuple[str, ...]

    def to_text(self) -> str:
        """Return a line a fault, and a last one that sums up."""
        rows = ", ".join(f"{split} {rows:,} rows" for split, rows in self.rows.items())
        count = len(self.faults)
        found = "whole" if not count else f"{count} fault{'s' if count > 1 else ''}"
        return "\n".join([*self.faults, f"{self.folder}: {found}; read {rows or 'no rows'}"])
