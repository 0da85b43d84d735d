"""The ways in which each table can be cut, in an order that is the same in every process."""

from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Enumerator, ShardingOption
from torchrec.distributed.types import ModuleSharder

__all__ = ["OrderedEnumerator"]


class OrderedEnumerator(Enumerator):
    """TorchRec's enumerator, in a fixed order.

    TorchRec's own goes through sets of names, so that among ways it holds equally fast the choice
    falls by the process's hash seed: a plan made elsewhere, or anew, would be another one.

    Args:
        found: TorchRec's own.
    """

    def __init__(self, found: EmbeddingEnumerator) -> None:
        self._found = found

    def enumerate(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> list[ShardingOption]:
        """Return the ways of each table; tables in the order of the model, ways by name."""
        ways = self._found.enumerate(module, sharders)
        tables = {way.fqn: None for way in ways}
        place = {table: index for index, table in enumerate(tables)}
        # The last ones first: simple types have the later names, and of equals the first is taken.
        return sorted(
            sorted(ways, key=lambda way: (way.sharding_type, way.compute_kernel), reverse=True),
            key=lambda way: place[way.fqn],
        )

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Let TorchRec estimate storage and time."""
        self._found.populate_estimates(sharding_options)
