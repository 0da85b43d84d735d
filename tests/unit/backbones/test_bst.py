"""BST against its definition, a row and a token at a time, and what must not change its outputs."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.definitions import assert_matches_definition
from tests.helpers.features import make_features, select
from tests.helpers.loops import attention, layer_norm, linear
from tests.helpers.rounding import assert_within, rounding_of, within
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.bst import BST, TransformerLayer
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)

HEADS = 2
WIDTHS = FeatureWidths(
    candidate=4,
    context=3,
    histories=(HistoryWidths(event=5, max_length=4), HistoryWidths(event=3, max_length=2)),
    embedding=1,
)
# Of each history: an empty row, full ones, and rows shorter than the longest.
LENGTHS = ((0, 4, 1, 2, 3), (2, 0, 0, 1, 2))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a BST."""

    num_layers: int = 1
    residual: bool = True
    layer_norm: bool = False
    pooling: Literal["target", "mean"] = "target"
    positions: bool = True

    @property
    def num_heads(self) -> int:
        """Without positions the tokens' widths are odd."""
        return HEADS if self.positions else 1

    def build(self, widths: FeatureWidths = WIDTHS) -> BST:
        model = BST(
            widths,
            position_dim=3 if self.positions else 0,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            residual=self.residual,
            layer_norm=self.layer_norm,
            pooling=self.pooling,
            head=(7, 5),
        )
        with torch.no_grad():
            for parameter in model.parameters():  # attention that starts even would hide errors
                parameter.add_(0.5 * torch.randn_like(parameter))
        return model


CASES = [
    Case(),
    Case(pooling="mean"),
    Case(residual=False, layer_norm=True),
    Case(num_layers=2, layer_norm=True),
    Case(num_layers=2, residual=False, pooling="mean"),
    Case(residual=False, positions=False),
]


def features_of(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> SequenceFeatures:
    widths = replace(WIDTHS, histories=WIDTHS.histories[: len(lengths)])
    return make_features(widths, lengths)


def norm(x: Tensor, case: Case, params: dict[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, params, name) if case.layer_norm else x


def definition(case: Case, features: SequenceFeatures, params: dict[str, Tensor]) -> Tensor:
    """BST, in plain loops."""
    logits = []
    for row in range(len(features.candidate)):
        summaries = []
        for index, history in enumerate(features.histories):
            events = history.events.split(history.lengths.tolist())[row]
            # The latest event is at distance 1 from the target, which is last, at distance 0.
            sequence = [*events, history.target[row]]
            far = range(len(events), -1, -1)
            tokens = [
                torch.cat([x, params[f"positions.{index}"][distance]]) if case.positions else x
                for x, distance in zip(sequence, far, strict=True)
            ]
            for layer in range(case.num_layers):
                name = f"transformers.{index}.layers.{layer}"
                attended = attention(tokens, params, f"{name}.attention", case.num_heads)
                for at, x in enumerate(tokens):
                    y = x + attended[at] if case.residual else attended[at]
                    y = norm(y, case, params, f"{name}.norm_attention")
                    z = linear(y, params, f"{name}.ffn_in")
                    z = linear(torch.where(z > 0, z, 0.01 * z), params, f"{name}.ffn_out")
                    z = y + z if case.residual else z
                    tokens[at] = norm(z, case, params, f"{name}.norm_ffn")
            pooled = tokens[-1] if case.pooling == "target" else sum(tokens) / len(tokens)
            summaries.append(pooled)
        x = torch.cat([features.candidate[row], features.context[row], *summaries])
        for layer in (0, 2):
            x = linear(x, params, f"head.hidden.{layer}").clamp(min=0)
        logits.append(linear(x, params, "head.output")[0])
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition_in_float64(case, dtype):
    """Float64 itself cannot be asked: FBGEMM pads on CPU in 32 and 16 bits only."""
    assert_matches_definition(
        case.build().to(dtype), features_of(), partial(definition, case), no_gradient="key.bias"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_added_to_every_key_changes_nothing(case):
    """It cancels in the softmax; so its gradient, all rounding, is left out above."""
    model, features = case.build(), features_of()
    before = model(features)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("key.bias"):
                parameter.add_(0.5)
    assert_within(model(features), before, rounding_of(model, features))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_their_lengths(case):
    model, features = case.build(), features_of()
    together, rounding = model(features), rounding_of(model, features)
    for row in range(len(LENGTHS[0])):
        assert_within(model(select(features, [row])), together[[row]], rounding)
    assert_within(model(replace(features, max_seqlen=19)), together, rounding)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_permuting_the_batch_permutes_the_outputs(case):
    model, features, order = case.build(), features_of(), [3, 0, 4, 2, 1]
    rounding = rounding_of(model, features)
    assert_within(model(select(features, order)), model(features)[order], rounding)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [((0, 0, 0), (0, 0, 0)), ((4, 4), (2, 2)), ((0,), (0,)), ((4,), (2,))],
    ids=["all empty", "all full", "one empty", "one full"],
)
def test_empty_and_full_histories_and_a_batch_of_one(case, lengths):
    model, features = case.build(), features_of(lengths)
    logits = model(features)
    params = dict(model.named_parameters())
    assert_within(logits, definition(case, features, params), rounding_of(model, features))
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_order_of_events_matters_only_through_positions():
    model, features = Case().build(), features_of(((3,), (2,)))
    clicks, views = features.histories
    turned = replace(features, histories=(replace(clicks, events=clicks.events.flip(0)), views))
    assert not within(model(features), model(turned), rounding_of(model, features)).any()
    with torch.no_grad():
        model.positions[0].zero_()
    assert_within(model(features), model(turned), rounding_of(model, features))


def test_positions_start_as_sines_and_cosines_of_the_distance():
    positions = BST(WIDTHS, position_dim=4, num_heads=1).positions
    assert [tuple(position.shape) for position in positions] == [(5, 4), (3, 4)]
    want = [[f(d / s) for s in (1, 100) for f in (math.sin, math.cos)] for d in range(5)]
    # An angle, of 4 at most, is rounded, and so is its sine.
    assert_within(positions[0], torch.tensor(want).double(), 5 * torch.finfo(torch.float32).eps)


def test_targets_only_layers_are_where_nobody_reads_the_rest():
    def computed(**options: Any) -> list[bool]:
        model = Case(**options).build()
        return [m.targets_only for m in model.modules() if isinstance(m, TransformerLayer)]

    assert computed(num_layers=3) == [False, False, True] * 2
    assert computed(num_layers=2, pooling="mean") == [False, False] * 2


class Plain(nn.Module):
    """BST behind tensors, as FX traces it."""

    def __init__(self, model: BST, like: SequenceFeatures) -> None:
        super().__init__()
        self.model, self.like = model, like

    def forward(
        self, candidate: Tensor, context: Tensor, events: Tensor, target: Tensor, lengths: Tensor
    ) -> Tensor:
        history = History(events=events, lengths=lengths, target=target)
        return self.model(SequenceFeatures(candidate, context, (history,), self.like.max_seqlen))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_fx_traceable(case, experts):
    """TorchRec's pipelines trace models; a branch on a tensor would break them."""
    model = case.build(replace(WIDTHS, histories=WIDTHS.histories[:1]))
    if experts:
        inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=3), sites=["*"])
    features = features_of(LENGTHS[:1])
    (history,) = features.histories
    plain = Plain(model, features)
    inputs = (
        features.candidate,
        features.context,
        history.events,
        history.target,
        history.lengths,
    )
    traced = torch.fx.symbolic_trace(plain)
    assert torch.equal(traced(*inputs), plain(*inputs))


def test_dropout_works_in_training_only():
    model = BST(WIDTHS, position_dim=3, num_heads=2, dropout=0.5)
    features = features_of()
    assert not torch.equal(model(features), model(features))
    model.eval()
    assert torch.equal(model(features), model(features))


def test_declared_sites_are_its_linear_maps():
    model = Case(num_layers=2).build()
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    patterns = [pattern for group in BST.SITES.values() for pattern in group]
    found = inject_hilomoe(model, HiLoMoEConfig(num_experts=2), sites=patterns)
    assert linears - set(found) == {"head.output"}  # one output is no place for experts
    assert {name.rpartition(".")[2] for name in found if "attention" in name} == {
        "query",
        "key",
        "value",
        "output",
    }


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        (
            replace(WIDTHS, histories=()),
            {},
            "BST needs a behaviour sequence, but the schema has no",
        ),
        (WIDTHS, {"num_layers": 0}, "BST.num_layers must be at least 1, got 0"),
        (WIDTHS, {"num_heads": 3}, "num_heads must divide width, got num_heads=3 and width=8"),
    ],
)
def test_an_impossible_model_is_refused(widths, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BST(widths, position_dim=3, **options)
