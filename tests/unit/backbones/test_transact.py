"""TransAct against its definition, a row and a token at a time, and what must not change it."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.definitions import assert_matches_definition
from tests.helpers.features import make_features, select
from tests.helpers.loops import attention, layer_norm, linear
from tests.helpers.rounding import assert_within, rounding_of, within
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.transact import TransAct
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)

HEADS = 2
# The second history has a field that only events have, between two that the target has as well.
WIDTHS = FeatureWidths(
    candidate=4,
    context=3,
    histories=(
        HistoryWidths(event=4, max_length=4),
        HistoryWidths(event=6, max_length=2, event_only=(1,)),
    ),
    embedding=2,
)
# Of each history: an empty row, full ones, and rows shorter than the longest.
LENGTHS = ((0, 4, 1, 2, 3), (2, 0, 0, 1, 2))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a TransAct."""

    num_layers: int = 1
    latest: int = 1
    cross_layers: int = 2

    def build(self, widths: FeatureWidths = WIDTHS, **options: Any) -> TransAct:
        model = TransAct(
            widths,
            num_layers=self.num_layers,
            num_heads=HEADS,
            ffn_width=5,
            latest=self.latest,
            cross_layers=self.cross_layers,
            head=(7, 5),
            **options,
        )
        with torch.no_grad():
            for parameter in model.parameters():  # attention that starts even would hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model


CASES = [Case(), Case(num_layers=2, latest=3), Case(latest=4, cross_layers=1)]


def summary(
    case: Case, events: list[Tensor], target: Tensor, params: dict[str, Tensor], name: str
) -> list[Tensor]:
    """The latest tokens of one row of one history, and the map of their maximum."""
    tokens = [torch.cat([event, target]) for event in events]
    for layer in range(case.num_layers):
        at = f"{name}.layers.{layer}"
        attended = attention(tokens, params, f"{at}.attention", HEADS)
        for place, x in enumerate(tokens):
            x = layer_norm(x + attended[place], params, f"{at}.norm_attention")
            y = linear(linear(x, params, f"{at}.ffn_in").clamp(min=0), params, f"{at}.ffn_out")
            tokens[place] = layer_norm(x + y, params, f"{at}.norm_ffn")
    largest = torch.stack([torch.stack(of_one).max() for of_one in zip(*tokens, strict=True)])
    return [*tokens, linear(largest, params, f"{name}.pool")]


def definition(case: Case, features: SequenceFeatures, params: dict[str, Tensor]) -> Tensor:
    """TransAct, in plain loops."""
    logits = []
    for row in range(len(features.candidate)):
        parts = [features.candidate[row], features.context[row]]
        for index, history in enumerate(features.histories):
            widths = WIDTHS.histories[index]
            fields = history.target[row].split(WIDTHS.embedding)
            kept = [field for i, field in enumerate(fields) if i not in widths.event_only]
            events = list(history.events.split(history.lengths.tolist())[row])
            events = events or [torch.zeros_like(history.target[row])]
            *tokens, largest = summary(case, events, torch.cat(kept), params, f"encoders.{index}")
            latest = min(case.latest, widths.max_length)
            padding = [torch.zeros_like(largest)] * (latest - len(tokens))
            parts += [*padding, *tokens[-latest:], largest]
        start = crossed = deep = torch.cat(parts)
        for layer in range(case.cross_layers):
            crossed = crossed + start * linear(crossed, params, f"head.cross.layers.{layer}")
        for layer in (0, 2):
            deep = linear(deep, params, f"head.hidden.{layer}").clamp(min=0)
        logits.append(linear(torch.cat([crossed, deep]), params, "head.output")[0])
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition_in_float64(case, dtype):
    """Float64 itself cannot be asked: FBGEMM pads on CPU in 32 and 16 bits only."""
    assert_matches_definition(
        case.build().to(dtype),
        make_features(WIDTHS, LENGTHS),
        partial(definition, case),
        no_gradient="key.bias",  # it cancels in the softmax
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_their_lengths(case):
    model, features = case.build(), make_features(WIDTHS, LENGTHS)
    together, rounding = model(features), rounding_of(model, features)
    for row in range(len(LENGTHS[0])):
        assert_within(model(select(features, [row])), together[[row]], rounding)
    assert_within(model(replace(features, max_seqlen=19)), together, rounding)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_permuting_the_batch_permutes_the_outputs(case):
    model, features, order = case.build(), make_features(WIDTHS, LENGTHS), [3, 0, 4, 2, 1]
    rounding = rounding_of(model, features)
    assert_within(model(select(features, order)), model(features)[order], rounding)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [((0, 0, 0), (0, 0, 0)), ((4, 4), (2, 2)), ((0,), (0,)), ((4,), (2,))],
    ids=["all empty", "all full", "one empty", "one full"],
)
def test_empty_and_full_histories_and_a_batch_of_one(case, lengths):
    model, features = case.build(), make_features(WIDTHS, lengths)
    logits = model(features)
    params = dict(model.named_parameters())
    assert_within(logits, definition(case, features, params), rounding_of(model, features))
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_order_of_events_matters_only_to_the_latest():
    """There are no positions: an encoder and a maximum see a set."""
    model, features = Case().build(), make_features(WIDTHS, ((4,), (2,)))
    clicks, views = features.histories

    def logits(order: list[int]) -> Tensor:
        turned = replace(clicks, events=clicks.events[order])
        return model(replace(features, histories=(turned, views)))

    rounding = rounding_of(model, features)
    assert_within(logits([2, 1, 0, 3]), logits([0, 1, 2, 3]), rounding)
    assert not within(logits([3, 1, 2, 0]), logits([0, 1, 2, 3]), rounding).any()


class Plain(nn.Module):
    """TransAct behind tensors, as FX traces it and programs are exported."""

    def __init__(self, model: TransAct, like: SequenceFeatures) -> None:
        super().__init__()
        self.model, self.like = model, like

    def forward(
        self, candidate: Tensor, context: Tensor, events: Tensor, target: Tensor, lengths: Tensor
    ) -> Tensor:
        history = History(events=events, lengths=lengths, target=target)
        return self.model(SequenceFeatures(candidate, context, (history,), self.like.max_seqlen))


def one_history(index: int) -> tuple[FeatureWidths, SequenceFeatures]:
    widths = replace(WIDTHS, histories=WIDTHS.histories[index : index + 1])
    return widths, make_features(widths, LENGTHS[index : index + 1])


def tensors_of(features: SequenceFeatures) -> tuple[Tensor, ...]:
    (history,) = features.histories
    vectors = (features.candidate, features.context, history.events, history.target)
    return (*vectors, history.lengths)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_is_fx_traceable(case, experts, index):
    """TorchRec's pipelines trace models; a branch on a tensor would break them."""
    widths, features = one_history(index)
    model = case.build(widths)
    if experts:
        inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=3), sites=["*"])
    plain, inputs = Plain(model, features), tensors_of(features)
    traced = torch.fx.symbolic_trace(plain)
    assert torch.equal(traced(*inputs), plain(*inputs))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.slow
def test_is_exportable_for_any_number_of_rows_and_events(experts):
    widths, features = one_history(0)
    model = CASES[1].build(widths).eval()
    if experts:
        inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=3), sites=["*"])
    plain = Plain(model, features)
    rows, events = torch.export.Dim("rows", min=1), torch.export.Dim("events")
    shapes = dict.fromkeys(("candidate", "context", "target", "lengths"), {0: rows})
    program = torch.export.export(
        plain, tensors_of(features), dynamic_shapes={**shapes, "events": {0: events}}
    ).module()
    for chosen in ([0, 1, 2, 3, 4], [3, 0], [1]):
        inputs = tensors_of(select(features, chosen))
        assert_within(program(*inputs), plain(*inputs), rounding_of(plain, *inputs))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"head_dropout": 0.5}], ids=str)
def test_dropout_works_in_training_only_and_is_the_seeds(options: dict[str, Any]):
    model, features = Case().build(**options), make_features(WIDTHS, LENGTHS)
    before = model(features)
    assert not torch.equal(model(features), before)
    torch.manual_seed(5)
    once = model(features)
    torch.manual_seed(5)
    assert torch.equal(model(features), once)
    model.eval()
    assert torch.equal(model(features), model(features))


def test_declared_sites_are_its_linear_maps():
    model = Case(num_layers=2).build()
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    patterns = [pattern for group in TransAct.SITES.values() for pattern in group]
    found = inject_hilomoe(model, HiLoMoEConfig(num_experts=2), sites=patterns)
    assert linears - set(found) == {"head.output"}  # one output is no place for experts


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        (
            replace(WIDTHS, histories=()),
            {},
            "TransAct needs a behaviour sequence, but the schema has no",
        ),
        (WIDTHS, {"num_layers": 0}, "TransAct.num_layers must be at least 1, got 0"),
        (WIDTHS, {"ffn_width": 0}, "TransAct.ffn_width must be at least 1, got 0"),
        (WIDTHS, {"latest": 0}, "TransAct.latest must be at least 1, got 0"),
        (WIDTHS, {"cross_layers": 0}, "CrossNetwork.num_layers must be at least 1, got 0"),
        (WIDTHS, {"num_heads": 3}, "num_heads must divide width, got num_heads=3 and width=8"),
    ],
)
def test_an_impossible_model_is_refused(widths, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TransAct(widths, **options)
