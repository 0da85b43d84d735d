"""A pass that a probe has heard, and the rows of a site that it tells of.

Shape legend: as in `probe`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.probe.interactions import BucketRows, Buckets

__all__ = ["HeardPass", "LossTerms"]


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


@dataclass
class HeardPass:
    """A forward pass, until its backward pass.

    Attributes:
        number: Heard passes before it.
        args: What the model's forward was called with.
        kwargs: The same by keyword.
        query_BQ: The samples' query; None before it was heard.
        buckets: Of the samples; None before a gradient asks for them.
        offsets: Where each sample's events begin, by the module that said so.
        terms: How the host makes its loss.
    """

    number: int
    args: tuple
    kwargs: Mapping[str, Any]
    query_BQ: Tensor | None = None
    buckets: Buckets | None = None
    offsets: dict[str, Tensor] = field(default_factory=dict)
    terms: LossTerms = LossTerms()

    @property
    def samples(self) -> int:
        """Number of samples that count: those of weight 0 have no gradient."""
        assert self.query_BQ is not None
        weights = self.terms.weights
        return len(self.query_BQ) if weights is None else int((weights > 0).sum())

    def rows(self, site: str, tokens: str | None, x: Tensor, gradient: Tensor) -> BucketRows:
        """Undo the loss's division and weighting: each row's input and own gradient.

        Args:
            site: Its name, for errors.
            tokens: The module that says whose its rows are, if it sees events.
            x: Its input.
            gradient: By its output.
        """
        assert self.query_BQ is not None
        assert self.buckets is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        samples, terms = len(self.query_BQ), self.terms
        denominator = samples if terms.denominator is None else terms.denominator
        x_ND = x.flatten(0, -2).to(dtype)
        delta_NO = gradient.flatten(0, -2).to(dtype) * denominator
        buckets = self.buckets
        weight_N = x_ND.new_ones(samples) if terms.weights is None else terms.weights.to(dtype)
        if tokens is not None or x.shape[:-1] != (samples,):  # a row is not a sample
            sample_N = self._samples(site, tokens, x, samples)
            buckets, weight_N = buckets.at(sample_N), weight_N[sample_N]
        counts = weight_N > 0  # the others have no gradient to tell
        rows = BucketRows(x_ND=x_ND, delta_NO=delta_NO, weight_N=weight_N, buckets=buckets)
        return rows if bool(counts.all()) else rows.at(counts)

    def _samples(self, site: str, tokens: str | None, x: Tensor, samples: int) -> Tensor:
        """Whose each row is."""
        sample_B = torch.arange(samples, device=x.device)
        if tokens is not None and tokens in self.offsets:
            offsets = self.offsets[tokens]
            return sample_B.repeat_interleave(offsets[1:] - offsets[:-1], output_size=x.shape[0])
        if x.dim() < 2 or x.shape[0] != samples:
            raise ValueError(
                f"InteractionProbe: the query has {samples} samples, but the input of site "
                f"{site!r} has shape {tuple(x.shape)}; its first dimension must be the samples. "
                "Say whose its rows are (tokens), or leave this site out."
            )
        return sample_B.repeat_interleave(x.shape[1:-1].numel())
