"""What holds for every entry of the registry; what one of them computes is in its own test."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.datasets import SCHEMA, without
from tests.helpers.features import make_features, select
from tests.helpers.rounding import assert_within, rounding_of
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.config import InjectionConfig, ModelConfig
from torchrec_hilomoe.embeddings.features import FeatureWidths, HistoryWidths, SequenceFeatures
from torchrec_hilomoe.hilomoe import inject_shared_router, sites_of
from torchrec_hilomoe.models.build import BACKBONES, build_backbone, build_task, site_patterns

EMBEDDING = 4
NEEDS_NO_HISTORY = ("dlrm", "dcn")
# Histories of two fields and of one, each of them also the candidate's.
HISTORIES = (
    HistoryWidths(event=2 * EMBEDDING, max_length=4),
    HistoryWidths(event=EMBEDDING, max_length=3),
    HistoryWidths(event=EMBEDDING, max_length=4),
)
WIDTHS = FeatureWidths(
    candidate=2 * EMBEDDING,
    context=EMBEDDING + 3,
    histories=HISTORIES,
    embedding=EMBEDDING,
    dense=3,
)
# Of each history: an empty row, full ones, and rows shorter than the longest.
LENGTHS = ((0, 4, 1, 2, 3), (2, 0, 3, 1, 2), (0, 4, 4, 0, 1))
ROWS = len(LENGTHS[0])


def build(name: str, histories: int = len(HISTORIES)) -> Backbone:
    """A small one with its usual options, away from where it starts."""
    config = ModelConfig(backbone=name, embedding_dim=EMBEDDING, head=(7, 5), batch_norm=True)
    model = build_backbone(config, replace(WIDTHS, histories=HISTORIES[:histories]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def features_of(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> SequenceFeatures:
    return make_features(replace(WIDTHS, histories=HISTORIES[: len(lengths)]), lengths)


def plain(model: Backbone) -> Backbone:
    return model


def with_experts(model: Backbone) -> Backbone:
    config = InjectionConfig(num_layers=2, num_experts=3, sites=("all",))
    inject_hilomoe(model, config, sites=site_patterns(model, config))
    return model


def routed_by_sample(model: Backbone, histories: int = len(HISTORIES)) -> Backbone:
    widths = replace(WIDTHS, histories=HISTORIES[:histories])
    config = InjectionConfig(num_layers=2, num_experts=3, sites=("all",), routing="sample")
    width = widths.candidate + widths.context
    patterns = site_patterns(model, config)
    inject_shared_router(model, config, patterns, "sample", width, tokens=model.tokens)
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out, std=0.3)
    return model


def routed_by_feature(model: Backbone) -> Backbone:
    """The first layer by the candidate's first embedding, the second by the last history's."""
    config = InjectionConfig(num_layers=2, num_experts=3, sites=("all",), routing="sample")
    width = WIDTHS.candidate + WIDTHS.context + sum(history.event for history in HISTORIES)
    views = [[range(WIDTHS.embedding)], [range(width - WIDTHS.embedding, width)]]
    patterns = site_patterns(model, config)
    model.include_history_mean = True
    inject_shared_router(model, config, patterns, "sample", width, tokens=model.tokens, views=views)
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out, std=0.3)
    return model


class AsTensors(nn.Module):
    """A backbone of two histories behind plain tensors, as FX and export see it."""

    def __init__(self, model: Backbone, like: SequenceFeatures) -> None:
        super().__init__()
        self.model, self.like = model, like

    def forward(
        self,
        candidate: Tensor,
        context: Tensor,
        clicks: Tensor,
        click_lengths: Tensor,
        click_target: Tensor,
        views: Tensor,
        view_lengths: Tensor,
        view_target: Tensor,
    ) -> Tensor:
        first, second = self.like.histories
        histories = (
            replace(first, events=clicks, lengths=click_lengths, target=click_target),
            replace(second, events=views, lengths=view_lengths, target=view_target),
        )
        return self.model(
            replace(self.like, candidate=candidate, context=context, histories=histories)
        )


def tensors_of(features: SequenceFeatures) -> tuple[Tensor, ...]:
    first, second = (
        (history.events, history.lengths, history.target) for history in features.histories
    )
    return features.candidate, features.context, *first, *second


every_backbone = pytest.mark.parametrize("name", BACKBONES)


@every_backbone
@pytest.mark.parametrize("histories", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others_nor_on_padding(name, histories):
    model, features = build(name, histories).eval(), features_of(LENGTHS[:histories])
    together, rounding = model(features), rounding_of(model, features)
    assert together.shape == (ROWS,)
    for row in range(ROWS):
        assert_within(model(select(features, [row])), together[[row]], rounding)
    assert_within(model(replace(features, max_seqlen=19)), together, rounding)


@every_backbone
def test_a_row_has_no_gradient_by_the_events_of_others(name):
    model, features = build(name).eval(), features_of()
    for history in features.histories:
        history.events.requires_grad_()
    row = 3
    model(features)[row].backward()
    for history in features.histories:
        assert history.events.grad is not None
        for other, grad in enumerate(history.events.grad.split(history.lengths.tolist())):
            assert bool(grad.any()) == (other == row and len(grad) > 0)


@every_backbone
def test_permuting_the_batch_permutes_the_outputs(name):
    model, features, order = build(name).eval(), features_of(), [3, 0, 4, 2, 1]
    rounding = rounding_of(model, features)
    assert_within(model(select(features, order)), model(features)[order], rounding)


@every_backbone
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [((0, 0, 0),) * 3, ((4, 4), (3, 3), (4, 4)), ((0,),) * 3, ((4,), (3,), (4,))],
    ids=["all empty", "all full", "one empty", "one full"],
)
def test_empty_and_full_histories_and_a_batch_of_one(name, lengths, training):
    model, features = build(name).train(training), features_of(lengths)
    logits = model(features)
    assert logits.shape == (len(lengths[0]),)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@every_backbone
@pytest.mark.parametrize("change", [plain, with_experts, routed_by_sample, routed_by_feature])
def test_a_batch_without_rows_changes_nothing_and_has_gradients_of_zero(name, change):
    """Which ranks average with those of others."""
    model, features = change(build(name)), features_of(((),) * 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(features)
    assert logits.shape == (0,)
    logits.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name
    for site in sites_of(model).values():
        if (record := site.routing_record) is not None:
            assert not record.counts_LE.any()
            assert record.losses().balance_L.tolist() == record.losses().z_L.tolist() == [0, 0]


@every_backbone
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_is_fx_traceable(name, experts, training):
    """TorchRec's pipelines trace models; a branch on a tensor would break them."""
    model, features = build(name, 2), features_of(LENGTHS[:2])
    plain = AsTensors(with_experts(model) if experts else model, features).train(training)
    traced = torch.fx.symbolic_trace(plain)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    torch.manual_seed(5)
    want = plain(*tensors_of(features))
    plain.load_state_dict(state)  # running statistics have moved
    torch.manual_seed(5)
    assert torch.equal(traced(*tensors_of(features)), want)


@every_backbone
@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=pytest.mark.slow)])
# FBGEMM computes shapes with a function that PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
def test_can_be_exported(name, experts):
    model, features = build(name, 2), features_of(LENGTHS[:2])
    plain = AsTensors(with_experts(model) if experts else model, features).eval()
    inputs = tensors_of(features)
    exported = torch.export.export(plain, inputs).module()
    assert_within(exported(*inputs), plain(*inputs), rounding_of(plain, *inputs))


@every_backbone
@pytest.mark.parametrize("training", [True, False])
def test_computes_in_bfloat16(name, training):
    model, features = build(name, 2).train(training), features_of(LENGTHS[:2])
    # Sums are made in 32 bits; each map rounds what it has summed up.
    maps = sum(isinstance(module, nn.Linear) for module in model.modules())
    rounding = rounding_of(model, features, dtype=torch.bfloat16, terms=maps)
    torch.manual_seed(5)
    want = model(features)
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in tensors_of(features)]
    torch.manual_seed(5)
    got = AsTensors(model.bfloat16(), features)(*inputs)
    assert got.dtype == torch.bfloat16
    assert_within(got, want.double(), rounding)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_backbone
@pytest.mark.parametrize("training", [True, False])
def test_fresh_experts_change_not_one_bit(name, training):
    model, features = build(name).train(training), features_of()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    plain = model(features)
    with_experts(model)
    model.load_state_dict(state, strict=False)  # running statistics have moved
    torch.manual_seed(5)
    assert torch.equal(model(features), plain)


@every_backbone
def test_experts_of_all_sites_take_part_and_learn(name):
    model, features = with_experts(build(name)), features_of()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("expert_out"):
                parameter.normal_()
    model(features).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("expert_in")}
    assert grads
    assert all(grad is not None and grad.any() for grad in grads.values())


@every_backbone
def test_declared_groups_are_linear_maps_each_in_one_of_them(name):
    groups = type(build(name)).SITES
    assert "head" in groups
    found: list[str] = []
    for patterns in groups.values():
        found += inject_hilomoe(build(name), HiLoMoEConfig(num_experts=2), sites=patterns)
    assert len(found) == len(set(found))
    # Where the output is one number, there is no place for experts.
    model = build(name)
    outputs = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1
    }
    assert not outputs & set(found)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - set(NEEDS_NO_HISTORY)))
def test_a_schema_without_a_history_is_refused(name):
    message = (
        "needs a behaviour sequence, but the schema has none. Add one to Schema.sequences, or take "
        "model.backbone dlrm or dcn, which need none."
    )
    config = ModelConfig(backbone=name, hilomoe=InjectionConfig(enabled=False))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_task(config, without(SCHEMA, "sequences"))


@every_backbone
def test_routed_by_feature_a_row_is_the_same_alone_and_hears_only_what_it_reads(name):
    model, features = routed_by_feature(build(name)).eval(), features_of(LENGTHS)
    together, rounding = model(features), rounding_of(model, features)
    router = next(iter(sites_of(model).values())).router
    assert router is not None
    before = router.routing().scores_LEN
    for row in range(ROWS):
        assert_within(model(select(features, [row])), together[[row]], rounding)
    *others, last = features.histories
    model(replace(features, histories=(*others, replace(last, events=-last.events))))
    assert torch.equal(router.routing().scores_LEN[0], before[0])
    heard = (router.routing().scores_LEN[1] != before[1]).any(dim=0)
    assert torch.equal(heard, last.lengths > 0)


# As many events as rows, and as many tokens, are no reason to mistake one for the other.
@pytest.mark.parametrize("lengths", [(LENGTHS[0],), ((2, 0, 1, 1, 1),)], ids=["any", "one a row"])
@pytest.mark.parametrize("name", BACKBONES)
def test_routed_by_sample_a_row_is_the_same_alone(name, lengths):
    model = routed_by_sample(build(name, 1), 1).eval()
    features = features_of(lengths)
    together, rounding = model(features), rounding_of(model, features)
    for row in range(ROWS):
        assert_within(model(select(features, [row])), together[[row]], rounding)
