"""A small host whose features decide or do not, and a probe of it."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchrec_hilomoe import HiLoMoEConfig, InteractionProbe

VALUES, WIDTH = 12, 4
FEATURES = {"a": range(0, 4), "b": range(4, 8), "number": range(8, 9)}
CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4, rank=2)


class Features(nn.Module):
    """Two embedded ids and a number, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VALUES, WIDTH) for _ in range(2))

    def forward(self, ids_B2, number_B1):
        parts = [self.tables[0](ids_B2[:, 0]), self.tables[1](ids_B2[:, 1])]
        return torch.cat([*parts, number_B1], dim=1)


class Host(nn.Module):
    """A head of two maps over features and free inputs."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.features = Features()
        self.first = nn.Linear(9 + 6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 1)

    def forward(self, ids_B2, number_B1, free_BF):
        x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
        return self.last(self.dropout(self.act(self.norm(self.first(x))))).squeeze(1)


def make_batch(seed: int, rows: int = 256):
    """Clicks whose weights on the free inputs are chosen by feature ``a``."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(VALUES, (rows, 2), generator=rng)
    number, free = torch.randn(rows, 1, generator=rng), torch.randn(rows, 6, generator=rng)
    sign = torch.where(ids[:, 0] % 2 == 0, 1.0, -1.0)
    clicks = torch.rand(rows, generator=rng) < torch.sigmoid(2 * sign * free[:, 0])
    return (ids, number, free), clicks.float()


def build(**options) -> Host:
    torch.manual_seed(0)
    return Host(**options)


def probe_of(model: nn.Module, **options: Any) -> InteractionProbe:
    given: dict[str, Any] = {
        "sites": ["first"],
        "query_module": "features",
        "features": FEATURES,
        "draws": 3,
        "blocks": 4,
        **options,
    }
    return InteractionProbe(model, given.pop("config", CONFIG), **given)


def steps(model: nn.Module, seeds, rows: int = 256) -> None:
    for seed in seeds:
        inputs, clicks = make_batch(seed, rows)
        F.binary_cross_entropy_with_logits(model(*inputs), clicks).backward()
        model.zero_grad()


def probed(model: nn.Module, batches: int = 16, rows: int = 256, **options) -> InteractionProbe:
    probe = probe_of(model, **options)
    with probe.fit():
        steps(model, range(batches), rows)
    with probe.judge():
        steps(model, range(batches, 2 * batches), rows)
    return probe


class EventHost(nn.Module):
    """A map of events, padded or in one list, summed up by sample."""

    def __init__(self, jagged: bool) -> None:
        super().__init__()
        self.jagged = jagged
        self.features, self.offsets = Features(), nn.Identity()
        self.up = nn.Linear(6, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, ids_B2, number_B1, events):
        sums = self.features(ids_B2, number_B1).sum(dim=1)
        if self.jagged:
            offsets = self.offsets(torch.arange(len(ids_B2) + 1) * 3)
            up = nn.functional.leaky_relu(self.up(events.flatten(0, 1)))
            up = torch.segment_reduce(up, "sum", offsets=offsets)
        else:
            up = nn.functional.leaky_relu(self.up(events)).sum(dim=1)
        return self.last(up).squeeze(1) + 0 * sums
