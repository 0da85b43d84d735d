"""The ranker: embeddings, one of the backbones, and where its experts go."""

from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.config.backbones import (
    BSTConfig,
    DIENConfig,
    DINConfig,
    InterFormerConfig,
    TransActConfig,
)
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = ["InjectionConfig", "ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class InjectionConfig(HiLoMoEConfig):
    """HiLoMoE's options and where its experts go.

    Attributes:
        sites: Groups that the backbone declares (``head``, ``ffn``, ``attention``), ``all`` of
            them, or name patterns of linear maps.
        routing: ``row`` routes every row of a site's input by itself, an event at a time where
            the site sees events; ``sample`` decides once for each sample, by its candidate and
            context, for all sites together; ``random`` is the control for experiments: each row
            has a path that nothing learned.
        route_by: For each expert layer, the features that decide in it, once for each sample: the
            candidate's, the context's, or a history's, by the mean of its events; ``candidate``,
            ``context`` and ``histories`` stand for all features of a side. The direction of an
            embedding decides, not its length. Wants ``routing`` ``sample``, or ``random`` for its
            control: the same features, compared with keys that nothing learned. Null lets every
            layer read all that ``routing`` gives it.
    """

    sites: tuple[str, ...] = ("head",)
    routing: Literal["row", "sample", "random"] = "row"
    route_by: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route_by is None:
            return
        if self.routing == "row":
            raise ValueError(
                "model.hilomoe.route_by names features of a sample, but model.hilomoe.routing is "
                "row. Set routing to sample, or to random for the control, or route_by to null."
            )
        if len(self.route_by) != self.num_layers:
            raise ValueError(
                f"model.hilomoe.route_by has {len(self.route_by)} lists of features for num_layers "
                f"= {self.num_layers}. Give one list for each expert layer, or set num_layers."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ranker.

    Attributes:
        backbone: A name in :data:`torchrec_hilomoe.models.build.BUILDERS`.
        embedding_dim: Width of every embedding; a multiple of 4.
        embed_dense: Whether each dense feature becomes an embedding, itself times a learned
            vector, instead of a number.
        head: Hidden widths of the MLP head.
        dropout: In the backbone and the head.
        batch_norm: Whether the head is normalised.
        bst: Options of BST.
        din: Options of DIN.
        dien: Options of DIEN.
        transact: Options of TransAct.
        interformer: Options of InterFormer.
        hilomoe: Experts; null is the plain backbone.
    """

    backbone: str = "bst"
    embedding_dim: int = 16
    embed_dense: bool = False
    head: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    batch_norm: bool = False
    bst: BSTConfig = field(default_factory=BSTConfig)
    din: DINConfig = field(default_factory=DINConfig)
    dien: DIENConfig = field(default_factory=DIENConfig)
    transact: TransActConfig = field(default_factory=TransActConfig)
    interformer: InterFormerConfig = field(default_factory=InterFormerConfig)
    hilomoe: InjectionConfig | None = field(default_factory=InjectionConfig)
