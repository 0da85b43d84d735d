"""Rotary positions (Su et al., 2021, arXiv 2104.09864): products tell how far apart tokens are.

Shape legend:
    N  tokens of all rows together
    W  width of all heads
    H  heads
    P  pairs of features in a head: W / H / 2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rotation", "rotate", "rotation_of"]

BASE = 10_000.0


@dataclass(frozen=True)
class Rotation:
    """How far each token's pairs of features are turned; the same in every head and layer.

    Attributes:
        cosines: ``(N, P)``.
        sines: ``(N, P)``.
    """

    cosines: Tensor
    sines: Tensor


def rotation_of(positions_N: Tensor, head_width: int, dtype: torch.dtype) -> Rotation:
    """Turn pair ``p`` of a token at position ``t`` by ``t * 10000 ** (-p / P)``.

    Args:
        positions_N: Integers; only their differences within a row matter.
        head_width: Features of a head, ``2 P``.
        dtype: Of the result. Angles are always float32: bfloat16 cannot tell 256 from 257.
    """
    assert head_width % 2 == 0, head_width
    pairs = head_width // 2
    exponents_P = torch.arange(pairs, dtype=torch.float32, device=positions_N.device) / pairs
    angles_NP = positions_N.float().unsqueeze(1) * BASE**-exponents_P
    return Rotation(cosines=angles_NP.cos().to(dtype), sines=angles_NP.sin().to(dtype))


def rotate(x_NW: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
    """Turn each head's features, of which ``p`` and ``p + P`` are a pair; ``(N, W)``."""
    first_NHP, second_NHP = x_NW.unflatten(1, (num_heads, -1)).chunk(2, dim=2)
    cosines, sines = rotation.cosines.unsqueeze(1), rotation.sines.unsqueeze(1)
    turned = [
        first_NHP * cosines - second_NHP * sines,
        second_NHP * cosines + first_NHP * sines,
    ]
    return torch.cat(turned, dim=2).flatten(1)
