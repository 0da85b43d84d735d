"""The ranker: embeddings, one of the backbones, and where its experts go."""

from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.backbones.layers.gating import Gating
from torchrec_hilomoe.backbones.layers.mlp import Activation
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = [
    "BSTConfig",
    "DCNConfig",
    "DIENConfig",
    "DINConfig",
    "DLRMConfig",
    "InjectionConfig",
    "InterFormerConfig",
    "ModelConfig",
    "TransActConfig",
]


@dataclass(frozen=True, kw_only=True)
class BSTConfig:
    """Options of :class:`torchrec_hilomoe.backbones.bst.BST`.

    Attributes:
        position_dim: Width of the vector for a token's distance from the target, in features; null
            is ``model.embedding_dim``, 0 leaves positions out.
        num_layers: Number of transformer layers over each history.
        num_heads: Number of attention heads; must divide the width of a token.
        residual: Whether attention and feed-forward add to their inputs.
        layer_norm: Whether the outputs of attention and feed-forward are layer-normalized.
        pooling: Summary of a history: ``target`` keeps the target's token, ``mean`` averages all.
        dropout: Share of values inside the transformer dropped in training; null is
            ``model.dropout``.
    """

    position_dim: int | None = None
    num_layers: int = 1
    num_heads: int = 4
    residual: bool = True
    layer_norm: bool = False
    pooling: Literal["target", "mean"] = "target"
    dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class DINConfig:
    """Options of :class:`torchrec_hilomoe.backbones.din.DIN`.

    Attributes:
        attention_units: Hidden widths of the attention's MLP, in units.
        attention_activation: Activation of the attention's hidden units.
        attention_dropout: Share of the attention's hidden units dropped in training.
        softmax: Whether the weights of a history sum to one.
        head_activation: Activation of the head's hidden units.
    """

    attention_units: tuple[int, ...] = (64,)
    attention_activation: Activation = "dice"
    attention_dropout: float = 0.0
    softmax: bool = False
    head_activation: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class DIENConfig:
    """Options of :class:`torchrec_hilomoe.backbones.dien.DIEN`.

    Attributes:
        attention: Kind of target attention: ``mlp`` as DIN does, ``bilinear`` by a learned
            product, ``dot`` by the plain one.
        attention_units: Hidden widths of the attention's MLP, in units.
        attention_activation: Activation of the attention's hidden units.
        attention_dropout: Share of the attention's hidden units dropped in training.
        auxiliary_weight: Weight of the auxiliary loss, in which each state predicts the event
            after it; 0 leaves the loss out.
        auxiliary_units: Hidden widths of the auxiliary loss's MLP, in units.
        head_activation: Activation of the head's hidden units.
    """

    attention: Literal["mlp", "bilinear", "dot"] = "mlp"
    attention_units: tuple[int, ...] = (80, 40)
    attention_activation: Activation = "dice"
    attention_dropout: float = 0.0
    auxiliary_weight: float = 0.0
    auxiliary_units: tuple[int, ...] = (100, 50)
    head_activation: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class TransActConfig:
    """Options of :class:`torchrec_hilomoe.backbones.transact.TransAct`.

    Attributes:
        num_layers: Number of encoder layers over each history.
        num_heads: Number of attention heads; must divide the width of a token.
        ffn_width: Hidden width of the encoder's feed-forward maps, in units.
        latest: Number of latest events that the head sees one by one.
        time_window: Length of the window before the request of which a random part is hidden in
            training, in seconds; null hides nothing.
        dropout: Share of values inside the encoder dropped in training; null is
            ``model.dropout``.
        cross_layers: Number of layers of the head's cross network.
        head_activation: Activation of the head's hidden units.
    """

    num_layers: int = 1
    num_heads: int = 2
    ffn_width: int = 512
    latest: int = 1
    time_window: int | None = None
    dropout: float | None = None
    cross_layers: int = 3
    head_activation: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class InterFormerConfig:
    """Options of :class:`torchrec_hilomoe.backbones.interformer.InterFormer`.

    Attributes:
        num_layers: Number of layers in which context and history read each other.
        interaction_layers: Number of DHEN layers inside each of those layers.
        num_heads: Number of attention heads; each gets an even number of an embedding's features.
        cls_tokens: Number of tokens that summarize the context, prepended to the history.
        pooled_tokens: Number of tokens that summarize the history by attention pooling.
        recent_tokens: Number of latest events that join the summary of the history.
        gating: Gate of the summaries: ``printed`` as the paper's equation, or ``self``.
        residual: Whether the layers of the history's side add to their inputs.
        dropout: Share of values inside the layers dropped in training; null is
            ``model.dropout``.
    """

    num_layers: int = 2
    interaction_layers: int = 1
    num_heads: int = 2
    cls_tokens: int = 4
    pooled_tokens: int = 2
    recent_tokens: int = 2
    gating: Gating = "printed"
    residual: bool = False
    dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """Options of :class:`torchrec_hilomoe.backbones.dlrm.DLRM`.

    Attributes:
        dense_units: Hidden widths of the map of the dense features, in units; one of
            ``model.embedding_dim`` follows.
        head_activation: Activation of the head's hidden units.
    """

    dense_units: tuple[int, ...] = (512, 256)
    head_activation: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class DCNConfig:
    """Options of :class:`torchrec_hilomoe.backbones.dcn.DCN`.

    Attributes:
        dense_units: Hidden widths of the map of the dense features, in units; one of
            ``model.embedding_dim`` follows.
        cross_layers: Number of layers of the cross network.
        low_rank: Rank of the matrix of a cross layer; null gives it a full one.
        head_activation: Activation of the head's hidden units.
    """

    dense_units: tuple[int, ...] = (512, 256)
    cross_layers: int = 3
    low_rank: int | None = None
    head_activation: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class InjectionConfig(HiLoMoEConfig):
    """HiLoMoE's experts: their options, and which linear maps carry them.

    Attributes:
        enabled: Whether the backbone has experts; ``model.hilomoe: null`` is short for false.
        sites: Linear maps that carry experts: groups that the backbone declares (``head``, ``ffn``,
            ``attention``), ``all`` of its groups, or name patterns.
        routing: Kind of routing: ``row`` routes every row of a site's input by itself,
            an event at a time where the site sees events; ``sample`` decides once for each sample,
            by its candidate and context, for all sites together; ``random`` is the control for
            experiments: each row has a path that nothing learned.
        route_by: Features that decide, one list for each expert layer, once for each sample: the
            candidate's, the context's, or a history's, by the mean of its events; ``candidate``,
            ``context`` and ``histories`` stand for all features of a side. The direction of an
            embedding decides, not its length. Needs ``routing`` ``sample``, or ``random`` for its
            control: the same features, compared with keys that nothing learned. Null lets every
            layer read all that ``routing`` gives it. ``auto`` finds them from the gradients of a
            plain model; where none decides, there are no experts.
        probe_first: Whether ``route_by`` ``auto`` trains a plain model aside for 300 steps, finds
            the features as ``apps/probe.py`` does, and only then begins the run; false gathers in
            the run, while it trains without experts. Null is true where these steps have fewer
            than 200,000 rows to tell from, and the whole run has as many.
        probe_steps: Number of steps in which ``route_by`` ``auto`` gathers gradients in the run;
            null takes the last two thirds of the steps before experts begin, 2000 at most, and 400
            after ``init_from``.
        confirm: Whether ``route_by`` ``auto`` measures on the validation split what its experts
            have brought when their warm-up ends, and takes them out again where that is surely no
            gain.
    """

    enabled: bool = True
    sites: tuple[str, ...] = ("head",)
    routing: Literal["row", "sample", "random"] = "row"
    route_by: Literal["auto"] | tuple[tuple[str, ...], ...] | None = None
    probe_first: bool | None = None
    probe_steps: int | None = None
    confirm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_first and self.probe_steps is not None:
            raise ValueError(
                f"model.hilomoe.probe_first is true and probe_steps is {self.probe_steps}, which "
                "counts steps of the run, but nothing is gathered in it then. Drop one of them."
            )
        if self.probe_steps is not None and self.probe_steps < 2:
            raise ValueError(
                f"model.hilomoe.probe_steps must be at least 2 or null, got {self.probe_steps}: "
                "some steps find what experts would do, later ones judge it."
            )
        if self.route_by is None:
            return
        if self.routing == "row":
            means = "is auto, which finds" if self.route_by == "auto" else "names"
            raise ValueError(
                f"model.hilomoe.route_by {means} features of a sample, but model.hilomoe.routing "
                "is row. Set routing to sample, or to random for the control, or route_by to null."
            )
        if self.route_by == "auto":
            return
        if len(self.route_by) != self.num_layers:
            raise ValueError(
                f"model.hilomoe.route_by has {len(self.route_by)} lists of features for num_layers "
                f"= {self.num_layers}. Give one list for each expert layer, or set num_layers."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ranker: embeddings, a backbone, a head, and experts.

    Attributes:
        backbone: Name of the model: ``bst``, ``dien``, ``din``, ``interformer`` or ``transact``,
            which read histories; ``dlrm`` or ``dcn``, which need none.
        embedding_dim: Width of every embedding, in features; a multiple of 4.
        embed_dense: Whether each dense feature becomes an embedding, itself times a learned
            vector, instead of a number.
        head: Hidden widths of the MLP head, in units.
        dropout: Share of values of the backbone and the head dropped in training.
        batch_norm: Whether the head's hidden layers are batch-normalized.
        bst: Options of BST.
        din: Options of DIN.
        dien: Options of DIEN.
        transact: Options of TransAct.
        interformer: Options of InterFormer.
        dlrm: Options of DLRM.
        dcn: Options of DCN-v2.
        hilomoe: Options of the experts; null is the plain backbone.
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
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    dcn: DCNConfig = field(default_factory=DCNConfig)
    hilomoe: InjectionConfig = field(default_factory=InjectionConfig)
