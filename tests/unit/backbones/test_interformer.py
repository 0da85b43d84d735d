"""InterFormer: what its history is, who reads whom, what is refused. Its numbers: numerics."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.features import make_features, select
from tests.helpers.rounding import assert_within, rounding_of, within
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.interformer import InterFormer
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)
from torchrec_hilomoe.hilomoe.inject import inject_shared_router

WIDTHS = FeatureWidths(
    candidate=16,
    context=11,
    histories=(HistoryWidths(event=16, max_length=4), HistoryWidths(event=8, max_length=3)),
    embedding=8,
    dense=3,
)
ONE = replace(WIDTHS, histories=WIDTHS.histories[:1])
LENGTHS = ((0, 4, 1, 2, 0), (2, 0, 3, 2, 0))


def build(widths: FeatureWidths = WIDTHS, **options: Any) -> InterFormer:
    model = InterFormer(widths, **{"num_heads": 2, "head": (7, 5), **options})
    with torch.no_grad():
        for parameter in model.parameters():  # attention that starts even would hide errors
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_events(features: SequenceFeatures, *events: Tensor) -> SequenceFeatures:
    """The same rows with other events of its first groups."""
    histories = list(features.histories)
    for group, of_group in enumerate(events):
        histories[group] = replace(histories[group], events=of_group)
    return replace(features, histories=tuple(histories))


def test_parallel_groups_are_one_group_of_more_fields():
    lengths = (0, 4, 1, 2)
    together = replace(WIDTHS, histories=(HistoryWidths(event=24, max_length=4),))
    model, features = build(together), make_features(together, [lengths])
    events = features.histories[0].events.split([16, 8], dim=1)
    apart = replace(
        features,
        histories=tuple(
            History(events=e, lengths=torch.tensor(lengths), target=torch.zeros(4, e.shape[1]))
            for e in events
        ),
    )
    assert_within(model(apart), model(features), rounding_of(model, features))


def test_groups_meet_at_their_latest_events():
    """So an event that only the longer one has is alone, at the start of its row."""
    model, features = build(), make_features(WIDTHS, ((3,), (1,)))
    long, short = features.histories
    filled = History(
        events=torch.cat([torch.zeros(2, 8), short.events]),
        lengths=torch.tensor([3]),
        target=short.target,
    )
    got = model(replace(features, histories=(long, filled)))
    assert_within(got, model(features), rounding_of(model, features))


def test_the_number_of_tokens_may_be_known():
    model, features = build(), make_features(WIDTHS, LENGTHS)
    assert torch.equal(model(replace(features, num_tokens=4 + 2 + 3 + 2)), model(features))


def test_the_order_of_events_is_seen_through_positions_and_recent_tokens_only(monkeypatch):
    features = make_features(ONE, ((4, 2),))
    first, second = features.histories[0].events.split([4, 2])
    turned = with_events(features, torch.cat([first.flip(0), second.flip(0)]))
    for recent in (2, 0):
        model = build(ONE, recent_tokens=recent)
        assert not within(model(turned), model(features), rounding_of(model, features)).any()
    monkeypatch.setattr(
        "torchrec_hilomoe.backbones.layers.attention.rotate", lambda x, rotation, heads: x
    )
    model = build(ONE, recent_tokens=0)
    assert_within(model(turned), model(features), rounding_of(model, features))


def test_more_recent_tokens_than_events_are_all_of_them():
    features = make_features(ONE, ((1, 0, 2),))
    model = build(ONE, recent_tokens=9)
    logits, rounding = model(features), rounding_of(model, features)
    logits.sum().backward()
    assert logits.isfinite().all()
    for row in range(3):
        assert_within(model(select(features, [row])), logits[[row]], rounding)


def test_both_sides_of_a_layer_read_summaries_of_the_same_layer():
    """The context's side could run after the history's, or before it."""
    model, features = build(num_layers=2), make_features(WIDTHS, LENGTHS)
    summaries: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def note(store: dict[str, Tensor], name: str, at: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            store[name] = output if at < 0 else args[at]

        return hook

    for layer in range(2):
        for kind in ("context", "history"):
            summary = model.get_submodule(f"{kind}_summaries.{layer}")
            summary.register_forward_hook(note(summaries, f"{kind}.{layer}", -1))
        interaction = model.get_submodule(f"interactions.{layer}")
        interaction.register_forward_hook(note(read, f"history.{layer}", 1))
        history = model.get_submodule(f"histories.{layer}")
        history.register_forward_hook(note(read, f"context.{layer}", 1))
    model(features)
    assert len(read) == 4
    assert all(read[name] is summaries[name] for name in read)


def test_the_candidate_is_read_as_part_of_the_context():
    model, features = build(), make_features(WIDTHS, LENGTHS)
    features.candidate.requires_grad_()
    features.context.requires_grad_()
    model(features).sum().backward()
    assert features.candidate.grad is not None
    assert features.context.grad is not None
    assert (features.candidate.grad != 0).all()
    assert (features.context.grad != 0).all()


@pytest.mark.parametrize(("gating", "bounded"), [("printed", True), ("self", False)])
def test_the_head_reads_gated_tokens(gating, bounded):
    model, features = build(gating=gating), make_features(WIDTHS, LENGTHS)
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(features)
    assert seen[0].shape == (5, (4 + 4 + 2 + 2) * 8)
    assert ((seen[0] >= 0) & (seen[0] <= 1)).all() == bounded


def test_dropout_works_in_training_only():
    model, features = build(dropout=0.5), make_features(WIDTHS, LENGTHS)
    assert not torch.equal(model(features), model(features))
    model.eval()
    assert torch.equal(model(features), model(features))


def test_trains_in_steps_of_one_row():
    model, features = build(dropout=0.1, batch_norm=True), make_features(WIDTHS, LENGTHS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for row in range(len(LENGTHS[0])):
        loss = model(select(features, [row])).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_declared_sites_are_its_linear_maps():
    model = build(num_layers=2, interaction_layers=2)
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    patterns = [pattern for group in InterFormer.SITES.values() for pattern in group]
    found = inject_hilomoe(model, HiLoMoEConfig(num_experts=2), sites=patterns)
    # One output is no place for experts, nor is the map of a few dense numbers.
    assert linears - set(found) == {"head.output", "dense"}


def test_sites_can_be_routed_by_sample():
    model, features = build(), make_features(WIDTHS, ((0, 4, 1, 2, 0), (2, 0, 0, 2, 1)))
    patterns = [pattern for group in InterFormer.SITES.values() for pattern in group]
    config = HiLoMoEConfig(num_layers=2, num_experts=3)
    inject_shared_router(model, config, patterns, "sample", 27, tokens=model.tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("expert_out"):
                parameter.normal_(std=0.3)
    model.eval()
    together, rounding = model(features), rounding_of(model, features)
    for row in range(5):
        assert_within(model(select(features, [row])), together[[row]], rounding)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        (
            replace(WIDTHS, histories=()),
            {},
            "InterFormer needs a behaviour sequence, but the schema has none. Add one to Schema",
        ),
        (
            WIDTHS,
            {"num_heads": 3},
            "InterFormer.num_heads must be at least 1 and divide the embedding's width into even "
            "parts, because rotary positions turn pairs of features; got num_heads=3 and width=8. "
            "Change the heads or model.embedding_dim.",
        ),
        (WIDTHS, {"num_heads": 8}, "got num_heads=8 and width=8"),
        (WIDTHS, {"num_heads": 0}, "got num_heads=0 and width=8"),
        (WIDTHS, {"num_layers": 0}, "InterFormer.num_layers must be at least 1, got 0"),
        (WIDTHS, {"interaction_layers": 0}, "InterFormer.interaction_layers must be at least 1"),
        (WIDTHS, {"cls_tokens": 0}, "InterFormer.cls_tokens must be at least 1, got 0"),
        (WIDTHS, {"pooled_tokens": -1}, "InterFormer.pooled_tokens must be at least 0, got -1"),
        (WIDTHS, {"recent_tokens": -1}, "InterFormer.recent_tokens must be at least 0, got -1"),
        (WIDTHS, {"gating": "open"}, "InterFormer.gating must be 'printed' or 'self', got 'open'"),
        (WIDTHS, {"dropout": 1.5}, "dropout"),
        (WIDTHS, {"head": (8, 0)}, "MLP.hidden must be widths of at least 1, got (8, 0)"),
    ],
)
def test_an_impossible_model_is_refused(widths, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InterFormer(widths, **options)
