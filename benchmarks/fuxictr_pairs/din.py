"""DIN twice: attention by an MLP with Dice, softmax over the history."""

from typing import Any

from torch import nn

from benchmarks.fuxictr_pairs.pair import mlp_weights, Pair, Weights
from benchmarks.fuxictr_pairs.size import PLAIN
from tests.helpers.fuxictr import build_fuxictr
from torchrec_hilomoe.config import DINConfig, InjectionConfig, ModelConfig, RunConfig

__all__ = ["DINPair"]


class DINPair(Pair):
    """See :class:`Pair`."""

    def config(self, hilomoe: InjectionConfig = PLAIN) -> RunConfig:
        """Return ours of the same widths."""
        return self.size.run(
            ModelConfig(
                backbone="din",
                embedding_dim=self.size.embedding,
                head=self.size.head,
                din=DINConfig(attention_units=self.size.attention, softmax=True),
                hilomoe=hilomoe,
            )
        )

    def build(self) -> Any:
        """Return theirs."""
        return build_fuxictr(
            "DIN",
            self.size.tables,
            {},
            self.size.embedding,
            dnn_hidden_units=list(self.size.head),
            attention_hidden_units=list(self.size.attention),
            attention_hidden_activations="Dice",
            din_use_softmax=True,
        )

    def weights(self, backbone: nn.Module) -> Weights:
        """Yield each tensor of ours outside the tables, with theirs in our form."""
        attention = self.theirs.attention_layers.attention_layer.mlp
        yield from mlp_weights(backbone.get_submodule("attentions.0.mlp"), list(attention))
        yield from mlp_weights(backbone.get_submodule("head"), list(self.theirs.dnn.mlp))
