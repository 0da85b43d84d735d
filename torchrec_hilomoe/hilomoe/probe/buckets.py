"""Which expert a router would send a sample to, if it read one feature and had learned nothing.

A feature's columns of the query go to the key with the largest product among ``E`` random keys; a
single number goes to its quantile, and one that many rows share to the middle of its quantiles.
Dividing the columns by their root mean square, as a router with that view does, changes no choice
among one feature's keys; where all features are read at once (the control ``all``), it weighs them.

Shape legend:
    B  samples     Q  width of the query     E  experts, and buckets     D  draws
    K  units: the draws of all names, but one of a number     V  numbers     P  names with keys
"""

from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.hilomoe.probe.rows import Buckets
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
        units_of: Of each name, its units: one for each draw, or one, since quantiles have no keys.
        units: ``K``.
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
        self._edges_VE: Tensor | None = None
        self.units, self.units_of = 0, dict[str, Sequence[int]]()
        for name in self.names:
            count = 1 if name in self._numbers else draws
            self.units_of[name] = range(self.units, self.units + count)
            self.units += count

    def prepare(self, query_BQ: Tensor) -> bool:
        """Find the quantiles of numbers from the first samples; a collective call until it did.

        Returns:
            Whether buckets can be told.
        """
        if not self._numbers or self._edges_VE is not None:
            return True
        values_NV = gathered(self._values(query_BQ), self._group)
        if len(values_NV) == 0:
            return False
        quantiles = torch.arange(1, self._experts, device=query_BQ.device) / self._experts
        self._edges_VE = torch.nanquantile(values_NV, quantiles, dim=0).t().contiguous()
        return True

    def edges(self) -> list[Tensor]:
        """The quantiles of each number, in order; empty before they were found."""
        return [] if self._edges_VE is None else list(self._edges_VE)

    def take_edges(self, edges: Sequence[Tensor]) -> None:
        """Take over what `edges` gave."""
        self._edges_VE = torch.stack(list(edges)) if edges else None

    def __call__(self, query_BQ: Tensor, number: int) -> Buckets:
        """Put the samples of a pass into buckets, unit after unit."""
        found: dict[str, Tensor] = {RANDOM: self._anywhere(query_BQ, number)}
        if self._edges_VE is not None:
            values_VB = self._values(query_BQ).t()
            found |= zip(self._numbers, _quantiles(values_VB, self._edges_VE).split(1), strict=True)
        parts = {
            name: query_BQ[:, part.start : part.stop]
            for name, part in self._ranges.items()
            if name not in found
        }
        parts[ALL] = parts_of(query_BQ, list(self._ranges.values()))
        products = [self._keys[name].t().to(it.dtype) @ it.t() for name, it in parts.items()]
        nearest_KB = _largest(torch.cat(products).unflatten(0, (-1, self._experts)))
        found |= zip(parts, nearest_KB.split(self._draws), strict=True)
        few = self._experts <= torch.iinfo(torch.int16).max
        bucket_KB = torch.cat([found[name].short() if few else found[name] for name in self.names])
        return Buckets(bucket_KB, self._experts)

    def _values(self, query_BQ: Tensor) -> Tensor:
        """``(B, V)``."""
        return query_BQ[:, [self._ranges[name].start for name in self._numbers]].float()

    def _anywhere(self, query_BQ: Tensor, number: int) -> Tensor:
        few_BQ = query_BQ[:, :: -(-query_BQ.shape[1] // HASHED)]
        bits_BQ = few_BQ.float().contiguous().view(torch.int32).long()
        odd_Q = mixed(torch.arange(bits_BQ.shape[1], device=bits_BQ.device) + PRIMES[0]) | 1
        hash_B = mixed((bits_BQ * odd_Q).sum(dim=1))
        hash_B = mixed(hash_B + mixed(earlier(hash_B) * PRIMES[1]) + number * PRIMES[2])
        draws_D1 = torch.arange(self._draws, device=hash_B.device).unsqueeze(1)
        return mixed(hash_B + draws_D1 * PRIMES[0]) % self._experts


def _quantiles(values_VB: Tensor, edges_VE: Tensor) -> Tensor:
    """Between which quantiles each value is: in the middle of those that it is equal to.

    What is not a number is beyond all of them.
    """
    value_V1B, edge_VE1 = values_VB.unsqueeze(1), edges_VE.unsqueeze(2)
    below, up_to = (~(value_V1B <= edge_VE1)).sum(dim=1), (~(value_V1B < edge_VE1)).sum(dim=1)
    return (below + up_to) // 2


def _largest(product_KEB: Tensor) -> Tensor:
    """``(K, B)``, the first of the largest; as ``argmax`` says, in a fifth of its time."""
    E = product_KEB.shape[1]
    expert_E1 = torch.arange(E, dtype=torch.int32, device=product_KEB.device).unsqueeze(1)
    is_largest = product_KEB == product_KEB.amax(dim=1, keepdim=True)
    # Where a product is not a number nothing is the largest.
    return torch.where(is_largest, expert_E1, E - 1).amin(dim=1)


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
