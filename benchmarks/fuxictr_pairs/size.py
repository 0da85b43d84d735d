"""How large a pair is, and the random rows that it trains on."""

from dataclasses import dataclass

from benchmarks.random_batches import Stream
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

__all__ = ["CATEGORIES", "CLIP", "ITEM", "PLAIN", "Size"]

CATEGORIES = 1000
CLIP = 10.0  # of the gradients' norm, as FuxiCTR does it
PLAIN = InjectionConfig(enabled=False)
ITEM = ("item", "category")  # an item's fields


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths of a backbone over items and their categories, and what it trains on.

    Attributes:
        embedding: Width of a vector.
        attention: Hidden widths of the attention's MLP, where there is one.
        head: Hidden widths of its head.
        items: Rows of the item table.
        max_length: Of a history.
        mean_length: Of histories.
        batch_size: Rows of a global batch.
    """

    embedding: int
    attention: tuple[int, ...]
    head: tuple[int, ...]
    items: int
    max_length: int
    mean_length: int
    batch_size: int

    @property
    def tables(self) -> dict[str, int]:
        """Rows of each."""
        return dict(zip(ITEM, (self.items, CATEGORIES), strict=True))

    @property
    def stream(self) -> Stream:
        """Random rows of it."""
        fields = tuple(IdFeature(name=f"{name}_history", table=name) for name in ITEM)
        schema = Schema(
            dataset="random",
            tables=self.tables,
            candidate=tuple(IdFeature(name=name, table=name) for name in ITEM),
            sequences=(SequenceGroup(name="history", fields=fields, max_length=self.max_length),),
        )
        return Stream(schema=schema, mean_length=self.mean_length)

    def run(self, model: ModelConfig) -> RunConfig:
        """How ours is trained."""
        return RunConfig(
            model=model, train=TrainConfig(batch_size=self.batch_size, max_grad_norm=CLIP)
        )
