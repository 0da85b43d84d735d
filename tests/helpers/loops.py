"""What definitions of several backbones are made of, a token and a head at a time."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["attention", "layer_norm", "linear", "mix"]


def linear(x: Tensor, params: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight times a vector, and a bias."""
    return params[f"{name}.weight"] @ x + params[f"{name}.bias"]


def mix(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], heads: int
) -> list[Tensor]:
    """Softmax attention of each query, head by head."""
    width = len(keys[0]) // heads
    mixed = []
    for query in queries:
        parts = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            logits = torch.stack([query[at] @ key[at] / math.sqrt(width) for key in keys])
            weights = torch.exp(logits - logits.max())
            weights = weights / weights.sum()
            parts.append(sum(w * value[at] for w, value in zip(weights, values, strict=True)))
        mixed.append(torch.cat(parts))
    return mixed


def attention(
    tokens: list[Tensor], params: Mapping[str, Tensor], name: str, heads: int
) -> list[Tensor]:
    """Every token asks every token of its row."""
    queries, keys, values = (
        [linear(x, params, f"{name}.{part}") for x in tokens] for part in ("query", "key", "value")
    )
    return [linear(x, params, f"{name}.output") for x in mix(queries, keys, values, heads)]


def layer_norm(x: Tensor, params: Mapping[str, Tensor], name: str) -> Tensor:
    """To a mean of 0 and a variance of 1, then scaled and shifted."""
    x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]
