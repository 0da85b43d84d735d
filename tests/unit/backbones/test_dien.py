"""DIEN against its definition, a row and an event at a time, and its auxiliary loss."""

import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.definitions import assert_matches_definition
from tests.helpers.features import make_features, select
from tests.helpers.rounding import assert_same, assert_within, rounding_of, within
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.dien import Attention, DIEN
from torchrec_hilomoe.backbones.layers.mlp import Activation
from torchrec_hilomoe.embeddings.features import FeatureWidths, HistoryWidths, SequenceFeatures

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
    """Options of a DIEN."""

    attention: Attention = "mlp"
    activation: Activation = "relu"
    auxiliary_weight: float = 0.0

    def build(self, widths: FeatureWidths = WIDTHS) -> DIEN:
        model = DIEN(
            widths,
            attention=self.attention,
            attention_units=(6, 3),
            attention_activation=self.activation,
            auxiliary_weight=self.auxiliary_weight,
            auxiliary_units=(4, 3),
            head=(7, 5),
        )
        with torch.no_grad():
            for parameter in model.parameters():  # an identity, or slopes of zero, hide errors
                parameter.add_(0.5 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith(("mean", "var")):
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
        return model


CASES = [
    Case(),
    Case(activation="dice"),
    Case(attention="bilinear"),
    Case(attention="dot"),
]


def linear(x: Tensor, params: dict[str, Tensor], name: str) -> Tensor:
    return params[f"{name}.weight"] @ x + params[f"{name}.bias"]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def recurrence(
    events: list[Tensor], attention: list[Tensor] | None, params: dict[str, Tensor], name: str
) -> list[Tensor]:
    """The state after each event."""
    states: list[Tensor] = []
    for at, x in enumerate(events):
        h = states[-1] if states else torch.zeros_like(x)
        i_u, i_r, i_n = linear(x, params, f"{name}.input").chunk(3)
        s = params[f"{name}.hidden_weight"] @ h + params[f"{name}.hidden_bias"]
        s_u, s_r, s_n = s.chunk(3)
        update, reset = sigmoid(i_u + s_u), sigmoid(i_r + s_r)
        update = update if attention is None else attention[at] * update
        states.append(h + update * (torch.tanh(i_n + reset * s_n) - h))
    return states


def score(t: Tensor, h: Tensor, case: Case, params: dict[str, Tensor], name: str) -> Tensor:
    """How much the target asks for a state."""
    if case.attention == "dot":
        return h @ t
    if case.attention == "bilinear":
        return params[f"{name}.hidden.weight"] @ h @ t
    x = torch.cat([t, h, t - h, t * h])
    for layer in (0, 2):
        x = linear(x, params, f"{name}.mlp.hidden.{layer}")
        if case.activation == "dice":
            dice = f"{name}.mlp.hidden.{layer + 1}"
            mean, var = (params[f"{dice}.bn.running_{moment}"] for moment in ("mean", "var"))
            gate = sigmoid((x - mean) / torch.sqrt(var + 1e-9))
            x = gate * x + params[f"{dice}.alpha"] * (1 - gate) * x
        else:
            x = x.clamp(min=0)
    return linear(x, params, f"{name}.mlp.output")[0]


def evolved(
    events: list[Tensor], target: Tensor, case: Case, params: dict[str, Tensor], name: str
) -> Tensor:
    if not events:
        return torch.zeros_like(target)
    interests = recurrence(events, None, params, f"{name}.extraction")
    scores = torch.stack([score(target, h, case, params, f"{name}.attention") for h in interests])
    exp = torch.exp(scores - scores.max())
    attention = list(exp / exp.sum())
    return recurrence(interests, attention, params, f"{name}.evolution")[-1]


def definition(case: Case, features: SequenceFeatures, params: dict[str, Tensor]) -> Tensor:
    """DIEN in evaluation, in plain loops."""
    logits = []
    for row in range(len(features.candidate)):
        parts = [features.candidate[row], features.context[row]]
        for index, history in enumerate(features.histories):
            events = list(history.events.split(history.lengths.tolist())[row])
            parts.append(evolved(events, history.target[row], case, params, f"interests.{index}"))
        x = torch.cat(parts)
        for layer in (0, 2):
            x = linear(x, params, f"head.hidden.{layer}").clamp(min=0)
        logits.append(linear(x, params, "head.output")[0])
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition_in_float64(case, dtype):
    assert_matches_definition(
        case.build().eval().to(dtype),
        make_features(WIDTHS, LENGTHS),
        partial(definition, case),
        no_gradient="attention.mlp.output.bias",  # the same for all of a row's scores
    )


def test_a_row_without_events_has_evolved_to_nothing():
    model, features = Case().build().eval(), make_features(WIDTHS, ((0, 3), (0, 2)))
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(features)
    sample = WIDTHS.candidate + WIDTHS.context
    assert not seen[0][0, sample:].any()
    assert seen[0][1, sample:].all()


def test_the_order_of_events_matters():
    model, features = Case().build().eval(), make_features(WIDTHS, ((3,), (2,)))
    clicks, views = features.histories
    turned = replace(features, histories=(replace(clicks, events=clicks.events.flip(0)), views))
    assert not within(model(features), model(turned), rounding_of(model, features)).any()


def test_attention_drops_units_in_training_only():
    model = DIEN(WIDTHS, attention_dropout=0.5, head=(7,))
    features = make_features(WIDTHS, LENGTHS)
    assert not torch.equal(model(features), model(features))
    model.eval()
    assert torch.equal(model(features), model(features))


@pytest.mark.parametrize("attention", ["mlp", "bilinear", "dot"])
def test_declared_sites_are_its_linear_maps(attention: Attention):
    model = Case(attention=attention, auxiliary_weight=1.0).build()
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups = dict(DIEN.SITES)
    if attention == "dot":  # which has no map
        with pytest.raises(ValueError, match="matches none of the model's"):
            inject_hilomoe(model, HiLoMoEConfig(), sites=groups.pop("attention"))
    patterns = [pattern for group in groups.values() for pattern in group]
    found = inject_hilomoe(model, HiLoMoEConfig(num_experts=2), sites=patterns)
    # One output is no place for experts; nor is what only training computes.
    left = {name for name in linears - set(found) if not name.endswith(".output")}
    assert left == {name for name in linears if ".auxiliary." in name and "hidden" in name}
    assert (
        sum("attention" in name for name in found) == {"mlp": 4, "bilinear": 2, "dot": 0}[attention]
    )
    assert {f"interests.0.{gru}.input" for gru in ("extraction", "evolution")} <= set(found)


@pytest.mark.parametrize("attention", ["mlp", "bilinear", "dot"])
def test_every_attention_traces(attention: Attention):
    case = Case(attention=attention, activation="dice", auxiliary_weight=0.5)
    features = make_features(replace(WIDTHS, histories=WIDTHS.histories[:1]), LENGTHS[:1])
    model = case.build(replace(WIDTHS, histories=WIDTHS.histories[:1]))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, candidate: Tensor, context: Tensor, events: Tensor, target: Tensor):
            (history,) = features.histories
            histories = (replace(history, events=events, target=target),)
            return self.model(
                replace(features, candidate=candidate, context=context, histories=histories)
            )

    (history,) = features.histories
    inputs = (features.candidate, features.context, history.events, history.target)
    for training in (True, False):
        plain = Plain().train(training)
        traced = torch.fx.symbolic_trace(plain)
        results = []
        for run in (plain, traced):
            torch.manual_seed(5)  # of the negatives
            model.zero_grad()
            logits = run(*inputs)
            logits.sum().backward()
            results.append([logits, *(parameter.grad for parameter in model.parameters())])
        assert_same(results[1], results[0])


def test_the_auxiliary_loss_changes_no_output_but_teaches_the_states():
    features = make_features(WIDTHS, LENGTHS)
    torch.manual_seed(3)
    plain = Case().build()
    taught = Case(auxiliary_weight=0.5).build()
    taught.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(taught(features), plain(features))

    def gradients(model: DIEN) -> dict[str, Tensor]:
        model.zero_grad()
        model(features).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before, after = gradients(plain), gradients(taught)
    assert after.keys() == dict(taught.named_parameters()).keys()
    for name, grad in before.items():
        if "extraction" not in name:
            # Adding the loss's zero adds nothing, and nothing else is computed otherwise.
            assert torch.equal(after[name], grad), name
        elif "interests.0" in name:  # the other's rows are too short to teach the states' own map
            assert not torch.equal(after[name], grad), name
    for name, grad in after.items():
        assert "auxiliary" not in name or grad.any(), name


def test_the_auxiliary_loss_weighs_the_mean_over_histories():
    model = Case(auxiliary_weight=0.5).build()
    weights = {
        name: m.get_submodule("auxiliary.attached").extra_repr()
        for name, m in model.get_submodule("interests").named_children()
    }
    assert weights == {"0": "weight=0.25", "1": "weight=0.25"}
    assert not [name for name, _ in Case().build().named_modules() if "auxiliary.mlp" in name]


def test_a_row_is_the_same_among_others():
    """Also in training, as nothing here is normalised over rows."""
    model, features = Case(auxiliary_weight=1.0).build(), make_features(WIDTHS, LENGTHS)
    together, rounding = model(features), rounding_of(model, features)
    for row in range(len(LENGTHS[0])):
        assert_within(model(select(features, [row])), together[[row]], rounding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "cosine"}, "DIEN.attention is 'cosine', which is not known. Use mlp, bili"),
        ({"attention_units": ()}, "DIEN.attention_units must be widths of at least 1, and one of"),
        ({"attention_units": (4, 0)}, "got (4, 0). Correct model.dien.attention_units."),
        ({"auxiliary_units": (0,)}, "got (0,). Correct model.dien.auxiliary_units."),
        ({"auxiliary_weight": -0.5}, "DIEN.auxiliary_weight must be 0 or more, got -0.5. Correct"),
        ({"auxiliary_weight": float("nan")}, "must be 0 or more, got nan."),
        ({"attention_activation": "swosh"}, "MLP.activation is 'swosh', which is not known."),
        ({"head": (8, 0)}, "MLP.hidden must be widths of at least 1, got (8, 0)."),
    ],
)
def test_an_impossible_model_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DIEN(WIDTHS, **options)


def test_a_schema_without_a_history_is_refused():
    with pytest.raises(ValueError, match="DIEN needs a behaviour sequence, but the schema has non"):
        DIEN(replace(WIDTHS, histories=()))
