"""Several histories of each row become one, a step at a time.

A step is what happened at one distance from now: the latest events of all groups are one step,
those before them the next. Groups that are parallel match step by step; of groups that are not, a
row has as many steps as its longest, and a group without an event at a step is zero there.

Shape legend:
    B  rows
    N  steps of all rows together
    T  events of a group, of all rows together
    V  width of a group's events
    W  width of a step: of all groups' events
    D  width of a merged step
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn, Tensor

from torchrec_hilomoe.embeddings.features import History

__all__ = ["MaskNet", "Steps", "steps_of"]

torch.fx.wrap("_sum")


@dataclass(frozen=True)
class Steps:
    """Each row's steps, jagged, oldest first.

    Attributes:
        values: ``(N, W)``.
        lengths: ``(B,)`` int64, steps of each row.
    """

    values: Tensor
    lengths: Tensor


def steps_of(histories: Sequence[History], total: int | None = None) -> Steps:
    """Concatenate the groups' events step by step.

    Args:
        histories: At least one.
        total: ``N`` where the host knows it. If not, several groups ask the device for it, which
            waits for it on a GPU; one group has as many steps as events.
    """
    if len(histories) == 1:
        return Steps(values=histories[0].events, lengths=histories[0].lengths)
    lengths_B = torch.stack([history.lengths for history in histories]).amax(dim=0)
    total = _sum(lengths_B) if total is None else total
    rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    row_N = torch.repeat_interleave(rows_B, lengths_B, output_size=total)
    ends_B = torch.cumsum(lengths_B, dim=0)
    recency_N = ends_B[row_N] - torch.arange(total, device=lengths_B.device)
    values = [_at(history, row_N, recency_N) for history in histories]
    return Steps(values=torch.cat(values, dim=1), lengths=lengths_B)


def _sum(lengths_B: Tensor) -> int:
    return cast(int, lengths_B.sum().item())  # int() would not do: export gives it a symbol


def _at(history: History, row_N: Tensor, recency_N: Tensor) -> Tensor:
    """Each row's event that many events ago, 1 the latest; ``(N, V)``, zero where there is none."""
    none_1V = torch.zeros_like(history.target[:1])
    after_B = torch.cumsum(history.lengths, dim=0) + 1  # with the one that stands for none
    exists_N = recency_N <= history.lengths[row_N]
    source_N = torch.where(exists_N, after_B[row_N] - recency_N, 0)
    return torch.cat([none_1V, history.events]).index_select(0, source_N)


class MaskNet(nn.Module):
    r"""Merge a step's events into one vector, each feature weighed by all of them.

    .. math:: s = C (x \odot M(x))

    ``M`` is a hidden layer of the input's width, Swish and a linear map; ``C`` is linear
    (a linear compressed embedding).

    Args:
        in_features: ``W``.
        out_features: ``D``.

    Shape:
        - input ``(N, W)``, output ``(N, D)``
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            nn.Linear(in_features, in_features), nn.SiLU(), nn.Linear(in_features, in_features)
        )
        self.compress = nn.Linear(in_features, out_features)

    def forward(self, x_NW: Tensor) -> Tensor:
        """Merge; shapes are in the class docstring."""
        return self.compress(x_NW * self.mask(x_NW))
