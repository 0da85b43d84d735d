"""DLRM and DCN-v2 where a schema has no history, and no dense features either."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.datasets import SCHEMA, without
from tests.helpers.models import MODEL
from tests.helpers.rounding import assert_within, rounding_of
from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.dcn import DCN
from torchrec_hilomoe.backbones.dlrm import DLRM
from torchrec_hilomoe.config import InjectionConfig, ModelConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures
from torchrec_hilomoe.hilomoe import sites_of
from torchrec_hilomoe.models.build import build_task

ROWS = 5
NO_HISTORY = without(SCHEMA, "sequences")
SCHEMAS = {
    "numbers": NO_HISTORY,
    "no numbers": without(NO_HISTORY, "dense"),
    "one field": without(NO_HISTORY, "dense", "pooled"),
    "a field and numbers": replace(without(NO_HISTORY, "pooled"), candidate=SCHEMA.candidate[:1]),
    "one field alone": replace(
        without(NO_HISTORY, "dense", "pooled"), candidate=SCHEMA.candidate[:1], group="item"
    ),
}
EXPERTS = {
    "none": InjectionConfig(enabled=False),
    "by row": InjectionConfig(num_experts=3, sites=("all",)),
    "by sample": InjectionConfig(num_experts=3, sites=("all",), routing="sample"),
    "by view": InjectionConfig(
        num_layers=2,
        num_experts=3,
        sites=("all",),
        routing="sample",
        route_by=(("item",), ("candidate",)),
    ),
}
both = pytest.mark.parametrize("name", ["dlrm", "dcn"])
any_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
any_experts = pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)


class AsTensors(nn.Module):
    """A backbone behind plain tensors, as FX and export see it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, candidate: Tensor, context: Tensor) -> Tensor:
        return self.backbone(
            SequenceFeatures(candidate=candidate, context=context, histories=(), max_seqlen=1)
        )


def build(name: str, schema: Schema, experts: InjectionConfig) -> tuple[AsTensors, FeatureWidths]:
    config = replace(MODEL, backbone=name, batch_norm=True, hilomoe=experts)
    model = build_task(config, schema).model
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out, std=0.3)
    return AsTensors(model.backbone), model.sparse.widths


def inputs_of(widths: FeatureWidths, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, widths.candidate), torch.randn(rows, widths.context)


@both
@any_schema
@any_experts
def test_a_row_does_not_depend_on_the_others(name, schema, experts):
    model, widths = build(name, schema, experts)
    inputs = inputs_of(widths)
    together, rounding = model.eval()(*inputs), rounding_of(model, *inputs)
    assert together.shape == (ROWS,)
    for row in range(ROWS):
        alone = model(*(x[[row]] for x in inputs))
        assert_within(alone, together[[row]], rounding)


@both
@any_schema
def test_a_batch_without_rows_has_gradients_of_zero(name, schema):
    model, widths = build(name, schema, EXPERTS["by view"])
    logits = model(*inputs_of(widths, rows=0))
    assert logits.shape == (0,)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@both
@any_schema
def test_is_fx_traceable(name, schema):
    model, widths = build(name, schema, EXPERTS["by view"])
    inputs = inputs_of(widths)
    traced = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(traced(*inputs), model(*inputs))


@both
@pytest.mark.parametrize("schema", ["numbers", "no numbers"])
# FBGEMM computes shapes with a function that PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
def test_can_be_exported(name, schema):
    model, widths = build(name, SCHEMAS[schema], EXPERTS["none"])
    inputs = inputs_of(widths)
    batch = torch.export.Dim("batch", min=2)
    shapes = {"candidate": {0: batch}, "context": {0: batch}}
    exported = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes).module()
    more = inputs_of(widths, rows=ROWS + 4)
    assert_within(exported(*more), model(*more), rounding_of(model, *more))


def test_without_numbers_the_candidates_first_field_stands_in_their_place():
    widths = FeatureWidths(candidate=8, context=4, histories=(), embedding=4)
    model = DLRM(widths, head=())
    features = SequenceFeatures(
        candidate=torch.randn(ROWS, 8), context=torch.randn(ROWS, 4), histories=(), max_seqlen=1
    )
    fields = torch.cat([features.candidate, features.context], dim=1).split(4, dim=1)
    dots = [(one * other).sum(dim=1, keepdim=True) for one, other in combinations(fields, 2)]
    want = model.head(torch.cat([fields[0], *dots], dim=1))
    assert_within(model(features), want, rounding_of(model, features))


@both
def test_embedded_numbers_are_fields_like_the_others(name):
    config = ModelConfig(
        backbone=name, embed_dense=True, hilomoe=InjectionConfig(enabled=False), head=(8,)
    )
    model = build_task(config, NO_HISTORY).model
    fields = len(SCHEMA.candidate) + len(SCHEMA.pooled) + len(SCHEMA.dense)
    assert isinstance(model.backbone, DLRM | DCN)
    assert model.backbone.fields.num_fields == fields - 1
    assert model.backbone.fields.dense is None
