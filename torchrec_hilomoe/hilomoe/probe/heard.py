"""A pass that a probe has heard, and the rows of a site that it tells of.

Shape legend: as in `probe`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.probe.rows import BucketRows, Buckets, joined

__all__ = ["HeardPass", "HeardQuery", "LossTerms", "SiteCall"]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """How a host makes one loss of its rows' own losses: weights times losses, summed, divided.

    Attributes:
        weights: Weights of the samples, ``(samples,)``, above 0; None weighs all alike.
        denominator: Number by which this rank's sum is divided; None is its number of samples.

    Example:
        >>> LossTerms(weights=torch.ones(4), denominator=4.0).denominator
        4.0
    """

    weights: Tensor | None = None
    denominator: float | None = None

    def check(self, samples: int) -> None:
        """Refuse what is not of so many samples.

        Raises:
            ValueError: If weights are of others, or the loss was divided by no number above 0.
        """
        if self.weights is not None and self.weights.shape != (samples,):
            raise ValueError(
                f"LossTerms.weights: the query has {samples} samples, but weights have shape "
                f"{tuple(self.weights.shape)}. Give one weight for each sample, ({samples},)."
            )
        if self.denominator is not None and not 0 < self.denominator < float("inf"):
            raise ValueError(
                f"LossTerms.denominator must be above 0 and finite, got {self.denominator}. Give "
                "the number by which this rank's sum of losses is divided."
            )


@dataclass(eq=False)
class HeardQuery:
    """The samples' query, as its module gave it.

    Attributes:
        query_BQ: The query.
        buckets: Of the samples; None before somebody asked for them.
    """

    query_BQ: Tensor
    buckets: Buckets | None = None


@dataclass(eq=False)
class SiteCall:
    """One call of a site.

    Attributes:
        x: Its input.
        version: Of the input then, which counts its changes in place.
        query: What routed it; None where the query's module runs after the site.
        offsets: Where each sample's events begin; None if nobody had said so.
        gradient: By its output, of all backward passes so far; None before the first.
    """

    x: Tensor
    version: int
    query: HeardQuery | None
    offsets: Tensor | None
    gradient: Tensor | None = None

    def add(self, site: str, gradient: Tensor) -> None:
        """Add the gradient of a backward pass: tasks may have one each."""
        if self.gradient is not None:
            self.gradient = self.gradient + gradient
            return
        if self.x._version != self.version:
            raise ValueError(
                f"InteractionProbe.sites: the input of {site!r} was changed in place after the "
                "site had read it, so nobody knows what it was. Change a copy, or leave this site "
                "out."
            )
        # A host may go on to fill the same memory with the next batch.
        self.x, self.gradient = self.x.clone(), gradient


@dataclass(eq=False)
class HeardPass:
    """A forward pass, and what its backward passes tell.

    Attributes:
        number: Heard passes before it.
        args: What the model's forward was called with.
        kwargs: The same by keyword.
        query: The samples' query; None before it was heard.
        offsets: Where each sample's events begin, by the module that said so.
        calls: Of each site, in the order of the forward.
        not_finite: Sites whose gradient told nothing.
        terms: How the host makes its loss; None before a gradient asks for it.
    """

    number: int
    args: tuple
    kwargs: Mapping[str, Any]
    query: HeardQuery | None = None
    offsets: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, list[SiteCall]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    terms: LossTerms | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached a site."""
        return bool(self.not_finite) or any(
            call.gradient is not None for calls in self.calls.values() for call in calls
        )

    def queries(self) -> list[HeardQuery]:
        """By which rows are put into buckets; without those that have no sample."""
        return [*dict.fromkeys(query for site in self.calls for _, query in self._told(site))]

    def size(self, site: str) -> tuple[int, int]:
        """Samples and rows that a site computed."""
        told = [*self._told(site)]
        samples = max((len(query.query_BQ) for _, query in told), default=0)
        return samples, sum(call.x.shape[:-1].numel() for call, _ in told)

    def _told(self, site: str) -> Iterator[tuple[SiteCall, HeardQuery]]:
        """Calls of which a gradient was heard, each with the samples' query, if it has any."""
        for call in self.calls.get(site, ()):
            query = call.query or self.query
            if call.gradient is not None and query is not None and len(query.query_BQ):
                yield call, query

    def rows(self, site: str, tokens: str | None) -> BucketRows | None:
        """Undo the loss's division and weighting: each row's input and own gradient.

        Args:
            site: Its name.
            tokens: The module that says whose its rows are, if it sees events.

        Returns:
            The rows of all calls of the site; None where no sample's gradient was heard.
        """
        rows = [self._rows(site, tokens, *told) for told in self._told(site)]
        return joined(rows) if rows else None

    def _rows(self, site: str, tokens: str | None, call: SiteCall, query: HeardQuery) -> BucketRows:
        x, gradient, buckets = call.x, call.gradient, query.buckets
        assert gradient is not None
        assert buckets is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        samples, terms = len(query.query_BQ), self.terms or LossTerms()
        terms.check(samples)
        denominator = samples if terms.denominator is None else terms.denominator
        x_ND = x.flatten(0, -2).to(dtype)
        delta_NO = gradient.flatten(0, -2).to(dtype) * denominator
        weight_N = x_ND.new_ones(samples) if terms.weights is None else terms.weights.to(dtype)
        weighed_B, sample_N = weight_N > 0, None
        counts_N = weighed_B  # the others have no gradient to tell
        if tokens is not None or x.shape[:-1] != (samples,):  # a row is not a sample
            offsets = self.offsets.get(tokens or "") if call.offsets is None else call.offsets
            sample_N = _samples(site, x, offsets, samples)
            buckets, weight_N = buckets.at(sample_N), weight_N[sample_N]
            # What fills up a history of fewer events has none either.
            counts_N = weighed_B[sample_N] & delta_NO.any(dim=1)
        rows = BucketRows(
            x_ND=x_ND,
            delta_NO=delta_NO,
            weight_N=weight_N,
            buckets=buckets,
            sample_N=sample_N,
            samples=int(weighed_B.sum()),
        )
        return rows if bool(counts_N.all()) else rows.at(counts_N)


def _samples(site: str, x: Tensor, offsets: Tensor | None, samples: int) -> Tensor:
    """Whose each row is."""
    sample_B = torch.arange(samples, device=x.device)
    if offsets is not None:
        return sample_B.repeat_interleave(offsets[1:] - offsets[:-1], output_size=x.shape[0])
    if x.dim() < 2 or x.shape[0] != samples:
        raise ValueError(
            f"InteractionProbe: the query has {samples} samples, but the input of site "
            f"{site!r} has shape {tuple(x.shape)}; its first dimension must be the samples. "
            "Say whose its rows are (tokens), or leave this site out."
        )
    return sample_B.repeat_interleave(x.shape[1:-1].numel())
