"""TransAct, the transformer over a user's real-time actions (Xia et al., 2023, arXiv 2306.00248).

Every event is read together with the target, by an encoder that knows no positions; a DCN-v2 head
crosses what it says with the other features.

Shape legend:
    B  rows
    T  events of all rows together
    N  tokens of all rows together: T events and one empty event a row
    E  width of an event
    W  width of a token: an event, and the target as far as events describe it
    L  most tokens in a row
    K  latest events that are kept apart
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.base import Backbone, check_histories, HookPoint
from torchrec_hilomoe.backbones.layers.attention import EncoderLayer
from torchrec_hilomoe.backbones.layers.cross import CrossHead
from torchrec_hilomoe.backbones.layers.jagged import max_rows, pad, tokens_of
from torchrec_hilomoe.backbones.layers.mlp import Activation
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)

__all__ = ["TransAct"]

# Opaque to FX: its gradient is written out.
torch.fx.wrap("max_rows")


@dataclass(frozen=True)
class _Actions:
    """A history's tokens, jagged: an empty event first, then the events, oldest first.

    The empty event stands in for the events of a row that has none, and is hidden elsewhere.

    Attributes:
        values: ``(N, W)``, each event with the target.
        row: ``(N,)`` int64, whose each is.
        visible: ``(N,)`` booleans: which tokens are asked and read.
        offsets: ``(B + 1,)`` int64, where each row begins.
        max_seqlen: ``L``.
    """

    values: Tensor
    row: Tensor
    visible: Tensor
    offsets: Tensor
    max_seqlen: int


class Encoder(nn.Module):
    """Layers one after the other, and the row's summary: its latest tokens and its maximum.

    Args:
        layers: Each with its own parameters.
        width: ``W``.
        latest: ``K``.
    """

    def __init__(self, layers: Sequence[EncoderLayer], width: int, latest: int) -> None:
        super().__init__()
        self.latest = latest
        self.layers = nn.ModuleList(layers)
        self.pool = nn.Linear(width, width)

    def forward(self, actions: _Actions, offsets: Tensor) -> Tensor:
        """Return ``(B, (K + 1) * W)``: the latest tokens, the last one last, then the maximum."""
        x_NW, max_seqlen = actions.values, actions.max_seqlen
        visible_BL = pad(actions.visible.float().unsqueeze(1), offsets, max_seqlen).squeeze(2) > 0
        for layer in self.layers:
            x_NW = layer(x_NW, offsets, max_seqlen, visible_BL)
        shown_NW = x_NW.masked_fill(~actions.visible.unsqueeze(1), -torch.inf)
        maximum_BW = max_rows(shown_NW, offsets, actions.row)
        return torch.cat([self._latest(x_NW, actions.visible, offsets), self.pool(maximum_BW)], 1)

    def _latest(self, x_NW: Tensor, visible_N: Tensor, offsets: Tensor) -> Tensor:
        """Return ``(B, K * W)``, zero where a row has no such token or hides it."""
        begin_B1, end_B1 = offsets[:-1].unsqueeze(1), offsets[1:].unsqueeze(1)
        place_BK = end_B1 - torch.arange(self.latest, 0, -1, device=offsets.device)
        held_BK = torch.maximum(place_BK, begin_B1)
        shown_BK = (place_BK >= begin_B1) & visible_N[held_BK]
        latest_BKW = x_NW.index_select(0, held_BK.flatten()).unflatten(0, (-1, self.latest))
        return latest_BKW.masked_fill(~shown_BK.unsqueeze(2), 0.0).flatten(1)


class TransAct(Backbone):
    """An encoder over each history, every event beside the target; then a DCN-v2 head.

    A field that only events have, such as the type of an action, is no part of the target.

    A row without events is read as if it had one, of zeros.

    With a time window, each batch in training hides the events of a random last stretch before
    the request, no longer than the window, so that the model does not lean on the newest actions
    alone. Hidden events are treated as padding would be: nothing attends to them, they are in no
    maximum, and they leave zeros among the latest tokens. A row's very latest event always stays.

    Args:
        widths: Sizes of the features.
        num_layers: Encoder layers over each history; at least 1.
        num_heads: Attention heads; must divide the width of a token.
        ffn_width: Hidden width of the encoder's feed-forward maps.
        latest: How many of the latest events the head sees one by one; all of a history that
            cannot have as many.
        time_window: Seconds before the request of which a random part is hidden in training;
            None hides nothing.
        dropout: Inside the encoders; None is ``head_dropout``.
        cross_layers: Layers of the head's cross network.
        head: Hidden widths of the head's other half.
        head_activation: Activation of those hidden layers.
        head_dropout: Inside those hidden layers.
        batch_norm: Whether they are normalised.

    Raises:
        ValueError: If the schema has no history, or no times where a window is asked for, or the
            heads do not divide the width.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "head": ("head.hidden.*",),
            "cross": ("head.cross.*",),
            "pool": ("*.pool",),
            "ffn": ("*.ffn_in", "*.ffn_out"),
            "attention": ("*.attention.*",),
        }
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        num_layers: int = 1,
        num_heads: int = 2,
        ffn_width: int = 512,
        latest: int = 1,
        time_window: int | None = None,
        dropout: float | None = None,
        cross_layers: int = 3,
        head: Sequence[int] = (1024, 512, 256),
        head_activation: Activation = "relu",
        head_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_histories("TransAct", widths)
        for name, value in (("num_layers", num_layers), ("ffn_width", ffn_width)):
            if value < 1:
                raise ValueError(f"TransAct.{name} must be at least 1, got {value}.")
        if latest < 1:
            raise ValueError(f"TransAct.latest must be at least 1, got {latest}.")
        _check_time_window(time_window, widths)
        dropout = head_dropout if dropout is None else dropout
        self.time_window = time_window
        self.targets = [_shared_columns(history, widths.embedding) for history in widths.histories]
        encoders = []
        summary = 0
        for history, columns in zip(widths.histories, self.targets, strict=True):
            width = history.event + sum(at.stop - at.start for at in columns)
            layers = [
                EncoderLayer(width, num_heads, ffn_width, dropout=dropout)
                for _ in range(num_layers)
            ]
            kept = min(latest, history.max_length)
            encoders.append(Encoder(layers, width, kept))
            summary += (kept + 1) * width
        self.encoders = nn.ModuleList(encoders)
        # They say whose the tokens are that an encoder sees.
        self.rows = nn.ModuleList(HookPoint() for _ in encoders)
        self.head = CrossHead(
            widths.candidate + widths.context + summary,
            head,
            cross_layers=cross_layers,
            activation=head_activation,
            dropout=head_dropout,
            batch_norm=batch_norm,
        )

    @property
    def tokens(self) -> Mapping[str, str]:
        """See :class:`Backbone`."""
        return {f"encoders.{i}.layers.*": f"rows.{i}" for i in range(len(self.rows))}

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        sample_BS = self.sample_of(features)
        since_B = self._since(features)
        summaries = []
        for index, history in enumerate(features.histories):
            actions = _actions_of(history, features.max_seqlen, self.targets[index], since_B)
            offsets = self.rows[index](actions.offsets)
            summaries.append(self.encoders[index](actions, offsets))
        return self.head(torch.cat([sample_BS, *summaries], dim=1))

    def _since(self, features: SequenceFeatures) -> Tensor | None:
        """Return ``(B,)``, after when this batch hides events; None if it hides none."""
        if self.time_window is None or not self.training:
            return None
        assert features.time is not None
        hidden_1 = torch.randint_like(features.time[:1], self.time_window + 1)
        return features.time - hidden_1


def _actions_of(
    history: History, max_seqlen: int, target: Sequence[slice], since_B: Tensor | None
) -> _Actions:
    """Put the empty event before each row's events, and the target beside each of them."""
    nothing = History(
        events=history.events,
        lengths=history.lengths,
        target=torch.zeros_like(history.target),
    )
    tokens = tokens_of(nothing, max_seqlen)
    values_NE, offsets = tokens.values, tokens.offsets
    rows_B = torch.arange(history.lengths.shape[0], device=offsets.device)
    row_N = torch.repeat_interleave(rows_B, history.lengths + 1, output_size=values_NE.shape[0])
    visible_N = torch.where(tokens.recency > 0, True, (history.lengths == 0)[row_N])
    if since_B is not None:
        assert history.times is not None
        # Counted from 1, an event's number is its place less its row's; the empty ones have any.
        number_N = torch.arange(values_NE.shape[0], device=offsets.device) - row_N
        times_N = torch.cat([since_B[:1], history.times])[number_N]
        visible_N = visible_N & ((tokens.recency < 2) | (times_N <= since_B[row_N]))
    beside = [history.target[:, columns].index_select(0, row_N) for columns in target]
    return _Actions(
        values=torch.cat([values_NE, *beside], dim=1),
        row=row_N,
        visible=visible_N,
        offsets=offsets,
        max_seqlen=tokens.max_seqlen,
    )


def _shared_columns(history: HistoryWidths, embedding: int) -> list[slice]:
    """Return the runs of the target's columns that are no field of events alone."""
    runs: list[slice] = []
    for field in range(history.event // embedding):
        if field in history.event_only:
            continue
        begin, end = field * embedding, (field + 1) * embedding
        if runs and runs[-1].stop == begin:
            begin = runs.pop().start
        runs.append(slice(begin, end))
    return runs


def _check_time_window(time_window: int | None, widths: FeatureWidths) -> None:
    if time_window is None:
        return
    if time_window < 1:
        raise ValueError(
            f"TransAct.time_window must be at least 1 second, got {time_window}. "
            "Use null for no window."
        )
    absent = [] if widths.timed else ["Schema.time"]
    for index, history in enumerate(widths.histories):
        if not history.timed:
            absent.append(f"Schema.sequences[{index}].time")
    if absent:
        raise ValueError(
            f"TransAct.time_window is {time_window} seconds, but the schema does not say when "
            f"things happened: {', '.join(absent)} is null. Name the columns, or set "
            "model.transact.time_window to null."
        )
