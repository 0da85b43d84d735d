"""Models of TorchRec's and others made of its parts, for experts on their linear maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn, Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.models.experimental.transformerdlrm import DLRM_Transformer
from torchrec.modules.mlp import MLP

from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import sites_of

__all__ = ["FEATURES", "HOSTS", "ROWS", "Host", "injected", "plain", "rows_of"]

FEATURES, VALUES, WIDTH, DENSE = ("item", "hour"), 20, 4, 3
ROWS = 8


class TwoTower(nn.Module):
    """A user's and an item's tower, compared by their dot product."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables
        self.user = MLP(DENSE + WIDTH, [8, WIDTH])
        self.item = MLP(WIDTH, [8, WIDTH])

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        looked_up = self.tables(ids)
        user = self.user(torch.cat([dense, looked_up["hour"]], dim=1))
        return (user * self.item(looked_up["item"])).sum(dim=1, keepdim=True)


class MMoE(nn.Module):
    """Two tasks that weigh two expert networks, each by a gate of its own."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        width = DENSE + len(FEATURES) * WIDTH
        self.tables = tables
        self.networks = nn.ModuleList(MLP(width, [8, WIDTH]) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, 2) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        x = torch.cat([dense, self.tables(ids).values()], dim=1)
        hidden_B2W = torch.stack([network(x) for network in self.networks], dim=1)
        tasks = [
            head((gate(x).softmax(dim=1).unsqueeze(2) * hidden_B2W).sum(dim=1))
            for gate, head in zip(self.gates, self.heads, strict=True)
        ]
        return torch.cat(tasks, dim=1)


class Encoder(nn.Module):
    """Features as tokens of PyTorch's encoder, and a head."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables
        self.dense = nn.Linear(DENSE, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = MLP(WIDTH, [8, 1], activation=torch.relu)

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        tokens = [self.dense(dense), *self.tables(ids).to_dict().values()]
        return self.head(self.encoder(torch.stack(tokens, dim=1)).mean(dim=1))


@dataclass(frozen=True, kw_only=True)
class Host:
    """A model that gets experts.

    Attributes:
        build: Makes it of its tables.
        sites: Which linear maps get experts.
        shared: Whether they share a router, which reads the looked-up features.
    """

    build: Callable[[EmbeddingBagCollection], nn.Module]
    sites: Sequence[str] = ("*",)
    shared: bool = False


MLPS: dict[str, Any] = {
    "dense_in_features": DENSE,
    "dense_arch_layer_sizes": [8, WIDTH],
    "over_arch_layer_sizes": [8, 6, 1],
}
HOSTS = {
    "DLRM": Host(build=partial(DLRM, **MLPS)),
    "DLRM, a shared router": Host(build=partial(DLRM, **MLPS), sites=["over_arch*"], shared=True),
    "DLRM_DCN": Host(build=partial(DLRM_DCN, **MLPS, dcn_num_layers=1, dcn_low_rank_dim=3)),
    "DLRM_Projection": Host(
        build=partial(
            DLRM_Projection,
            **MLPS,
            interaction_branch1_layer_sizes=[8, 2 * WIDTH],
            interaction_branch2_layer_sizes=[8, 2 * WIDTH],
        )
    ),
    "DLRM_Transformer": Host(
        build=partial(DLRM_Transformer, **MLPS, nhead=2, ntransformer_layers=1),
        sites=["dense_arch*", "over_arch*"],  # experts in its encoder need the fast path off
    ),
    "SimpleDeepFMNN": Host(
        build=lambda tables: SimpleDeepFMNN(
            num_dense_features=DENSE,
            embedding_bag_collection=tables,
            hidden_layer_size=8,
            deep_fm_dimension=5,
        )
    ),
    "two towers": Host(build=TwoTower),
    "MMoE": Host(build=MMoE),
    "nn.TransformerEncoder": Host(build=Encoder, sites=["dense", "head*"]),
}


def plain(host: Host) -> nn.Module:
    """The host without experts, the same whenever it is made."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=name, embedding_dim=WIDTH, num_embeddings=VALUES, feature_names=[name]
        )
        for name in FEATURES
    ]
    model = host.build(EmbeddingBagCollection(tables=tables))
    for module in model.modules():
        # Two passes are compared.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def injected(host: Host, grown: bool = True, losses: bool = True) -> nn.Module:
    """The host with experts; ``grown``, they add something, as after training."""
    model = plain(host)
    weights: dict[str, Any] = {} if losses else {"balance_weight": 0.0, "z_weight": 0.0}
    config = HiLoMoEConfig(num_layers=2, num_experts=4, rank=2, **weights)
    if host.shared:
        width = len(FEATURES) * WIDTH
        inject_shared_router(model, config, list(host.sites), "sparse_arch", width)
    else:
        inject_hilomoe(model, config, list(host.sites))
    if grown:
        torch.manual_seed(1)
        with torch.no_grad():
            for site in sites_of(model).values():
                site.expert_out.normal_()
    return model


def rows_of(seed: int) -> tuple[Tensor, KeyedJaggedTensor]:
    """A batch: a dense vector and one value of each feature in every row."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(VALUES, (len(FEATURES) * ROWS,), generator=rng)
    lengths = torch.ones(len(FEATURES) * ROWS, dtype=torch.int64)
    features = KeyedJaggedTensor.from_lengths_sync(list(FEATURES), ids, lengths)
    return torch.randn(ROWS, DENSE, generator=rng), features
