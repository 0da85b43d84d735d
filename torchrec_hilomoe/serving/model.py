"""The ranker as it is exported: plain tensors in, logits out.

TorchRec's jagged tensors and collections make the total of ids and the number of rows constants of
a program. Here ids come as plain tensors and tables are plain modules; the vectors are laid out by
the function that training uses, and the backbone is the very module that was trained.

Shape legend: see :mod:`torchrec_hilomoe.serving.inputs`; D is a table's width.
"""

from collections.abc import Iterator

from torch import nn, Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.backbones.layers.jagged import mean_of
from torchrec_hilomoe.embeddings.lay_out import lay_out, LookedUp
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.train_task import CTRModel
from torchrec_hilomoe.serving.inputs import InputLayout, RequestLayout
from torchrec_hilomoe.serving.tables import Precision, table_of

__all__ = ["ServedModel", "ServedRequest"]


class ServedModel(nn.Module):
    """Lookups in plain tables, then the backbone, in evaluation mode.

    Args:
        model: A trained ranker whose tables are not sharded; its backbone becomes part of this.
        tables: How numbers of tables are kept.

    Attributes:
        layout: Which column is where among the inputs.
    """

    def __init__(self, model: CTRModel, tables: Precision = "fp32") -> None:
        super().__init__()
        sparse = model.sparse
        self.layout = InputLayout(sparse.schema)
        self.backbone = model.backbone
        self.projections = sparse.projections
        self.dense_embedding = sparse.dense_embedding
        self.tables = nn.ModuleList()
        self._places: dict[str, int] = {}
        for names, weight_ND in _tables(sparse):
            self._places |= dict.fromkeys(names, len(self.tables))
            self.tables.append(table_of(weight_ND, tables))
        self.eval()

    def forward(
        self,
        singles_SB: Tensor,
        lists: tuple[Tensor, ...],
        lengths_GB: Tensor,
        dense_BF: Tensor,
        longest_L: Tensor,
        steps_N: Tensor,
    ) -> Tensor:
        """Return logits ``(B,)``; see :class:`~torchrec_hilomoe.serving.inputs.ProgramInputs`."""
        unpooled, pooled = self.looked_up(self.layout, singles_SB, lists, lengths_GB)
        lengths = lengths_of(self.layout, lengths_GB)
        found = LookedUp(
            unpooled=unpooled,
            pooled=pooled,
            lengths=tuple(lengths[group.fields[0].name] for group in self.layout.schema.sequences),
            dense=dense_BF,
            max_seqlen=longest_L.shape[0],
            num_tokens=steps_N.shape[0],
        )
        return self.logits(found)

    def looked_up(
        self,
        layout: InputLayout,
        singles_SB: Tensor,
        lists: tuple[Tensor, ...],
        lengths_GB: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the vectors of a layout's unpooled features, and those of its pooled ones."""
        schema, columns = layout.schema, layout.columns
        singles = dict(zip(columns.singles, singles_SB, strict=True))
        listed = dict(zip(layout.list_columns, lists, strict=True))
        lengths = lengths_of(layout, lengths_GB)
        ids = {field.name: singles[field.name] for field in schema.candidate}
        ids |= {field.name: listed[field.name] for field in schema.sequence_fields}
        unpooled = {name: self.vectors(name, of_feature) for name, of_feature in ids.items()}
        pooled = {
            it.name: self.vectors(it.name, singles[it.name])
            if it.max_length == 1
            else mean_of(self.vectors(it.name, listed[it.name]), lengths[it.name])
            for it in schema.pooled
        }
        return unpooled, pooled

    def logits(self, found: LookedUp) -> Tensor:
        """Lay out vectors, and return logits ``(B,)``."""
        schema = self.layout.schema
        features = lay_out(found, schema, self.projections, self.dense_embedding)
        return self.backbone(features).float()

    def vectors(self, feature: str, ids: Tensor) -> Tensor:
        """Look up a feature's ids."""
        return self.tables[self._places[feature]](ids)


class ServedRequest(nn.Module):
    """One user with many candidates: what their histories alone decide is computed once.

    Histories are looked up once. A backbone that takes them as all rows' does with them what it
    can, once; others get a copy of the vectors for each row.

    Args:
        served: The model; it becomes part of this.

    Attributes:
        layout: Which column is where among the inputs.
    """

    def __init__(self, served: ServedModel) -> None:
        super().__init__()
        self.served = served
        self.layout = RequestLayout(served.layout)
        # A site that asks whose its events are wants those of each row.
        asked = any(site.tokens is not None for site in sites_of(served).values())
        self.shared = served.backbone.shares_histories and not asked
        self.eval()

    def forward(
        self,
        singles_SB: Tensor,
        lists: tuple[Tensor, ...],
        lengths_GB: Tensor,
        dense_BF: Tensor,
        events: tuple[Tensor, ...],
        lengths_G1: Tensor,
        longest_L: Tensor,
        steps_N: Tensor,
    ) -> Tensor:
        """Return logits ``(B,)``; see :class:`~torchrec_hilomoe.serving.inputs.RequestInputs`."""
        served, rows = self.served, singles_SB.shape[1]
        layout = self.layout.candidates
        unpooled, pooled = served.looked_up(layout, singles_SB, lists, lengths_GB)
        lengths = [lengths_G1[place] for place in range(len(served.layout.schema.sequences))]
        for name, ids in zip(self.layout.events, events, strict=True):
            vectors_TD = served.vectors(name, ids)
            if not self.shared:
                vectors_TD = vectors_TD.expand(rows, -1, -1).flatten(0, 1)
            unpooled[name] = vectors_TD
        found = LookedUp(
            unpooled=unpooled,
            pooled=pooled,
            lengths=tuple(it if self.shared else it.expand(rows) for it in lengths),
            dense=dense_BF,
            max_seqlen=longest_L.shape[0],
            num_tokens=steps_N.shape[0] * rows,
            shared=self.shared,
        )
        return served.logits(found)


def lengths_of(layout: InputLayout, lengths_GB: Tensor) -> dict[str, Tensor]:
    """Return ``(B,)``, the lengths of each list column; by index, for no list is unbound well."""
    return {
        name: lengths_GB[place]
        for place, of_lists in enumerate(layout.columns.lists)
        for name in of_lists.ids
    }


def _tables(sparse: SparseArch) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the features and the vectors of every table."""
    for collection in (sparse.unpooled, sparse.pooled, *sparse.given.values()):
        if collection is None:
            continue
        if isinstance(collection, EmbeddingCollection):
            configs, tables = collection.embedding_configs(), collection.embeddings
        else:
            assert isinstance(collection, EmbeddingBagCollection)
            configs, tables = collection.embedding_bag_configs(), collection.embedding_bags
        for config in configs:
            weight_ND = tables[config.name].weight
            assert isinstance(weight_ND, Tensor)
            yield config.feature_names, weight_ND
