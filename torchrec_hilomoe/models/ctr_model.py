"""The ranker: jagged ids and dense features in, logits out.

Shape legend:
    B  rows
    F  dense features
"""

from torch import nn, Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch

__all__ = ["CTRModel"]


class CTRModel(nn.Module):
    """Lookups, then a backbone.

    Args:
        sparse: The two sharded collections.
        backbone: One of :data:`torchrec_hilomoe.models.build.BUILDERS`.
    """

    def __init__(self, sparse: SparseArch, backbone: Backbone) -> None:
        super().__init__()
        self.sparse = sparse
        self.backbone = backbone

    def forward(
        self,
        pooled: KeyedJaggedTensor,
        unpooled: KeyedJaggedTensor,
        dense_BF: Tensor,
        longest: int,
        *,
        time_B: Tensor | None = None,
        times: tuple[Tensor, ...] = (),
        steps: int | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """Return logits ``(B,)``; arguments as in :class:`SparseArch`."""
        return self.backbone(
            self.sparse(
                pooled,
                unpooled,
                dense_BF,
                longest,
                time_B=time_B,
                times=times,
                steps=steps,
                rows=rows,
            )
        )
