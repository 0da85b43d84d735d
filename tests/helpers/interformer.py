"""InterFormer from its equations: a row, a token and, where order matters, a number at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tests.helpers.loops import layer_norm, linear, mix
from torchrec_hilomoe.backbones.interformer import InterFormer
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["Case", "definition"]

Params = Mapping[str, Tensor]
HEAD = (7, 5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of an InterFormer."""

    num_layers: int = 1
    interaction_layers: int = 1
    num_heads: int = 2
    cls_tokens: int = 2
    pooled_tokens: int = 2
    recent_tokens: int = 2
    gating: Literal["printed", "self"] = "printed"
    residual: bool = False

    def build(self, widths: FeatureWidths) -> InterFormer:
        """A model whose parameters are all away from where they start."""
        model = InterFormer(widths, **vars(self), head=HEAD)
        with torch.no_grad():
            for parameter in model.parameters():  # attention that starts even would hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model


def definition(
    case: Case, features: SequenceFeatures, params: Params, widths: FeatureWidths
) -> Tensor:
    """The model's logits."""
    return torch.stack(
        [_logit(case, features, params, widths, row) for row in range(len(features.candidate))]
    )


def _logit(
    case: Case, features: SequenceFeatures, params: Params, widths: FeatureWidths, row: int
) -> Tensor:
    context = _context(features, params, widths, row)
    events = _events(features, params, row)
    history: list[Tensor] = []
    for layer in range(case.num_layers + 1):
        context_summary = _context_summary(case, context, params, layer)
        if layer == 0:
            history = [*context_summary, *events]
        history_summary = _history_summary(case, history, params, layer)
        if layer < case.num_layers:
            context = _interact(case, [*context, *history_summary], len(context), params, layer)
            history = _attend(case, history, context_summary, params, layer)
    x = torch.cat([*context_summary, *history_summary])
    for hidden in (0, 2):
        x = _swish(linear(x, params, f"head.hidden.{hidden}"))
    return linear(x, params, "head.output")[0]


def _context(
    features: SequenceFeatures, params: Params, widths: FeatureWidths, row: int
) -> list[Tensor]:
    """Candidate and context fields, an embedding each, then one token of the dense features."""
    width, context = widths.embedding, features.context[row]
    fields = torch.cat([features.candidate[row], context[: len(context) - widths.dense]])
    tokens = [fields[i : i + width] for i in range(0, len(fields), width)]
    if widths.dense:
        tokens.append(linear(context[len(context) - widths.dense :], params, "dense"))
    return tokens


def _events(features: SequenceFeatures, params: Params, row: int) -> list[Tensor]:
    """What happened at each step, the groups' latest events together; MLP_lce(s * MLP_mask(s))."""
    groups = [h.events.split(h.lengths.tolist())[row] for h in features.histories]
    events = []
    for ago in range(max(len(group) for group in groups), 0, -1):
        parts = [
            group[len(group) - ago] if ago <= len(group) else torch.zeros_like(history.target[0])
            for group, history in zip(groups, features.histories, strict=True)
        ]
        s = torch.cat(parts)
        events.append(linear(s * _mlp(s, params, "merge.mask"), params, "merge.compress"))
    return events


def _context_summary(case: Case, context: list[Tensor], params: Params, layer: int) -> list[Tensor]:
    """Gating(MLP(X)), the MLP over the tokens, for one feature at a time."""
    name = f"context_summaries.{layer}"
    mixed = []
    for feature in range(len(context[0])):
        column = torch.stack([token[feature] for token in context])
        mixed.append(_mlp(column, params, f"{name}.mix"))
    tokens = [torch.stack([column[i] for column in mixed]) for i in range(case.cls_tokens)]
    return [_gate(case, token, params, f"{name}.gate") for token in tokens]


def _history_summary(case: Case, history: list[Tensor], params: Params, layer: int) -> list[Tensor]:
    """Gating([CLS, PMA, the latest events])."""
    name = f"history_summaries.{layer}"
    cls, events = history[: case.cls_tokens], history[case.cls_tokens :]
    keys = [linear(token, params, f"{name}.pool.key") for token in history]
    values = [linear(token, params, f"{name}.pool.value") for token in history]
    queries = list(params[f"{name}.pool.queries"])
    pooled = [
        linear(token, params, f"{name}.pool.output")
        for token in mix(queries, keys, values, case.num_heads)
    ]
    recent = [
        events[-ago] if ago <= len(events) else torch.zeros_like(history[0])
        for ago in range(1, case.recent_tokens + 1)
    ]
    return [_gate(case, t, params, f"{name}.gate") for t in (*cls, *pooled, *recent)]


def _interact(
    case: Case, tokens: list[Tensor], keep: int, params: Params, layer: int
) -> list[Tensor]:
    """MLP(DHEN(X, S_sum)): in each layer of it dot products and a cross, and a shortcut."""
    width = len(tokens[0])
    for depth in range(case.interaction_layers):
        name = f"interactions.{layer}.layers.{depth}"
        flat = torch.cat(tokens)
        products = torch.stack(
            [tokens[i] @ tokens[j] for i in range(len(tokens)) for j in range(i + 1, len(tokens))]
        )
        dot = linear(products, params, f"{name}.dot")
        cross = flat * linear(flat, params, f"{name}.cross.layers.0") + flat
        joined = (dot + cross + flat).split(width)
        tokens = [layer_norm(token, params, f"{name}.norm") for token in joined]
    return list(_mlp(torch.cat(tokens), params, f"interactions.{layer}.update").split(width)[:keep])


def _attend(
    case: Case, history: list[Tensor], summary: list[Tensor], params: Params, layer: int
) -> list[Tensor]:
    """MHA(PFFN(X_sum, S)): the map of PFFN is the matrix X_sum W, made out."""
    name = f"histories.{layer}"
    matrix = torch.stack(summary, dim=1) @ params[f"{name}.ffn.weigh.weight"]
    mapped = [matrix @ token for token in history]
    if case.residual:
        mapped = [x + y for x, y in zip(history, mapped, strict=True)]
    query, key, value = (
        [linear(x, params, f"{name}.attention.{part}") for x in mapped]
        for part in ("query", "key", "value")
    )
    query = [_turn(x, position, case.num_heads) for position, x in enumerate(query)]
    key = [_turn(x, position, case.num_heads) for position, x in enumerate(key)]
    attended = [
        linear(x, params, f"{name}.attention.output")
        for x in mix(query, key, value, case.num_heads)
    ]
    if case.residual:
        return [x + y for x, y in zip(mapped, attended, strict=True)]
    return attended


def _turn(x: Tensor, position: int, heads: int) -> Tensor:
    """RoFormer: the pairs of each head turned by the position times 10000 ** (-2i / d)."""
    width = len(x) // heads
    turned = list(x)
    for head in range(heads):
        for i in range(width // 2):
            angle = position * 10_000 ** (-2 * i / width)
            first, second = head * width + i, head * width + width // 2 + i
            cos, sin = math.cos(angle), math.sin(angle)
            turned[first] = x[first] * cos - x[second] * sin
            turned[second] = x[first] * sin + x[second] * cos
    return torch.stack(turned)


def _gate(case: Case, x: Tensor, params: Params, name: str) -> Tensor:
    mlp = _mlp(x, params, f"{name}.mlp")
    return _sigmoid(x * mlp) if case.gating == "printed" else x * _sigmoid(mlp)


def _mlp(x: Tensor, params: Params, name: str) -> Tensor:
    return linear(_swish(linear(x, params, f"{name}.0")), params, f"{name}.2")


def _swish(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))
