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
from torchrec_hilomoe.models.train_task import CTRModel
from torchrec_hilomoe.serving.inputs import InputLayout
from torchrec_hilomoe.serving.tables import Precision, table_of

__all__ = ["ServedModel"]


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
        schema, layout = self.layout.schema, self.layout
        singles = dict(zip(layout.columns.singles, singles_SB, strict=True))
        listed = dict(zip(layout.list_columns, lists, strict=True))
        lengths = {
            name: lengths_GB[place]
            for place, of_lists in enumerate(layout.columns.lists)
            for name in of_lists.ids
        }
        found = LookedUp(
            unpooled={
                field.name: self._vectors(field.name, ids[field.name])
                for fields, ids in ((schema.candidate, singles), (schema.sequence_fields, listed))
                for field in fields
            },
            pooled={
                it.name: self._vectors(it.name, singles[it.name])
                if it.max_length == 1
                else mean_of(self._vectors(it.name, listed[it.name]), lengths[it.name])
                for it in schema.pooled
            },
            lengths=tuple(lengths[group.fields[0].name] for group in schema.sequences),
            dense=dense_BF,
            max_seqlen=longest_L.shape[0],
            num_tokens=steps_N.shape[0],
        )
        features = lay_out(found, schema, self.projections, self.dense_embedding)
        return self.backbone(features).float()

    def _vectors(self, feature: str, ids: Tensor) -> Tensor:
        return self.tables[self._places[feature]](ids)


def _tables(sparse: SparseArch) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the features and the vectors of every table."""
    pooled = [] if sparse.pooled is None else [sparse.pooled]
    for collection in (sparse.unpooled, *pooled, *sparse.given.values()):
        if isinstance(collection, EmbeddingCollection):
            configs, tables = collection.embedding_configs(), collection.embeddings
        else:
            assert isinstance(collection, EmbeddingBagCollection)
            configs, tables = collection.embedding_bag_configs(), collection.embedding_bags
        for config in configs:
            weight_ND = tables[config.name].weight
            assert isinstance(weight_ND, Tensor)
            yield config.feature_names, weight_ND
