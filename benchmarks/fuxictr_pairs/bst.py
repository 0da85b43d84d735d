"""BST twice: one transformer layer whose target's token is kept.

FuxiCTR's wheel has no BST; its repository does, as ``model_zoo/BST/src/BST.py``, and that one runs
on the wheel's layers.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import nn, Tensor

from benchmarks.fuxictr_pairs.pair import mlp_weights, padded, Pair, Weights
from benchmarks.fuxictr_pairs.size import ITEM, PLAIN, Size
from tests.helpers.fuxictr import fuxictr_features
from torchrec_hilomoe.config import BSTConfig, InjectionConfig, ModelConfig, RunConfig
from torchrec_hilomoe.data.batch import CTRBatch

__all__ = ["BSTPair"]

HEADS = 4
SOURCE = Path("model_zoo/BST/src/BST.py")


class BSTPair(Pair):
    """See :class:`Pair`.

    Args:
        size: Of both.
        checkout: A clone of FuxiCTR's repository.

    Raises:
        ValueError: If it has no BST.
    """

    def __init__(self, size: Size, checkout: Path) -> None:
        self._source = checkout / SOURCE
        if not self._source.is_file():
            raise ValueError(
                f"there is no {self._source}. Clone https://github.com/reczoo/FuxiCTR and name the "
                "folder with --fuxictr."
            )
        super().__init__(size)

    def config(self, hilomoe: InjectionConfig = PLAIN) -> RunConfig:
        """Return ours of the same widths."""
        return self.size.run(
            ModelConfig(
                backbone="bst",
                embedding_dim=self.size.embedding,
                head=self.size.head,
                bst=BSTConfig(num_heads=HEADS),
                hilomoe=hilomoe,
            )
        )

    def build(self) -> Any:
        """Return theirs."""
        histories = tuple(f"{name}_history" for name in ITEM)
        features = fuxictr_features(self.size.tables, {})
        for name, history in zip(ITEM, histories, strict=True):
            features.features[history] = {
                **features.features[name],
                "type": "sequence",
                "max_len": self.size.max_length,
                "share_embedding": name,
            }
        features.default_emb_dim = self.size.embedding
        features.num_fields = features.get_num_fields()
        return self._module().BST(
            features,
            embedding_dim=self.size.embedding,
            dnn_hidden_units=list(self.size.head),
            num_heads=HEADS,
            layer_norm=False,
            bst_target_field=[ITEM],
            bst_sequence_field=[histories],
            seq_pooling_type="target",
            optimizer="adam",
            loss="binary_crossentropy",
            verbose=0,
            model_root="unused",
            metrics=["AUC"],
        )

    def weights(self, backbone: nn.Module) -> Weights:
        """Yield each tensor of ours outside the tables, with theirs in our form."""
        (encoder,) = self.theirs.transformer_encoders
        (block,) = encoder.transformer_blocks
        # Theirs counts positions from the front, ours from the target.
        yield backbone.get_parameter("positions.0"), encoder.position_emb.flip(0)
        layer = backbone.get_submodule("transformers.0.layers.0")
        queries_keys_values = zip(
            ("query", "key", "value"),
            block.attention.in_proj_weight.chunk(3),
            block.attention.in_proj_bias.chunk(3),
            strict=True,
        )
        for name, weight, bias in queries_keys_values:
            yield from _linear(layer.get_submodule(f"attention.{name}"), weight, bias)
        for name, theirs in (
            ("attention.output", block.attention.out_proj),
            ("ffn_in", block.ffn[0]),
            ("ffn_out", block.ffn[2]),
        ):
            yield from _linear(layer.get_submodule(name), theirs.weight, theirs.bias)
        yield from mlp_weights(backbone.get_submodule("head"), list(self.theirs.dnn.mlp))

    def batch(self, batch: CTRBatch) -> dict[str, Tensor]:
        """Return the same rows as their usual loader gives them: padded in front to the maximum."""
        histories = {
            f"{name}_history": padded(batch.unpooled, f"{name}_history", self.size.max_length)
            for name in ITEM
        }
        targets = {name: batch.unpooled[name].values() for name in ITEM}
        return {"label": batch.labels, **targets, **histories}

    def _module(self) -> Any:
        spec = spec_from_file_location("fuxictr_bst", self._source)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _linear(ours: nn.Module, weight: Tensor, bias: Tensor) -> Weights:
    yield ours.get_parameter("weight"), weight
    yield ours.get_parameter("bias"), bias
