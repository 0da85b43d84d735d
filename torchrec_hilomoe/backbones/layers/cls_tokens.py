"""Tokens that stand before each row's events, and where everything is once they do.

Shape legend:
    B  rows
    T  events of all rows together
    N  tokens of all rows together: of each row its CLS tokens, then its events, oldest first
    C  CLS tokens of a row
    R  recent events of a row
    D  width of a token
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.backbones.layers.attention import Rotation, rotation_of

__all__ = ["Places", "TokenCounts", "places_of", "prepend"]


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """How many tokens of each kind a row has, besides its events.

    Attributes:
        context: Of the context.
        cls: Of the context's summary, which stand before the events.
        pooled: Of the history's summary, by attention pooling.
        recent: Of the history's summary, the latest events.
    """

    context: int
    cls: int
    pooled: int
    recent: int

    @property
    def summary(self) -> int:
        """Of the history's summary: CLS, pooled, recent."""
        return self.cls + self.pooled + self.recent


@dataclass(frozen=True)
class Places:
    """Where in a jagged list each row's CLS tokens and events are; the same in all layers.

    Attributes:
        offsets: ``(B + 1,)`` int64, where each row begins.
        max_seqlen: Most tokens in a row.
        sources: ``(N,)`` int64, each token's place in all CLS tokens followed by all events.
        ends: ``(B, C + R)`` int64, places of the CLS tokens and of the latest events, latest first.
        exists: ``(B, C + R, 1)`` booleans: false for events that a short history lacks.
        rotation: Rotary positions: the token's index in its row, CLS tokens included.
    """

    offsets: Tensor
    max_seqlen: int
    sources: Tensor
    ends: Tensor
    exists: Tensor
    rotation: Rotation


def places_of(
    offsets: Tensor, events_TD: Tensor, max_seqlen: int, counts: TokenCounts, head_width: int
) -> Places:
    """Lay out rows of CLS tokens and events.

    Args:
        offsets: ``(B + 1,)`` int64, where each row begins, its CLS tokens counted.
        events_TD: The events.
        max_seqlen: Most events in a row.
        counts: ``C`` and ``R``.
        head_width: Features of an attention head, which are turned by their token's position.
    """
    device, rows, cls = offsets.device, offsets.shape[0] - 1, counts.cls
    total = events_TD.shape[0] + cls * rows
    lengths_B = offsets[1:] - offsets[:-1]
    row_B = torch.arange(rows, device=device)
    row_N = torch.repeat_interleave(row_B, lengths_B, output_size=total)
    token_N = torch.arange(total, device=device)
    position_N = token_N - offsets[row_N]
    cls_N = cls * row_N + position_N
    event_N = cls * rows + token_N - cls * (row_N + 1)
    ago_R = torch.arange(counts.recent, device=device)
    exists_BR = ago_R < lengths_B.unsqueeze(1) - cls
    recent_BR = offsets[1:].unsqueeze(1) - 1 - ago_R
    cls_BC = offsets[:-1].unsqueeze(1) + torch.arange(cls, device=device)
    always_BC = torch.ones_like(cls_BC, dtype=torch.bool)
    return Places(
        offsets=offsets,
        max_seqlen=max_seqlen + cls,
        sources=torch.where(position_N < cls, cls_N, event_N),
        ends=torch.cat([cls_BC, torch.where(exists_BR, recent_BR, 0)], dim=1),
        exists=torch.cat([always_BC, exists_BR], dim=1).unsqueeze(2),
        rotation=rotation_of(position_N, head_width, events_TD.dtype),
    )


def prepend(cls_BCD: Tensor, events_TD: Tensor, places: Places) -> Tensor:
    """Put each row's CLS tokens before its events; ``(N, D)``."""
    return torch.cat([cls_BCD.flatten(0, 1), events_TD]).index_select(0, places.sources)
