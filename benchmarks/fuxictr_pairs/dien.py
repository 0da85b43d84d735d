"""DIEN twice: a GRU, attention by an MLP with Dice, a GRU with attentional update gates."""

from typing import Any, cast

from torch import nn

from benchmarks.fuxictr_pairs.pair import Pair, Weights
from benchmarks.fuxictr_pairs.size import PLAIN
from tests.helpers.fuxictr import build_fuxictr
from tests.helpers.fuxictr_dien import dien_weights
from torchrec_hilomoe.backbones.dien import DIEN
from torchrec_hilomoe.config import DIENConfig, InjectionConfig, ModelConfig, RunConfig

__all__ = ["DIENPair"]


class DIENPair(Pair):
    """See :class:`Pair`."""

    PADS_BEHIND = True  # it packs as many events as there are, from the first

    def config(self, hilomoe: InjectionConfig = PLAIN) -> RunConfig:
        """Return ours of the same widths."""
        return self.size.run(
            ModelConfig(
                backbone="dien",
                embedding_dim=self.size.embedding,
                head=self.size.head,
                dien=DIENConfig(attention_units=self.size.attention),
                hilomoe=hilomoe,
            )
        )

    def build(self) -> Any:
        """Return theirs."""
        return build_fuxictr(
            "DIEN",
            self.size.tables,
            {},
            self.size.embedding,
            dnn_hidden_units=list(self.size.head),
            attention_type="din_attention",
            attention_hidden_units=list(self.size.attention),
            attention_activation="Dice",
            use_attention_softmax=True,
            batch_norm=False,
        )

    def weights(self, backbone: nn.Module) -> Weights:
        """Yield each tensor of ours outside the tables, with theirs in our form."""
        for ours, theirs, as_ours in dien_weights(cast("DIEN", backbone), self.theirs):
            yield ours, as_ours(theirs)
