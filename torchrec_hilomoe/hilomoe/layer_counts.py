"""How many expert layers the sites of a shared router compute: the router computes the most."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LayerCount", "LayerCounts"]


@dataclass(frozen=True, eq=False)
class LayerCount:
    """How many expert layers a site computes; the site keeps it, its router only hears of it."""

    layers: int


class LayerCounts:
    """The counts of a router's sites, weakly held: a site that is gone asks for no layers.

    A copy that has the sites has their copies' counts; one without them computes as many as this.

    Attributes:
        most: The largest count; as it was, when the last site is gone.
    """

    def __init__(self, most: int, counts: Iterable[LayerCount] = ()) -> None:
        self.most = most  # a number, and not found anew in each pass: a compiler reads it, too
        self._kept: list[weakref.ref[LayerCount]] = []
        for count in counts:
            self.add(count)

    def add(self, count: LayerCount) -> LayerCount:
        """Hear of a site's count, until nothing holds it any longer."""
        self._kept = [*self._kept, weakref.ref(count, self._update)]
        self._update()
        return count

    def _update(self, gone: weakref.ref[LayerCount] | None = None) -> None:
        self._kept = [kept for kept in self._kept if kept() is not None]
        self.most = max((count.layers for count in self._alive()), default=self.most)

    def _alive(self) -> list[LayerCount]:
        return [count for kept in self._kept if (count := kept()) is not None]

    def __reduce__(self) -> tuple:
        """Weak references can neither be pickled nor copied."""
        return LayerCounts, (self.most, self._alive())
