"""Which expert a router would send a sample to, if it read one feature and had learned nothing.

A feature's columns of the query go to the key with the largest product among ``E`` random keys; a
single number goes to its quantile, and one that many rows share to the middle of its quantiles.
Dividing the columns by their root mean square, as a router with that view does, changes no choice
among one feature's keys; where all features are read at once (the control ``all``), it weighs them.

Shape legend:
    B  samples     Q  width of the query     E  experts, and buckets     K  units: features x draws
"""

from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.hilomoe.ranks import process_group_of, RankGroup, size_of
from torchrec_hilomoe.hilomoe.views import parts_of

__all__ = ["ALL", "RANDOM", "WIDER", "FeatureBuckets"]

ALL, RANDOM, WIDER = "all", "random", "wider"  # controls, of which the last has no buckets
HASHED = 32  # columns of the query: enough to tell samples apart
PRIMES = (2_654_435_761, 2_246_822_519, 3_266_489_917)  # odd, of 32 bits


class FeatureBuckets:
    """Puts samples into buckets, by every feature and by two controls.

    ``random`` puts each sample anywhere: by a hash of bits of its query, of the number of the
    pass, and of how many equal samples of the pass came before on this rank. So ranks that share
    the samples put each where one process does, but for samples that are equal.

    Args:
        features: Where each stands in the query.
        experts: ``E``.
        draws: Draws of keys for each.
        seed: Of the keys.
        device: Where queries are.
        group: Ranks that share the samples; None are all.

    Attributes:
        names: The features, then ``all`` and ``random``.
    """

    def __init__(
        self,
        features: Mapping[str, range],
        experts: int,
        draws: int,
        seed: int,
        device: torch.device,
        group: RankGroup | None = None,
    ) -> None:
        self._group = group
        self.names = (*features, ALL, RANDOM)
        self._ranges, self._experts, self._draws = dict(features), experts, draws
        generator = torch.Generator().manual_seed(seed)
        widths = {name: len(part) for name, part in features.items()}
        widths[ALL] = sum(widths.values())
        self._keys = {}
        for name, width in widths.items():
            keys_DEQ = torch.randn(draws, experts, width, generator=generator)
            keys_DEQ -= keys_DEQ.mean(dim=1, keepdim=True)  # as a router starts
            self._keys[name] = keys_DEQ.flatten(0, 1).t().to(device)
        self._numbers = [name for name, part in features.items() if len(part) == 1]
        self._edges: dict[str, Tensor] = {}

    def prepare(self, query_BQ: Tensor) -> bool:
        """Find the quantiles of numbers from the first samples; a collective call until it did.

        Returns:
            Whether buckets can be told.
        """
        if not self._numbers or self._edges:
            return True
        columns = [self._ranges[name].start for name in self._numbers]
        values_NV = gathered(query_BQ[:, columns].float(), self._group)
        if len(values_NV) == 0:
            return False
        quantiles = torch.arange(1, self._experts, device=query_BQ.device) / self._experts
        for place, name in enumerate(self._numbers):
            self._edges[name] = torch.nanquantile(values_NV[:, place], quantiles)
        return True

    def edges(self) -> list[Tensor]:
        """The quantiles of each number, in order; empty before they were found."""
        return list(self._edges.values())

    def take_edges(self, edges: Sequence[Tensor]) -> None:
        """Take over what `edges` gave."""
        self._edges = dict(zip(self._numbers, edges, strict=True)) if edges else {}

    def __call__(self, query_BQ: Tensor, number: int) -> Tensor:
        """``(K, B)``, the buckets of the samples of a pass, draw after draw of each feature."""
        parts = {name: query_BQ[:, part.start : part.stop] for name, part in self._ranges.items()}
        numbers = {
            name: _quantile(parts.pop(name).squeeze(1).float(), edges)
            for name, edges in self._edges.items()
        }
        parts[ALL] = parts_of(query_BQ, list(self._ranges.values()))
        products = [part_BQ @ self._keys[name].to(part_BQ.dtype) for name, part_BQ in parts.items()]
        nearest_BK = torch.cat(products, dim=1).unflatten(1, (-1, self._experts)).max(dim=2).indices
        nearest = dict(zip(parts, nearest_BK.t().split(self._draws), strict=True))
        buckets = {name: it.expand(self._draws, -1) for name, it in numbers.items()} | nearest
        buckets[RANDOM] = self._anywhere(query_BQ, number)
        return torch.cat([buckets[name] for name in self.names])

    def _anywhere(self, query_BQ: Tensor, number: int) -> Tensor:
        few_BQ = query_BQ[:, :: -(-query_BQ.shape[1] // HASHED)]
        bits_BQ = few_BQ.float().contiguous().view(torch.int32).long()
        odd_Q = mixed(torch.arange(bits_BQ.shape[1], device=bits_BQ.device) + PRIMES[0]) | 1
        hash_B = mixed((bits_BQ * odd_Q).sum(dim=1))
        hash_B = mixed(hash_B + mixed(earlier(hash_B) * PRIMES[1]) + number * PRIMES[2])
        draws_D1 = torch.arange(self._draws, device=hash_B.device).unsqueeze(1)
        return mixed(hash_B + draws_D1 * PRIMES[0]) % self._experts


def _quantile(value_B: Tensor, edges: Tensor) -> Tensor:
    """Between which quantiles each value is: in the middle of those that it is equal to."""
    value_B = value_B.contiguous()
    below, above = (torch.bucketize(value_B, edges, right=right) for right in (False, True))
    return (below + above) // 2


def mixed(x: Tensor) -> Tensor:
    """Scatter integers over 32 bits: two rounds of shift and multiply, as hashes end."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def earlier(x_B: Tensor) -> Tensor:
    """How many equal numbers stand before each."""
    order_B = x_B.argsort(stable=True)
    sorted_B = x_B[order_B]
    place_B = torch.arange(len(x_B), device=x_B.device)
    starts_B = torch.ones_like(sorted_B, dtype=torch.bool)
    starts_B[1:] = sorted_B[1:] != sorted_B[:-1]
    run_B = torch.where(starts_B, place_B, 0).cummax(dim=0).values if len(x_B) else place_B
    return torch.empty_like(place_B).scatter_(0, order_B, place_B - run_B)


def gathered(values_NV: Tensor, group: RankGroup | None) -> Tensor:
    """The values of all ranks; a collective call."""
    if size_of(group) == 1:
        return values_NV
    ranks = process_group_of(group)
    counts = values_NV.new_zeros(size_of(group), dtype=torch.int64)
    counts[dist.get_rank(ranks)] = len(values_NV)
    dist.all_reduce(counts, group=ranks)
    padded = values_NV.new_zeros(int(counts.max()), values_NV.shape[1])
    padded[: len(values_NV)] = values_NV
    parts: Sequence[Tensor] = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(list(parts), padded, group=ranks)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
